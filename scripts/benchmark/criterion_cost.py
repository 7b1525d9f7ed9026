"""Time of an update with every criterion and optimizer, side by side in one run.

    python -m scripts.benchmark.criterion_cost CoLA-bin --finetune-from-model model.pt \\
        --batch-size 16 --arch roberta_base --max-positions 512 --num-classes 2

All arguments but those below are fairseq-train's.  Every pair has a trainer of its own; they make
one update each in turn, over and over, on the same batches, so that what else the machine does
meets all of them.  Printed: the median time of an update, and its ratio to the plain criterion's
with the same optimizer.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import time
from typing import Any, Dict, List, Sequence, Tuple

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics

import deltasam_fairseq
from deltasam_fairseq import SharpnessAwareTrainer

PLAIN = "sentence_prediction"
CRITERIONS = (PLAIN, "r_drop", "r3f", "freelb", "smart", "vat")
OPTIMIZERS = ("adam", "sam_adam", "delta_sam_adam")


def build(criterion: str, optimizer: str, argv: Sequence[str]) -> Any:
    """Return a trainer as fairseq-train makes it."""
    parser = options.get_training_parser()
    words = [*argv, "--task", "sentence_prediction", "--criterion", criterion]
    words += ["--optimizer", optimizer, "--max-update", "1000", "--init-token", "0"]
    words += ["--user-dir", deltasam_fairseq.__path__[0], "--save-dir", tempfile.gettempdir()]
    words += [] if torch.cuda.is_available() else ["--cpu"]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, words))
    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    model, built = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    trainer = SharpnessAwareTrainer(cfg, task, model, built)
    task.load_dataset("train")
    return trainer


def batches(trainer: Any, count: int) -> List[Dict[str, Any]]:
    """Return the first batches of the training set."""
    dataset = trainer.task.dataset("train")
    size = trainer.cfg.dataset.batch_size or 16
    found = [
        dataset.collater([dataset[i] for i in range(at * size, (at + 1) * size)])
        for at in range(min(count, len(dataset) // size))
    ]
    trainer.reset_dummy_batch(found[0])
    return found


def seconds(trainer: Any, sample: Dict[str, Any]) -> float:
    """Return the time of one update, with what the device still had to do."""
    begin = time.perf_counter()
    trainer.train_step([sample])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(trainers: Dict[Tuple[str, str], Any], rounds: int) -> Dict[Tuple[str, str], float]:
    """Return the median time of an update of each trainer; the first round is warm-up."""
    samples = batches(next(iter(trainers.values())), rounds + 1)
    times: Dict[Tuple[str, str], List[float]] = {pair: [] for pair in trainers}
    for number in range(rounds + 1):
        for pair, trainer in trainers.items():
            took = seconds(trainer, samples[number % len(samples)])
            if number:
                times[pair].append(took)
    return {pair: statistics.median(found) for pair, found in times.items()}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, help="updates of each pair (default: 15)")
    parser.add_argument("--criterions", nargs="+", default=list(CRITERIONS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    args, argv = parser.parse_known_args()
    logging.disable(logging.INFO)
    pairs = list(itertools.product(dict.fromkeys([PLAIN, *args.criterions]), args.optimizers))
    with metrics.aggregate(new_root=True):
        trainers = {pair: build(*pair, argv) for pair in pairs}
        times = measure(trainers, args.rounds)
    print("| criterion | " + " | ".join(f"{o}, ms (ratio)" for o in args.optimizers) + " |")
    print("|---" * (len(args.optimizers) + 1) + "|")
    for criterion in dict.fromkeys(criterion for criterion, _ in pairs):
        cells = [
            f"{1000 * times[criterion, o]:.0f} ({times[criterion, o] / times[PLAIN, o]:.2f})"
            for o in args.optimizers
        ]
        print(f"| {criterion} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
