"""Hugging Face -> fairseq."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from torch import Tensor

from deltasam_fairseq.convert.families import (
    ACTIVATIONS,
    ENCODER,
    FAMILIES,
    HEAD,
    MASK,
    Family,
    Tensors,
    atomic_output_dir,
    copy_tokenizer,
    first_position,
    layers_of,
    load_exactly,
    read_json,
    renamed,
    safetensors_torch,
    write_json,
)
from deltasam_fairseq.convert.vocabulary import (
    Vocabulary,
    dictionary_of,
    fairseq_symbols,
    gpt2_ids,
    read_vocabulary_of,
)

OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
CONFIG = (  # what config.json must have
    *("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "max_position_embeddings", "hidden_act", "hidden_dropout_prob"),
    *("attention_probs_dropout_prob", "type_vocab_size", "layer_norm_eps", "pad_token_id"),
)

ARCHITECTURES = [
    *("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"),
    *("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification"),
]


def read_tensors(folder: Path) -> Tensors:
    """All weights of a Hugging Face folder in float32, without the name of the model in front.

    Raises:
        FileNotFoundError: no file of weights.
        ValueError: one that is damaged, or without embeddings.
    """
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    path = safe if safe.is_file() else pickled
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has neither {safe.name} nor {pickled.name} (files in several parts, "
            "TensorFlow's and JAX's are not read)"
        )
    load_safe = safetensors_torch().load_file if path == safe else None
    try:
        tensors = load_safe(path) if load_safe else torch.load(str(path), "cpu", weights_only=True)
    except Exception as error:  # each library has its own
        raise ValueError(f"{path} is damaged, or not what its name says: {error}") from error
    found = {}
    for name, tensor in tensors.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        for prefix in ("bert.", "roberta."):
            name = name[len(prefix) :] if name.startswith(prefix) else name
        found[name] = tensor.float() if tensor.is_floating_point() else tensor
    embeddings = [f"embeddings.{x}_embeddings.weight" for x in ("word", "position", "token_type")]
    missing = [name for name in embeddings if name not in found]
    if missing:
        raise ValueError(f"{folder}: the weights lack {', '.join(missing)}")
    return found


def check_config(config: Dict[str, Any]) -> None:
    """Raise a ValueError for a model that fairseq's RoBERTa, or bert, does not compute."""
    kind = config.get("model_type")
    name = (config.get("architectures") or [f"model_type {kind}"])[0]
    if kind not in FAMILIES or config.get("architectures") and name not in ARCHITECTURES:
        raise ValueError(
            f"{name} (model_type {kind}) cannot be converted; supported are "
            f"{', '.join(ARCHITECTURES)} (DistilRoBERTa and MiniLM are among them)"
        )
    missing = [option for option in CONFIG if option not in config]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    wanted: Dict[str, List[Any]] = {
        "position_embedding_type": ["absolute", None],
        "is_decoder": [False, None],
        "add_cross_attention": [False, None],
        "hidden_act": list(ACTIVATIONS),
    }
    if kind == "bert":
        wanted["type_vocab_size"] = [2]
    else:
        wanted["layer_norm_eps"] = [1e-5]  # fairseq's RoBERTa has it built in
    for option, allowed in wanted.items():
        if config.get(option) not in allowed:
            raise ValueError(f"{name}: {option} is {config.get(option)}, supported are {allowed}")


def fairseq_options(config: Dict[str, Any]) -> Dict[str, Any]:
    """The options of fairseq's model, as Hugging Face's config.json has them."""
    options = {
        "encoder_layers": config["num_hidden_layers"],
        "encoder_embed_dim": config["hidden_size"],
        "encoder_ffn_embed_dim": config["intermediate_size"],
        "encoder_attention_heads": config["num_attention_heads"],
        "max_positions": config["max_position_embeddings"] - first_position(config),
        "activation_fn": ACTIVATIONS[config["hidden_act"]],
        "dropout": config["hidden_dropout_prob"],
        "attention_dropout": config["attention_probs_dropout_prob"],
    }
    if config["model_type"] == "bert":
        options["layer_norm_eps"] = config["layer_norm_eps"]
    return options


def encoder_weights(hf: Tensors, config: Dict[str, Any], rows: Tensor) -> Tensors:
    """The encoder's weights under fairseq's names; ``rows``: of which ids the dictionary is."""
    state = renamed(hf, layers_of(config["num_hidden_layers"]))
    positions = hf["embeddings.position_embeddings.weight"][first_position(config) :]
    types = hf["embeddings.token_type_embeddings.weight"]
    if config["model_type"] == "bert":
        state[f"{ENCODER}embed_types.weight"] = types
    else:
        positions = positions + types[0]  # the only type there is
    unused = positions.new_zeros(Dictionary().pad() + 1, positions.shape[1])
    state[f"{ENCODER}embed_positions.weight"] = torch.cat([unused, positions])
    state[f"{ENCODER}embed_tokens.weight"] = hf["embeddings.word_embeddings.weight"][rows]
    state[f"{ENCODER}version"] = torch.tensor([3.0])  # fairseq's mark of the current names
    return state


def lm_weights(hf: Tensors, family: Family, rows: Tensor) -> Tensors:
    """The MLM head's weights under fairseq's names, but the tied decoder's; {}: no tied head."""
    bias = hf.get(f"{family.lm_bias}.bias", hf.get(f"{family.lm_decoder}.bias"))
    words = hf["embeddings.word_embeddings.weight"]
    if bias is None or not torch.equal(hf.get(f"{family.lm_decoder}.weight", words), words):
        return {}
    heads = {"dense": family.lm_dense, "layer_norm": family.lm_layer_norm}
    state = renamed(hf, {f"encoder.lm_head.{ours}": theirs for ours, theirs in heads.items()})
    state["encoder.lm_head.bias"] = bias[rows]
    return state


def head_weights(hf: Tensors, family: Family, model: Any, classes: Optional[int]) -> Tensors:
    """The classification head's weights under fairseq's names; registers it with the model.

    Where Hugging Face has the head of a sequence classifier with so many ``classes`` (None: any
    number), it is that. Otherwise BERT's pooler with a fresh output layer. {}: no head.

    Raises:
        ValueError: ``classes`` are given, and there is neither.
    """
    output = f"{family.head_out}.weight"
    classes = classes or (len(hf[output]) if output in hf else None)
    if classes is None:
        return {}
    if f"{family.head_dense}.weight" not in hf:
        raise ValueError(f"--num-classes {classes}: there is no {family.head_dense} for the head")
    model.register_classification_head(HEAD, num_classes=classes)
    head = model.classification_heads[HEAD].state_dict()
    head.update(renamed(hf, {"dense": family.head_dense}))
    if output in hf and len(hf[output]) == classes:
        head.update(renamed(hf, {"out_proj": family.head_out}))
    return {f"classification_heads.{HEAD}.{name}": tensor for name, tensor in head.items()}


def bpe_options(source: Path, out: Path, model_type: str) -> str:
    """fairseq's options for the tokenizer whose files are in ``out``."""
    if model_type == "roberta":
        config = source / "tokenizer_config.json"
        if config.is_file() and read_json(config).get("add_prefix_space"):
            raise ValueError(f"{config}: add_prefix_space is true; --bpe gpt2 of fairseq adds none")
        return f"--bpe gpt2 --gpt2-encoder-json {out}/encoder.json --gpt2-vocab-bpe {out}/vocab.bpe"
    found: Dict[str, Any] = {"lowercase": True, "strip_accents": None, "handle_chinese_chars": True}
    names = {"do_lower_case": "lowercase", "tokenize_chinese_chars": "handle_chinese_chars"}
    if (source / "tokenizer_config.json").is_file():
        given = read_json(source / "tokenizer_config.json").items()
        found.update({names.get(k, k): v for k, v in given if names.get(k, k) in found})
    if (source / "tokenizer.json").is_file():  # what transformers goes by
        normalizer = read_json(source / "tokenizer.json").get("normalizer") or {}
        found.update({k: v for k, v in normalizer.items() if k in found})
    accents = found["strip_accents"] in (None, found["lowercase"])
    if not (accents and found["handle_chinese_chars"]):
        raise ValueError(
            f"the tokenizer has {found}; --bpe wordpiece removes accents when it lower-cases, and "
            "only then, and splits Chinese characters"
        )
    cased = "" if found["lowercase"] else " --wordpiece-cased"
    return f"--bpe wordpiece --wordpiece-vocab {out}/vocab.txt{cased}"


def write_tokenizer(source: Path, out: Path, vocabulary: Vocabulary, model_type: str) -> None:
    """Copy Hugging Face's files, and write those that fairseq's BPE reads."""
    copy_tokenizer(source, out)
    if model_type == "roberta":
        write_json(out / "encoder.json", gpt2_ids(vocabulary.merges))
        merges = "".join(f"{merge}\n" for merge in vocabulary.merges)
        (out / "vocab.bpe").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    elif not (out / "vocab.txt").is_file():
        ids = range(max(vocabulary.tokens) + 1)
        pieces = "".join(f"{vocabulary.tokens.get(i, f'[unused-{i}]')}\n" for i in ids)
        (out / "vocab.txt").write_text(pieces, encoding="utf-8")


def write_labels(config: Dict[str, Any], classes: int, path: Path) -> None:
    """fairseq's label/dict.txt: the classes in their order."""
    names = config.get("id2label") or {}
    labels = Dictionary()
    for i in range(classes):
        labels.add_symbol("_".join(str(names.get(str(i), f"LABEL_{i}")).split()))
    path.parent.mkdir()
    labels.save(str(path))


def to_fairseq(source: Path, out: Path, num_classes: Optional[int] = None) -> List[str]:
    """Convert a Hugging Face folder.

    Args:
        source: holds config.json, the weights and the vocabulary.
        out: folder to make.
        num_classes: size of a fresh output layer on BERT's pooler; None: as in the checkpoint.

    Returns:
        Lines to print: what was converted, and the options to go on with.

    Raises:
        ValueError, OSError, ImportError: what is wrong, in words. Then nothing is written.
    """
    config = read_json(source / "config.json")
    check_config(config)
    family = FAMILIES[config["model_type"]]
    hf = read_tensors(source)
    vocabulary = read_vocabulary_of(source, config["model_type"])
    bpe = bpe_options(source, out, config["model_type"])
    size = len(hf["embeddings.word_embeddings.weight"])
    if size != config["vocab_size"]:
        raise ValueError(f"config.json has vocab_size {config['vocab_size']}, the weights {size}")
    symbols = fairseq_symbols(vocabulary, family, size)
    dictionary, with_mask = dictionary_of(symbols), dictionary_of(symbols)
    with_mask.add_symbol(MASK)
    row_of = {symbol: row for row, symbol in enumerate(symbols)}
    rows = torch.tensor([row_of[symbol] for symbol in with_mask.symbols])

    options = fairseq_options(config)
    args = argparse.Namespace(arch=family.arch, task="masked_lm", data=str(out.resolve()))
    vars(args).update(options, tokens_per_sample=options["max_positions"])
    ARCH_CONFIG_REGISTRY[family.arch](args)
    model: Any = ARCH_MODEL_REGISTRY[family.arch].build_model(
        args, SimpleNamespace(source_dictionary=with_mask)
    )

    state = encoder_weights(hf, config, rows)
    lm = lm_weights(hf, family, rows)
    fresh = {f"encoder.lm_head.{name}": x for name, x in model.encoder.lm_head.state_dict().items()}
    state.update({**fresh, **lm})
    state["encoder.lm_head.weight"] = state[f"{ENCODER}embed_tokens.weight"]
    head = head_weights(hf, family, model, num_classes)
    state.update(head)
    args.load_checkpoint_heads = bool(head)
    load_exactly(model, state, f"{source}: the weights do not fit config.json")

    with atomic_output_dir(out) as part:
        dictionary.save(str(part / "dict.txt"))
        if Dictionary.load(str(part / "dict.txt")).symbols != dictionary.symbols:
            raise ValueError("fairseq's dict.txt cannot hold this vocabulary")
        write_tokenizer(source, part, vocabulary, config["model_type"])
        if head and f"{family.head_out}.weight" in hf and num_classes is None:
            classes = len(hf[f"{family.head_out}.weight"])
            write_labels(config, classes, part / "label" / "dict.txt")
        history = {"criterion_name": "none", "optimizer_name": "none", "lr_scheduler_state": {}}
        checkpoint = {
            "args": args,  # not cfg: a Namespace is read by every version of fairseq
            "model": state,
            "optimizer_history": [{**history, "num_updates": 0}],
            "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
            "last_optimizer_state": None,
        }
        torch.save(checkpoint, str(part / "model.pt"))

    kept = "none" if not head else f"from {family.head_dense}"
    sizes = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    separator = "" if config["model_type"] == "bert" else " --separator-token 2"
    return [
        f"{source} -> {out}: {size} tokens, MLM head {'kept' if lm else 'fresh'}, "
        f"classification head {kept}",
        f"to encode text: {bpe}",
        "to fine-tune: fairseq-train DATA --user-dir deltasam_fairseq --task sentence_prediction "
        f"--init-token 0{separator} --finetune-from-model {out}/model.pt",
        f"    --arch {family.arch} {sizes}",
    ]
