"""Hugging Face -> fairseq."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, NamedTuple, Optional, Set

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from torch import Tensor

from deltasam_fairseq.checkpoints.data_record import KEY, DataRecord
from deltasam_fairseq.convert.compare import Side, compare_outputs, compare_tokens, sample_lines
from deltasam_fairseq.convert.families import (
    ACTIVATIONS,
    ENCODER,
    FAMILIES,
    HEAD,
    MASK,
    Family,
    Tensors,
    atomic_output_dir,
    first_position,
    import_transformers,
    layer_modules,
    load_exactly,
    read_json,
    rename_modules,
)
from deltasam_fairseq.convert.vocabulary import (
    BPE,
    copy_tokenizer,
    dictionary_of,
    fairseq_symbols,
    load_vocabulary,
    write_bpe,
)
from deltasam_fairseq.data.binarize import build_bpe

ARCHITECTURES = [
    *("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"),
    *("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification"),
]
# Tensors that may stay unread: buffers, RoBERTa's pooler, a decoder tied to the embeddings.
UNREAD = re.compile(
    r"(^|\.)(embeddings\.(position|token_type)_ids|pooler\.dense\.(weight|bias)"
    r"|cls\.seq_relationship\.(weight|bias)|(lm_head|cls\.predictions)\.decoder\.(weight|bias))$"
)


class Source(NamedTuple):
    """A Hugging Face folder."""

    config: Any
    tensors: Tensors  # what its files hold, under the names of transformers without "bert."
    with_lm: Any  # transformers' model with an MLM head
    with_head: Any  # that with a classification head, or None


def read_source(folder: Path) -> Source:
    """Read a Hugging Face folder in float32.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: a model of another kind, damaged files, weights that are missing or too many.
    """
    transformers = import_transformers()
    read_json(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} is an adapter (adapter_config.json): merge it into its model first "
            "(merge_and_unload, save_pretrained of the library peft)"
        )
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    check_config(config)
    family = FAMILIES[config.model_type]
    models: Dict[str, Any] = {}
    tensors: Tensors = {}
    unread: Set[str] = set()
    for name in (family.with_lm, family.with_head):
        if models and not any(family.head_out in tensor for tensor in unread):
            break
        try:
            model, report = getattr(transformers, name).from_pretrained(
                str(folder),
                config=config,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:  # each library has its own
            raise ValueError(
                f"{folder}: transformers cannot read the weights, which are damaged or a pointer "
                f"of git-lfs, or not there: {error}"
            ) from error
        if report["mismatched_keys"]:
            wrong = [f"{k} is {[*a]}, not {[*b]}" for k, a, b in sorted(report["mismatched_keys"])]
            raise ValueError(f"{folder}: weights do not fit config.json: {'; '.join(wrong[:4])}")
        unexpected = set(report["unexpected_keys"])
        unread = unread & unexpected if models else unexpected
        models[name] = model.float().eval()
        for key, tensor in model.state_dict().items():
            if key not in report["missing_keys"]:
                tensors[re.sub(f"^{config.model_type}\\.", "", key)] = tensor
    dropped = sorted(name for name in unread if not UNREAD.search(name))
    if dropped:
        raise ValueError(
            f"{folder}: nothing reads {len(dropped)} tensors of the weights: "
            f"{', '.join(dropped[:5])}{' ...' if dropped[5:] else ''}; is config.json that of "
            "these weights? An adapter (LoRA) has to be merged first"
        )
    return Source(config, tensors, models[family.with_lm], models.get(family.with_head))


def check_config(config: Any) -> None:
    """Raise a ValueError for a model that fairseq's RoBERTa, or bert, does not compute."""
    kind = config.model_type
    name = (config.architectures or [f"model_type {kind}"])[0]
    if kind not in FAMILIES or config.architectures and name not in ARCHITECTURES:
        raise ValueError(
            f"{name} (model_type {kind}) cannot be converted; supported are "
            f"{', '.join(ARCHITECTURES)} (DistilRoBERTa and MiniLM are among them)"
        )
    wanted: Dict[str, List[Any]] = {
        "position_embedding_type": ["absolute", None],
        "is_decoder": [False, None],
        "add_cross_attention": [False, None],
        "hidden_act": list(ACTIVATIONS),
        "type_vocab_size": [FAMILIES[kind].token_types],
    }
    if kind == "roberta":
        wanted["layer_norm_eps"] = [1e-5]  # fairseq's RoBERTa has it built in
    for option, allowed in wanted.items():
        if getattr(config, option, None) not in allowed:
            found = getattr(config, option)
            raise ValueError(f"{name}: {option} is {found}, supported are {allowed}")


def fairseq_options(config: Any) -> Dict[str, Any]:
    """The options of fairseq's model for a config of transformers."""
    options = {
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "max_positions": config.max_position_embeddings - first_position(config),
        "activation_fn": ACTIVATIONS[config.hidden_act],
        "dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob,
    }
    if config.model_type == "bert":
        options["layer_norm_eps"] = config.layer_norm_eps
    return options


def encoder_weights(hf: Tensors, config: Any, rows: Tensor) -> Tensors:
    """The encoder's weights under fairseq's names; ``rows``: of which ids the dictionary is."""
    state = rename_modules(hf, layer_modules(config.num_hidden_layers))
    embeddings = [f"embeddings.{x}_embeddings.weight" for x in ("word", "position", "token_type")]
    missing = [name for name in embeddings if name not in hf]
    if missing:
        raise ValueError(f"the weights lack {', '.join(missing)}")
    words, positions, types = (hf[name] for name in embeddings)
    if config.model_type == "bert":
        state[f"{ENCODER}embed_types.weight"] = types
        unused = Dictionary().pad() + 1
    else:
        # Padding has a position of its own, before those of tokens; there is one type.
        positions = positions[first_position(config) - 1 :] + types[0]
        unused = Dictionary().pad()
    state[f"{ENCODER}embed_positions.weight"] = F.pad(positions, (0, 0, unused, 0))
    state[f"{ENCODER}embed_tokens.weight"] = words[rows]
    state[f"{ENCODER}version"] = torch.tensor([3.0])  # fairseq's mark of the current names
    return state


def lm_weights(hf: Tensors, family: Family, rows: Tensor) -> Tensors:
    """The MLM head's weights under fairseq's names, but the tied decoder's; {}: no tied head."""
    bias = hf.get(f"{family.lm_head}.bias", hf.get(f"{family.lm_head}.decoder.bias"))
    words = hf["embeddings.word_embeddings.weight"]
    if bias is None or not torch.equal(hf.get(f"{family.lm_head}.decoder.weight", words), words):
        return {}
    heads = {"dense": family.lm_dense, "layer_norm": family.lm_layer_norm}
    state = rename_modules(hf, {f"encoder.lm_head.{ours}": x for ours, x in heads.items()})
    state["encoder.lm_head.bias"] = bias[rows]
    return state


def head_weights(hf: Tensors, family: Family, model: Any, classes: Optional[int]) -> Tensors:
    """The classification head's weights under fairseq's names; registers it with the model.

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
    head.update(rename_modules(hf, {"dense": family.head_dense}))
    if output in hf and len(hf[output]) == classes:
        head.update(rename_modules(hf, {"out_proj": family.head_out}))
    return {f"classification_heads.{HEAD}.{name}": tensor for name, tensor in head.items()}


def write_labels(names: Dict[int, str], path: Path) -> None:
    """fairseq's label/dict.txt: the classes in their order.

    Raises:
        ValueError: two of them have one name.
    """
    labels = Dictionary()
    symbols = [" ".join(str(name).split()) for _, name in sorted(names.items())]
    if len(set(symbols)) < len(symbols):
        raise ValueError(
            f"config.json: id2label has a name twice, {', '.join(symbols)}; give each class its own"
        )
    for symbol in symbols:
        labels.add_symbol(symbol)
    path.parent.mkdir()
    labels.save(str(path))


def to_fairseq(
    source: Path, out: Path, num_classes: Optional[int] = None, text: Optional[Path] = None
) -> List[str]:
    """Convert a Hugging Face folder.

    Args:
        source: holds config.json, the weights and the vocabulary.
        out: folder to make.
        num_classes: size of a fresh output layer on BERT's pooler; None: as in the checkpoint.
        text: file whose lines both tokenizers encode, beside those of `sample_lines`.

    Returns:
        Lines to print: what was converted, and the options to go on with.

    Raises:
        ValueError, OSError, ImportError: what is wrong, in words. Then nothing is written.
    """
    config, hf, with_lm, with_head = read_source(source)
    keeps_head = with_head is not None and num_classes is None
    if keeps_head and config.problem_type == "multi_label_classification":
        raise ValueError(
            f"{source}: problem_type is multi_label_classification, a yes or no for every label; "
            "fairseq's head chooses one of them. --num-classes N gives a head without these outputs"
        )
    family = FAMILIES[config.model_type]
    vocabulary, size = load_vocabulary(source, config.model_type), config.vocab_size
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
    model.eval()

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
        copy_tokenizer(source, part)
        bpe = write_bpe(vocabulary, config.model_type, part)
        if keeps_head:
            write_labels(config.id2label, part / "label" / "dict.txt")

        side, lines = Side(family, with_mask, rows), sample_lines(vocabulary, text)
        files = {name: x if x is True else str(part / x) for name, x in bpe.items()}
        encoded = compare_tokens(side, vocabulary, build_bpe(BPE[family.arch], **files), lines)
        lm_head = (lambda x: model.encoder.lm_head(x)[..., rows.argsort()]) if lm else None
        compare_outputs(side, with_lm, model, lm_head, encoded)
        if with_head is not None and num_classes in (None, config.num_labels):
            compare_outputs(side, with_head, model, model.classification_heads[HEAD], encoded)

        record = DataRecord.of_folder(part)
        if keeps_head:
            record.head, record.classes = HEAD, config.num_labels
            if config.num_labels == 1:
                record.labels, record.regression = None, True
        history = {"criterion_name": "none", "optimizer_name": "none", "lr_scheduler_state": {}}
        checkpoint = {
            "args": args,  # not cfg: a Namespace is read by every version of fairseq
            "model": state,
            "optimizer_history": [{**history, "num_updates": 0}],
            "extra_state": {
                "train_iterator": {"epoch": 1, "iterations_in_epoch": 0},
                KEY: record.plain(),
            },
            "last_optimizer_state": None,
        }
        torch.save(checkpoint, str(part / "model.pt"))

    kept = "none" if not head else f"from {family.head_dense}"
    sizes = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    separator = "" if config.model_type == "bert" else " --separator-token 2"
    flags = {f"--{k.replace('_', '-')}": "" if x is True else f" {out}/{x}" for k, x in bpe.items()}
    both = all((source / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
    return [
        *(["weights read from model.safetensors, not from pytorch_model.bin"] if both else []),
        f"{source} -> {out}: {size} tokens, MLM head {'kept' if lm else 'fresh'}, "
        f"classification head {kept}; both sides agree on {len(lines)} lines",
        f"to encode text: --bpe {BPE[family.arch]} {' '.join(k + x for k, x in flags.items())}",
        "to fine-tune: fairseq-train DATA --user-dir deltasam_fairseq --task sentence_prediction "
        f"--init-token 0{separator} --finetune-from-model {out}/model.pt",
        f"    --arch {family.arch} {sizes}",
    ]
