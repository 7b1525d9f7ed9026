"""Convert RoBERTa and BERT checkpoints between Hugging Face and fairseq.

    PYTHONPATH=. python scripts/convert_checkpoint.py to-fairseq --from HF_FOLDER --out DIR
    PYTHONPATH=. python scripts/convert_checkpoint.py to-hf --from checkpoint_best.pt \\
        --data DATA --out DIR --tokenizer HF_FOLDER

``to-fairseq`` writes model.pt, dict.txt and the tokenizer's files, and prints the options to
fine-tune with.  ``to-hf`` writes a folder for AutoModelForSequenceClassification.  Nothing is
fetched; transformers is not needed; .safetensors files need the package safetensors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.roberta import RobertaModel
from omegaconf import OmegaConf
from torch import Tensor

from deltasam_fairseq.bpe import SPECIAL as BERT_SPECIAL
from deltasam_fairseq.bpe import read_vocabulary
from deltasam_fairseq.checkpoints import CheckpointDamagedError, CheckpointRefusedError
from deltasam_fairseq.models import BertModel

Tensors = Dict[str, Tensor]
UNREADABLE = (CheckpointDamagedError, CheckpointRefusedError)

MASK = "<mask>"
HEAD = "sentence_classification_head"  # fairseq's default --classification-head-name
ENCODER = "encoder.sentence_encoder."
ACTIVATIONS = {  # Hugging Face -> fairseq
    "gelu": "gelu",
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "relu": "relu",
}
# Modules of a layer with a weight and a bias each, fairseq -> Hugging Face.
LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# fairseq 0.12.2 keeps a layer's weights twice, and trains the others.
SECOND_COPY = re.compile(r"\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$")
TOKENIZER_FILES = (
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)


class Family(NamedTuple):
    """How Hugging Face names what differs between its models."""

    arch: str  # fairseq's
    special: Dict[str, str]  # special token -> fairseq's symbol
    token_types: int
    lm_dense: str
    lm_layer_norm: str
    lm_decoder: str  # its .weight, if not tied
    lm_bias: str  # the prefix of .bias; the decoder may hold it instead
    head_dense: str
    head_out: str


FAMILIES = {
    "bert": Family(
        arch="bert",
        special=BERT_SPECIAL,
        token_types=2,
        lm_dense="cls.predictions.transform.dense",
        lm_layer_norm="cls.predictions.transform.LayerNorm",
        lm_decoder="cls.predictions.decoder",
        lm_bias="cls.predictions",
        head_dense="pooler.dense",
        head_out="classifier",
    ),
    "roberta": Family(
        arch="roberta",
        special={symbol: symbol for symbol in BERT_SPECIAL.values()},
        token_types=1,
        lm_dense="lm_head.dense",
        lm_layer_norm="lm_head.layer_norm",
        lm_decoder="lm_head.decoder",
        lm_bias="lm_head",
        head_dense="classifier.dense",
        head_out="classifier.out_proj",
    ),
}
CONFIG = (  # what config.json must have
    *("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "max_position_embeddings", "hidden_act", "hidden_dropout_prob"),
    *("attention_probs_dropout_prob", "type_vocab_size", "layer_norm_eps", "pad_token_id"),
)
ARCHITECTURES = [
    *("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"),
    *("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification"),
]


# Files


@contextlib.contextmanager
def written(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` only when the block ends without an error.

    Raises:
        FileExistsError: ``out`` is there and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} exists already; give another one, or remove it")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        os.replace(str(part), str(out))
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def safetensors_torch() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("model.safetensors needs safetensors: pip install safetensors") from error
    return safetensors.torch


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


# Vocabulary


class Vocabulary(NamedTuple):
    """The tokens of a model by id, and the merges of its BPE in their order ("a b")."""

    tokens: Dict[int, str]
    merges: List[str]


def read_vocabulary_of(folder: Path, model_type: str) -> Vocabulary:
    """Read vocab.txt (BERT), vocab.json and merges.txt (RoBERTa), or else tokenizer.json.

    Raises:
        FileNotFoundError: none of them is there.
        ValueError: tokenizer.json is of another kind.
    """
    tokenizer = folder / "tokenizer.json"
    merges: List[str] = []
    if model_type == "bert" and (folder / "vocab.txt").is_file():
        tokens = dict(enumerate(read_vocabulary(folder / "vocab.txt")))
    elif model_type == "roberta" and all(
        (folder / f).is_file() for f in ("vocab.json", "merges.txt")
    ):
        tokens = {i: token for token, i in read_json(folder / "vocab.json").items()}
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    elif tokenizer.is_file():
        content = read_json(tokenizer)
        if not isinstance(content["model"]["vocab"], dict):
            raise ValueError(f"{tokenizer} is neither WordPiece nor BPE; no other is supported")
        tokens = {i: token for token, i in content["model"]["vocab"].items()}
        tokens.update((added["id"], added["content"]) for added in content["added_tokens"])
        pairs = content["model"].get("merges", [])
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    else:
        wanted = "vocab.txt" if model_type == "bert" else "vocab.json with merges.txt"
        raise FileNotFoundError(f"{folder} has neither {wanted} nor tokenizer.json")
    if (folder / "added_tokens.json").is_file():
        added = read_json(folder / "added_tokens.json")
        tokens.update((i, token) for token, i in added.items())
    return Vocabulary(tokens, merges)


def gpt2_ids(merges: List[str]) -> Dict[str, int]:
    """GPT-2's encoder.json from its merges: the 256 bytes, the merges, the end of text."""
    tokens = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)]
    return {token: i for i, token in enumerate([*tokens, "<|endoftext|>"])}


def fairseq_symbols(vocabulary: Vocabulary, family: Family, size: int) -> List[str]:
    """The symbol in fairseq's dict.txt of every row of a Hugging Face embedding.

    That is the token itself for BERT and, as in the official dict.txt, its GPT-2 id for RoBERTa.
    Rows without a token, or with one that no text can give, become "madeupword" and their number.

    Raises:
        ValueError: more tokens than rows, far fewer, or no special tokens.
    """
    tokens = vocabulary.tokens
    if max(tokens, default=-1) >= size or len(tokens) < size - 512:
        raise ValueError(
            f"the vocabulary has {len(tokens)} tokens with ids up to {max(tokens, default=-1)}, "
            f"the word embeddings {size} rows: they do not belong together"
        )
    missing = set(family.special) - set(tokens.values())
    if missing:
        raise ValueError(f"the vocabulary lacks {', '.join(sorted(missing))}")
    ids = gpt2_ids(vocabulary.merges) if vocabulary.merges else {}
    row_of = {token: row for row, token in sorted(tokens.items())}  # of twins the last counts
    symbols = []
    for row in range(size):
        token = tokens.get(row, "")
        symbol = family.special.get(token) or str(ids.get(token, token))
        special = symbol in family.special.values() and token not in family.special
        number = ids and token not in ids and token.isdigit()  # would be taken for GPT-2's id
        if special or number or row_of.get(token) != row or symbol.split() != [symbol]:
            symbol = f"madeupword{row:04d}"
        symbols.append(symbol)
    if len(set(symbols)) < size:
        raise ValueError("the vocabulary has words like madeupword0000 of its own, in other rows")
    return symbols


def dictionary_of(symbols: List[str]) -> Dictionary:
    """fairseq's dictionary: <s> <pad> </s> <unk>, then ``symbols`` in their order, <mask> last."""
    dictionary = Dictionary()
    special = {*dictionary.symbols, MASK}
    for i, symbol in enumerate(symbols):
        if symbol not in special:
            dictionary.add_symbol(symbol, n=len(symbols) - i)  # sorting by count changes nothing
    return dictionary


# Names of weights


def layers_of(layers: int) -> Dict[str, str]:
    """Modules with a weight and a bias that both encoders have, fairseq -> Hugging Face."""
    modules = {f"{ENCODER}layernorm_embedding": "embeddings.LayerNorm"}
    for i in range(layers):
        for ours, theirs in LAYER.items():
            modules[f"{ENCODER}layers.{i}.{ours}"] = f"encoder.layer.{i}.{theirs}"
    return modules


def renamed(tensors: Tensors, modules: Dict[str, str]) -> Tensors:
    """The weights and biases of modules, from their names (values) to new ones (keys).

    Raises:
        ValueError: one is missing.
    """
    pairs = {f"{a}.{x}": f"{b}.{x}" for a, b in modules.items() for x in ("weight", "bias")}
    missing = [name for name in pairs.values() if name not in tensors]
    if missing:
        raise ValueError(f"{len(missing)} weights are missing: {', '.join(missing[:3])} ...")
    return {new: tensors[old] for new, old in pairs.items()}


# Hugging Face -> fairseq


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


def first_position(config: Dict[str, Any]) -> int:
    """The row of the first token's position embedding: 0 in BERT, behind the padding in RoBERTa."""
    return int(config["pad_token_id"]) + 1 if config["model_type"] == "roberta" else 0


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


def copy_tokenizer(source: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


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

    with written(out) as part:
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


def load_exactly(model: Any, state: Tensors, complaint: str) -> None:
    """Load weights into a model, all of them and no others.

    Raises:
        ValueError: names or shapes differ; the text begins with ``complaint``.
    """
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{complaint}: {error}") from error


# fairseq -> Hugging Face


def read_dictionary(data: Path) -> Dictionary:
    """The dictionary of a sentence_prediction folder, or of a converted one, with <mask>."""
    for path in (data / "input0" / "dict.txt", data / "dict.txt"):
        if path.is_file():
            dictionary = Dictionary.load(str(path))
            dictionary.add_symbol(MASK)
            return dictionary
    raise FileNotFoundError(f"--data {data} has neither input0/dict.txt nor dict.txt")


def read_labels(data: Path, classes: int) -> List[str]:
    """The names of the classes in their order.

    Raises:
        FileNotFoundError, ValueError: label/dict.txt is not there, or has too few.
    """
    path = data / "label" / "dict.txt"
    if classes == 1 and not path.is_file():
        return ["LABEL_0"]  # regression has no labels
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; the {classes} labels are named there")
    labels = Dictionary.load(str(path))
    names = labels.symbols[labels.nspecial :]
    if len(names) < classes:
        raise ValueError(f"{path} has {len(names)} labels, the checkpoint {classes} classes")
    return names[:classes]


def read_model(checkpoint: Path, dictionary: Dictionary) -> Any:
    """The model of a fairseq checkpoint, with its classification heads.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither RoBERTa nor bert, a variant that Hugging Face does not have, or
            another dictionary.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint} does not exist")
    state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))
    cfg = state["cfg"]["model"]
    values = dict(cfg) if OmegaConf.is_config(cfg) else vars(cfg)
    args = argparse.Namespace(**{**values, "load_checkpoint_heads": True})
    arch = getattr(args, "arch", None) or args._name
    cls = ARCH_MODEL_REGISTRY.get(arch)
    if cls is None or not issubclass(cls, RobertaModel):
        raise ValueError(f"--arch {arch} cannot be exported; supported are roberta and bert")
    ARCH_CONFIG_REGISTRY[arch](args)
    if args.encoder_normalize_before or not args.layernorm_embedding:
        raise ValueError(f"--arch {arch}: layer norm comes first; Hugging Face's comes last")
    if args.activation_fn not in ACTIVATIONS.values() or args.pooler_activation_fn != "tanh":
        raise ValueError(
            f"--activation-fn {args.activation_fn} --pooler-activation-fn "
            f"{args.pooler_activation_fn}: supported are {set(ACTIVATIONS.values())} and tanh"
        )
    for name, tensor in state["model"].items():
        if name.endswith("embed_tokens.weight") and len(tensor) != len(dictionary):
            raise ValueError(
                f"{checkpoint} has {len(tensor)} words, dict.txt with <mask> {len(dictionary)}: "
                "give the --data that it was trained on"
            )
    model = cls.build_model(args, SimpleNamespace(source_dictionary=dictionary))
    weights = {name: x for name, x in state["model"].items() if not SECOND_COPY.search(name)}
    load_exactly(model, weights, str(checkpoint))
    return model


def classification_head(model: Any) -> Any:
    """The model's head, R4F's spectral norm folded into its weight.

    Raises:
        ValueError: none, or several and none with fairseq's default name.
    """
    heads = model.classification_heads
    name = HEAD if HEAD in heads or len(heads) != 1 else next(iter(heads))
    if name not in heads:
        raise ValueError(
            f"classification heads of the checkpoint: {list(heads)}; one, or {HEAD}, is needed"
        )
    if hasattr(heads[name].out_proj, "weight_orig"):
        torch.nn.utils.remove_spectral_norm(heads[name].out_proj)
    return heads[name]


def hf_config(model: Any, model_type: str, symbols: List[str], labels: List[str]) -> Dict[str, Any]:
    """config.json for a fairseq model whose words are ``symbols``, in the order of their ids."""
    args = model.args
    activation = {ours: theirs for theirs, ours in reversed(list(ACTIVATIONS.items()))}
    name = {"bert": "Bert", "roberta": "Roberta"}[model_type]
    config = {
        "architectures": [f"{name}ForSequenceClassification"],
        "model_type": model_type,
        "vocab_size": len(symbols),
        "num_hidden_layers": len(model.encoder.sentence_encoder.layers),
        "hidden_size": args.encoder_embed_dim,
        "intermediate_size": args.encoder_ffn_embed_dim,
        "num_attention_heads": args.encoder_attention_heads,
        "hidden_act": activation[args.activation_fn],
        "hidden_dropout_prob": args.dropout,
        "attention_probs_dropout_prob": args.attention_dropout,
        "classifier_dropout": args.pooler_dropout,
        "layer_norm_eps": args.layer_norm_eps if model_type == "bert" else 1e-5,
        "type_vocab_size": FAMILIES[model_type].token_types,
        "pad_token_id": symbols.index("<pad>"),
        "bos_token_id": symbols.index("<s>"),
        "eos_token_id": symbols.index("</s>"),
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "regression" if len(labels) == 1 else "single_label_classification",
    }
    config["max_position_embeddings"] = args.max_positions + first_position(config)
    return config


def hf_weights(model: Any, config: Dict[str, Any], rows: Tensor) -> Tensors:
    """The weights under Hugging Face's names; ``rows``: which word is which id."""
    family, head = FAMILIES[config["model_type"]], classification_head(model)
    state = model.state_dict()
    hf = renamed(state, {b: a for a, b in layers_of(config["num_hidden_layers"]).items()})
    hf["embeddings.word_embeddings.weight"] = state[f"{ENCODER}embed_tokens.weight"][rows]
    positions = state[f"{ENCODER}embed_positions.weight"][Dictionary().pad() + 1 :]
    unused = positions.new_zeros(first_position(config), positions.shape[1])
    hf["embeddings.position_embeddings.weight"] = torch.cat([unused, positions])
    types = state.get(f"{ENCODER}embed_types.weight", positions.new_zeros(1, positions.shape[1]))
    hf["embeddings.token_type_embeddings.weight"] = types
    names = {family.head_dense: "dense", family.head_out: "out_proj"}
    hf.update(renamed(head.state_dict(), names))
    body = ("embeddings.", "encoder.", "pooler.")
    prefix = config["model_type"]
    return {
        f"{prefix}.{name}" if name.startswith(body) else name: tensor.contiguous()
        for name, tensor in hf.items()
    }


def to_hf(checkpoint: Path, data: Path, out: Path, tokenizer: Optional[Path] = None) -> List[str]:
    """Export a fine-tuned RoBERTa or bert.

    Args:
        checkpoint: of fairseq, with a classification head.
        data: the folder that it was trained on: input0/dict.txt (or dict.txt), label/dict.txt.
        out: folder to make.
        tokenizer: the Hugging Face folder that the model once came from, or what to-fairseq made
            of it. Its files are copied, and ids are as there; without it they are fairseq's.

    Returns:
        Lines to print.

    Raises:
        ValueError, OSError, ImportError: what is wrong, in words. Then nothing is written.
    """
    dictionary = read_dictionary(data)
    model = read_model(checkpoint, dictionary)
    model_type = "bert" if isinstance(model, BertModel) else "roberta"
    symbols = list(dictionary.symbols)
    if tokenizer is not None:
        vocabulary = read_vocabulary_of(tokenizer, model_type)
        symbols = fairseq_symbols(vocabulary, FAMILIES[model_type], len(symbols))
        unknown = set(symbols) ^ set(dictionary.symbols)
        if unknown:
            raise ValueError(
                f"{tokenizer} and the dict.txt of {data} differ in {len(unknown)} words, as in "
                f"{sorted(unknown)[:3]}: give the tokenizer that the dict.txt was made from"
            )
    rows = torch.tensor([dictionary.index(symbol) for symbol in symbols])
    classes = classification_head(model).out_proj.out_features
    config = hf_config(model, model_type, symbols, read_labels(data, classes))
    weights = hf_weights(model, config, rows)
    save_file = safetensors_torch().save_file
    with written(out) as part:
        write_json(part / "config.json", config)
        save_file(weights, str(part / "model.safetensors"), metadata={"format": "pt"})
        if tokenizer is not None:
            copy_tokenizer(tokenizer, part)
    ids = f"ids and tokenizer of {tokenizer}" if tokenizer else "fairseq's ids, no tokenizer"
    return [f"{checkpoint} -> {out}: {config['architectures'][0]}, {classes} classes, {ids}"]


def main() -> None:
    """Convert, or say in one line why not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("to-fairseq", help="a Hugging Face folder -> model.pt, dict.txt")
    command.add_argument("--from", dest="source", type=Path, required=True, help="folder to read")
    command.add_argument("--out", type=Path, required=True, help="folder to make")
    command.add_argument(
        "--num-classes",
        type=int,
        help="make a head of BERT's pooler and a fresh output layer, at least 1; default: the "
        "head that the checkpoint has, or none",
    )
    command = commands.add_parser("to-hf", help="a fine-tuned checkpoint -> a Hugging Face folder")
    command.add_argument("--from", dest="source", type=Path, required=True, help="checkpoint (.pt)")
    command.add_argument("--data", type=Path, required=True, help="data that it was trained on")
    command.add_argument("--out", type=Path, required=True, help="folder to make")
    command.add_argument("--tokenizer", type=Path, help="folder with the tokenizer's files")
    args = parser.parse_args()
    torch.manual_seed(1)  # of layers that the checkpoint does not have
    try:
        if args.command == "to-fairseq":
            lines = to_fairseq(args.source, args.out, args.num_classes)
        else:
            lines = to_hf(args.source, args.data, args.out, args.tokenizer)
    except (ValueError, OSError, ImportError, *UNREADABLE) as error:
        parser.error(str(error))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
