"""fairseq -> Hugging Face."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.roberta import RobertaModel
from omegaconf import OmegaConf
from torch import Tensor

from deltasam_fairseq.checkpoints.data_record import DataRecord
from deltasam_fairseq.checkpoints.fit_to_data import fit_to_data
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
    rename_modules,
)
from deltasam_fairseq.convert.vocabulary import (
    BPE,
    Vocabulary,
    copy_tokenizer,
    fairseq_symbols,
    load_vocabulary,
    write_bpe,
)
from deltasam_fairseq.data.binarize import build_bpe
from deltasam_fairseq.models import BertModel
from deltasam_fairseq.sts.folder import TASK as SENTENCE_EMBEDDING

# fairseq 0.12.2 keeps a layer's weights twice, and trains the others.
SECOND_COPY = re.compile(r"\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$")


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


def read_scale(data: Path) -> float:
    """What a prediction of a score has to be multiplied by; 1 without glue.prepare's record."""
    path = data / "task.json"
    if not path.is_file():
        return 1.0
    return float(json.loads(path.read_text(encoding="utf-8"))["scale"] or 1.0)


def check_special_tokens(trained: DataRecord, family: Family) -> None:
    """Raise a ValueError for a model that was trained on other special tokens than transformers'.

    Args:
        trained: of the checkpoint; one that was not trained on a classification task passes.
        family: whose tokenizer is to go with the model.
    """
    if trained.tokens is None:
        return
    wanted: Dict[str, Optional[int]] = {"--init-token": Dictionary().bos()}
    if trained.sentences == 2:
        wanted["--separator-token"] = Dictionary().eos() if family.separators == 2 else None
    for (option, right), found in zip(wanted.items(), trained.tokens):
        used, needed = (f"no {option}" if x is None else f"{option} {x}" for x in (found, right))
        if found != right:
            raise ValueError(
                f"the model was trained with {used}, Hugging Face's tokenizer does the same as "
                f"{needed}: it would read other tokens there, and predict worse. Train it with "
                f"{needed}, or export it without --tokenizer and give it its own tokens"
            )


def check_case(vocabulary: Vocabulary, data: Path) -> None:
    """Raise a ValueError if the data was lower-cased and the tokenizer does not, or the reverse."""
    path = data / "task.json"
    bpe = json.loads(path.read_text(encoding="utf-8")).get("bpe") if path.is_file() else None
    if bpe and bpe["name"] == "wordpiece":
        cased = bool(bpe["options"].get("wordpiece_cased"))
        if cased != vocabulary.cased:
            kind = "lower-casing" if cased else "cased"
            raise ValueError(
                f"--data {data} was made with{'' if cased else 'out'} --wordpiece-cased, "
                f"--tokenizer is a {kind} one: give the one that the data was made with"
            )


def read_model(checkpoint: Path, data: Path, dictionary: Dictionary) -> Tuple[Any, DataRecord]:
    """The model of a fairseq checkpoint, with its heads, and what it was trained on.

    Labels in another order than the data's and scores on another scale are mapped to the data's.

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
    trained = fit_to_data(state, DataRecord.of_folder(data), f"--from {checkpoint}")
    model = cls.build_model(args, SimpleNamespace(source_dictionary=dictionary))
    weights = {name: x for name, x in state["model"].items() if not SECOND_COPY.search(name)}
    load_exactly(model, weights, str(checkpoint))
    return model.eval(), trained


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


def hf_config(model: Any, model_type: str, symbols: List[str], labels: Optional[List[str]]) -> Any:
    """transformers' config of a fairseq model with ``symbols`` in the order of their ids.

    Args:
        labels: names of the classes; None: there is no head.
    """
    args, head = model.args, {}
    if labels is not None:
        head = {
            "classifier_dropout": args.pooler_dropout,
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "regression" if len(labels) == 1 else "single_label_classification",
        }
    activation = {ours: theirs for theirs, ours in reversed(list(ACTIVATIONS.items()))}
    config = import_transformers().AutoConfig.for_model(
        model_type,
        vocab_size=len(symbols),
        num_hidden_layers=len(model.encoder.sentence_encoder.layers),
        hidden_size=args.encoder_embed_dim,
        intermediate_size=args.encoder_ffn_embed_dim,
        num_attention_heads=args.encoder_attention_heads,
        hidden_act=activation[args.activation_fn],
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.attention_dropout,
        layer_norm_eps=args.layer_norm_eps if model_type == "bert" else 1e-5,
        type_vocab_size=FAMILIES[model_type].token_types,
        pad_token_id=symbols.index("<pad>"),
        bos_token_id=symbols.index("<s>"),
        eos_token_id=symbols.index("</s>"),
        **head,
    )
    config.max_position_embeddings = args.max_positions + first_position(config)
    return config


def hf_weights(model: Any, config: Any, rows: Tensor, head: Any) -> Tensors:
    """The weights under Hugging Face's names.

    Args:
        rows: which word is which id.
        head: None: those of the encoder alone.
    """
    family = FAMILIES[config.model_type]
    state = model.state_dict()
    hf = rename_modules(state, {b: a for a, b in layer_modules(config.num_hidden_layers).items()})
    hf["embeddings.word_embeddings.weight"] = state[f"{ENCODER}embed_tokens.weight"][rows]
    unused = max(first_position(config) - 1, 0)  # RoBERTa: the row before a token's is padding's
    size = config.max_position_embeddings - unused
    positions = F.pad(state[f"{ENCODER}embed_positions.weight"][-size:], (0, 0, unused, 0))
    hf["embeddings.position_embeddings.weight"] = positions
    types = state.get(f"{ENCODER}embed_types.weight", positions.new_zeros(1, positions.shape[1]))
    hf["embeddings.token_type_embeddings.weight"] = types
    if head is None:
        return hf
    names = {family.head_dense: "dense", family.head_out: "out_proj"}
    hf.update(rename_modules(head.state_dict(), names))
    body = ("embeddings.", "encoder.", "pooler.")
    prefix = config.model_type
    return {f"{prefix}.{x}" if x.startswith(body) else x: tensor for x, tensor in hf.items()}


def random_rows(dictionary: Dictionary) -> List[List[int]]:
    """Rows of token numbers for a comparison without a tokenizer: ``<s> ... </s>``."""
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(dictionary.nspecial, len(dictionary), (16, 12), generator=draw)
    return [[dictionary.bos(), *row, dictionary.eos()] for row in words.tolist()]


def to_hf(
    checkpoint: Path,
    data: Path,
    out: Path,
    tokenizer: Optional[Path] = None,
    text: Optional[Path] = None,
) -> List[str]:
    """Export a fine-tuned RoBERTa or bert.

    Args:
        checkpoint: of fairseq, with a classification head, or of --task sentence_embedding: of
            that, the encoder alone is exported.
        data: the folder that it was trained on: input0/dict.txt (or dict.txt), label/dict.txt.
        out: folder to make.
        tokenizer: the Hugging Face folder that the model once came from, or what to-fairseq made
            of it. Its files are copied, and ids are as there; without it they are fairseq's.
        text: file whose lines both tokenizers encode, beside those of `sample_lines`.

    Returns:
        Lines to print.

    Raises:
        ValueError, OSError, ImportError: what is wrong, in words. Then nothing is written.
    """
    transformers = import_transformers()
    dictionary = read_dictionary(data)
    model, trained = read_model(checkpoint, data, dictionary)
    model_type = "bert" if isinstance(model, BertModel) else "roberta"
    family, symbols = FAMILIES[model_type], list(dictionary.symbols)
    if tokenizer is not None:
        check_special_tokens(trained, family)
        vocabulary = load_vocabulary(tokenizer, model_type)
        check_case(vocabulary, data)
        symbols = fairseq_symbols(vocabulary, family, len(symbols))
        unknown = set(symbols) ^ set(dictionary.symbols)
        if unknown:
            raise ValueError(
                f"{tokenizer} and the dict.txt of {data} differ in {len(unknown)} words, as in "
                f"{sorted(unknown)[:3]}: give the tokenizer that the dict.txt was made from"
            )
    rows = torch.tensor([dictionary.index(symbol) for symbol in symbols])
    head, labels, scale = None, None, 1.0
    if trained.task != SENTENCE_EMBEDDING:
        head = classification_head(model)
        labels = read_labels(data, head.out_proj.out_features)
        scale = read_scale(data) if len(labels) == 1 else 1.0
    config = hf_config(model, model_type, symbols, labels)
    weights = hf_weights(model, config, rows, head)
    if head is None:
        exported = transformers.AutoModel.from_config(config, add_pooling_layer=False).eval()
    else:
        for name in ("weight", "bias"):
            weights[f"{family.head_out}.{name}"] = weights[f"{family.head_out}.{name}"] * scale
        exported = getattr(transformers, family.with_head)(config).eval()
    load_exactly(exported, weights, str(checkpoint))

    side, encoded = Side(family, dictionary, rows.argsort()), random_rows(dictionary)
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            bpe = write_bpe(vocabulary, model_type, Path(folder))
            files = {name: x if x is True else f"{folder}/{x}" for name, x in bpe.items()}
            lines = sample_lines(vocabulary, text)
            encoded = compare_tokens(side, vocabulary, build_bpe(BPE[model_type], **files), lines)
    logits = None if head is None else lambda features: scale * head(features)
    compare_outputs(side, exported, model, logits, encoded)
    with atomic_output_dir(out) as part:
        exported.save_pretrained(str(part))
        if tokenizer is not None:
            copy_tokenizer(tokenizer, part)
    scaled = f", scores times {scale:g} as in the data's TSV" if scale != 1 else ""
    ids = f"ids and tokenizer of {tokenizer}" if tokenizer else "fairseq's ids, no tokenizer"
    what = "encoder alone" if labels is None else f"{family.with_head}, {len(labels)} classes"
    return [f"{checkpoint} -> {out}: {what}, {ids}{scaled}"]
