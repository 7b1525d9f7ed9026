"""Time of an update with every criterion and optimizer, side by side in one run.

    python -m scripts.benchmark.criterion_cost CoLA-bin --finetune-from-model model.pt \\
        --batch-size 16 --arch roberta_base --max-positions 512 --num-classes 2

All arguments but those below are fairseq-train's.  Every pair has a trainer of its own; they make
one update each in turn, over and over, on the same batches, so that other work on the machine slows
all of them.  Printed: the median time of an update, and its ratio to the plain criterion's with the
same optimizer.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
from typing import Any, Dict, List, Sequence

import torch
from fairseq.logging import metrics

import deltasam_fairseq
from deltasam_fairseq.markdown import markdown_table
from scripts.benchmark.measure import Seconds, time_in_turn
from scripts.benchmark.methods import Sample, build_trainer

PLAIN = "sentence_prediction"
CRITERIONS = (PLAIN, "r_drop", "r3f", "freelb", "smart", "vat")
OPTIMIZERS = ("adam", "sam_adam", "delta_sam_adam")


def build(criterion: str, optimizer: str, argv: Sequence[str]) -> Any:
    """Return a trainer as fairseq-train makes it."""
    words = [*argv, "--task", "sentence_prediction", "--criterion", criterion]
    words += ["--optimizer", optimizer, "--max-update", "1000", "--init-token", "0"]
    words += ["--user-dir", deltasam_fairseq.__path__[0], "--save-dir", tempfile.gettempdir()]
    return build_trainer([*words, *([] if torch.cuda.is_available() else ["--cpu"])])


def batches(trainer: Any, count: int) -> List[List[Sample]]:
    """Return the first batches of the training set, each as the micro-batch of an update."""
    trainer.task.load_dataset("train")
    dataset, size = trainer.task.dataset("train"), trainer.cfg.dataset.batch_size or 16
    return [
        [dataset.collater([dataset[i] for i in range(at * size, (at + 1) * size)])]
        for at in range(min(count, len(dataset) // size))
    ]


def time_trainers(
    trainers: Dict[str, Any], samples: Sequence[List[Sample]], rounds: int
) -> Seconds:
    """Return the seconds of every trainer's updates, see `time_in_turn`."""
    for trainer in trainers.values():
        trainer.reset_dummy_batch(samples[0][0])
    updates = {name: trainer.train_step for name, trainer in trainers.items()}
    return time_in_turn(updates, samples, rounds, "cuda" if trainer.cuda else "cpu")


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark.criterion_cost",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=15, help="updates of each pair (default: 15)")
    parser.add_argument("--criterions", nargs="+", default=list(CRITERIONS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    args, argv = parser.parse_known_args()
    logging.disable(logging.INFO)
    criterions = dict.fromkeys([PLAIN, *args.criterions])
    with metrics.aggregate(new_root=True):
        trainers = {
            f"{criterion} {optimizer}": build(criterion, optimizer, argv)
            for criterion, optimizer in itertools.product(criterions, args.optimizers)
        }
        samples = batches(next(iter(trainers.values())), args.rounds)
        found = time_trainers(trainers, samples, args.rounds)
    ms = {pair: 1000 * statistics.median(seconds["wall"]) for pair, seconds in found.items()}
    rows = []
    for criterion in criterions:
        pairs = [(ms[f"{criterion} {o}"], ms[f"{PLAIN} {o}"]) for o in args.optimizers]
        rows.append([criterion, *(f"{taken:.0f} ({taken / plain:.2f})" for taken, plain in pairs)])
    print(markdown_table(["criterion", *(f"{o}, ms (ratio)" for o in args.optimizers)], rows))


if __name__ == "__main__":
    main()
