"""Names, families of models and files for both directions of convert."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, NamedTuple

from torch import Tensor

from deltasam_fairseq.bpe import SPECIAL as BERT_SPECIAL

Tensors = Dict[str, Tensor]
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


class Family(NamedTuple):
    """How Hugging Face names what differs between its models."""

    arch: str  # fairseq's
    special: Dict[str, str]  # special token -> fairseq's symbol
    separators: int  # </s> between the sentences of a pair
    token_types: int
    with_lm: str  # class of transformers with the MLM head (and BERT's pooler)
    with_head: str
    lm_dense: str
    lm_layer_norm: str
    lm_head: str  # the prefix of .bias and .decoder
    head_dense: str
    head_out: str


FAMILIES = {
    "bert": Family(
        arch="bert",
        special=BERT_SPECIAL,
        separators=1,
        token_types=2,
        with_lm="BertForPreTraining",
        with_head="BertForSequenceClassification",
        lm_dense="cls.predictions.transform.dense",
        lm_layer_norm="cls.predictions.transform.LayerNorm",
        lm_head="cls.predictions",
        head_dense="pooler.dense",
        head_out="classifier",
    ),
    "roberta": Family(
        arch="roberta",
        special={symbol: symbol for symbol in BERT_SPECIAL.values()},
        separators=2,
        token_types=1,
        with_lm="RobertaForMaskedLM",
        with_head="RobertaForSequenceClassification",
        lm_dense="lm_head.dense",
        lm_layer_norm="lm_head.layer_norm",
        lm_head="lm_head",
        head_dense="classifier.dense",
        head_out="classifier.out_proj",
    ),
}


def import_transformers() -> Any:
    """transformers, without its reports and progress bars.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"python -m deltasam_fairseq.convert needs transformers ({error}): "
            "pip install transformers"
        ) from error
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    return transformers


@contextlib.contextmanager
def atomic_output_dir(out: Path) -> Iterator[Path]:
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


def layer_modules(layers: int) -> Dict[str, str]:
    """Modules with a weight and a bias that both encoders have, fairseq -> Hugging Face."""
    modules = {f"{ENCODER}layernorm_embedding": "embeddings.LayerNorm"}
    for i in range(layers):
        for ours, theirs in LAYER.items():
            modules[f"{ENCODER}layers.{i}.{ours}"] = f"encoder.layer.{i}.{theirs}"
    return modules


def rename_modules(tensors: Tensors, modules: Dict[str, str]) -> Tensors:
    """The weights and biases of modules, from their names (values) to new ones (keys).

    Raises:
        ValueError: one is missing.
    """
    pairs = {f"{a}.{x}": f"{b}.{x}" for a, b in modules.items() for x in ("weight", "bias")}
    missing = [name for name in pairs.values() if name not in tensors]
    if missing:
        raise ValueError(f"{len(missing)} weights are missing: {', '.join(missing[:3])} ...")
    return {new: tensors[old] for new, old in pairs.items()}


def first_position(config: Any) -> int:
    """The row of the first token's position embedding: 0 in BERT, behind the padding in RoBERTa."""
    return int(config.pad_token_id) + 1 if config.model_type == "roberta" else 0


def load_exactly(model: Any, state: Tensors, complaint: str) -> None:
    """Load weights into a model, all of them and no others.

    Raises:
        ValueError: names or shapes differ; the text begins with ``complaint``.
    """
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{complaint}: {error}") from error
