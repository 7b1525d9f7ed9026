"""The numbers of the quick start, all in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, NamedTuple

import yaml

# --- the built-in case: text, a small RoBERTa, and a task made from the text ----------
HELD_OUT = {"train": 4000, "dev": 1000}  # sentences of the task, kept from pretraining
SWAPS = 3  # pairs of neighbouring words exchanged in a disturbed sentence
NOISE = 0.3  # share of the training labels that are wrong
VOCABULARY = 2000  # sentencepiece pieces

SMALL_ROBERTA = [
    *("--arch", "roberta_base", "--max-positions", "256"),
    *("--encoder-layers", "2", "--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "256"),
    *("--encoder-attention-heads", "8"),
]
ADAM = ["--adam-betas", "(0.9, 0.98)", "--adam-eps", "1e-06"]

# One short sentence a block, many masks and no dropout: what lets so small a model learn the order
# of words in so few updates.  With several sentences a block it does for some seeds only.
PRETRAINING = [
    *("--task", "masked_lm", "--criterion", "masked_lm", "--mask-prob", "0.3"),
    *("--sample-break-mode", "complete_doc", "--tokens-per-sample", "32", "--max-tokens", "1024"),
    *SMALL_ROBERTA,
    *("--dropout", "0", "--attention-dropout", "0"),
    *("--optimizer", "adam", *ADAM, "--weight-decay", "0.01", "--clip-norm", "1"),
    *("--lr-scheduler", "polynomial_decay", "--lr", "0.005", "--warmup-updates", "200"),
    *("--total-num-update", "2000", "--max-update", "2000"),
    *("--disable-validation", "--no-epoch-checkpoints", "--no-save-optimizer-state"),
]


# --- fine-tuning ----------------------------------------------------------------------
class Recipe(NamedTuple):
    """Hyperparameters of fine-tuning; every one can be set on the command line."""

    lr: float
    batch_size: int
    epochs: int
    weight_decay: float
    rho: float
    beta: float
    warmup: float = 0.06  # share of all updates
    dropout: float = 0.1  # of attention too


SMALL_RECIPE = Recipe(lr=1e-3, batch_size=32, epochs=4, weight_decay=0.01, rho=0.05, beta=3)
# With wrong labels: long enough to learn them by heart, and a rho that keeps the model from it;
# no dropout, as in pretraining.
NOISY_RECIPE = SMALL_RECIPE._replace(epochs=8, rho=0.1, dropout=0.0)

# fairseq's hyperparameters for RoBERTa large on GLUE; rho and beta of the delta-SAM paper.
RECIPES: Dict[str, Recipe] = {
    "CoLA": Recipe(1e-5, 16, 10, 0.1, 0.02, 20),
    "MNLI": Recipe(1e-5, 32, 10, 0.1, 0.02, 3),
    "MRPC": Recipe(1e-5, 16, 10, 0.1, 0.02, 5),
    "QNLI": Recipe(1e-5, 32, 10, 0.1, 0.02, 3),
    "QQP": Recipe(1e-5, 32, 10, 0.1, 0.02, 3),
    "RTE": Recipe(2e-5, 16, 10, 0.1, 0.02, 5),
    "SST-2": Recipe(1e-5, 32, 10, 0.1, 0.05, 3),
    "STS-B": Recipe(2e-5, 16, 10, 0.1, 0.01, 10),
}

PLAIN = "sentence_prediction"
REGULARISERS = Path(__file__).resolve().parents[1] / "glue" / "config" / "regulariser"


def criterion_options(criterion: str, task: str) -> List[str]:
    """Return what a criterion is given beside its name: the papers' values, as examples/glue has
    them, by task where they depend on it; those of RTE for a task that has none."""
    if criterion == PLAIN:
        return []
    names = (f"{criterion}_{task}", criterion, f"{criterion}_RTE")
    path = next(p for p in (REGULARISERS / f"{name}.yaml" for name in names) if p.is_file())
    options = yaml.safe_load(path.read_text(encoding="utf-8"))["criterion"]
    del options["_name"]
    return [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]


CRITERIONS = (PLAIN, "r3f", "r_drop", "freelb", "smart", "vat")


class Metric(NamedTuple):
    """A task's metric: a key of fairseq's log, and the flag that makes it appear."""

    name: str
    flags: List[str]


ACCURACY = Metric("accuracy", [])
F1 = Metric("acc_and_f1", ["--report-acc-and-f1"])
METRICS: Dict[str, Metric] = {
    "CoLA": Metric("mcc", ["--report-mcc"]),
    "MRPC": F1,
    "QQP": F1,
    "STS-B": Metric(
        "pearson_and_spearman", ["--report-pearson-and-spearman", "--regression-target"]
    ),
}
