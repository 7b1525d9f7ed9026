"""Measure what cheaper ascents cost, and what is left of the ascent, side by side in one run.

    python -m scripts.benchmark.ascent_quality RTE-bin --finetune-from-model model.pt \\
        --batch-size 32 --arch roberta_base --max-positions 512 --num-classes 2 --lr 1e-5

All arguments but those below are fairseq-train's. Every way has a trainer of its own, all start
from the same weights (after some updates of Adam), and they make one update each in turn, on the
same batches. Printed: processor time of an update (on a GPU, the time), relative to Adam's; and
the rise of the loss of the *whole* batch at ``w + eps*``, relative to that of SAM with all
sentences and weights, without dropout.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from typing import Any, Dict, List, Sequence

import torch
from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from fairseq.logging import metrics

from deltasam_fairseq.core import RngReplay
from deltasam_fairseq.markdown import markdown_table
from scripts.benchmark.criterion_cost import PLAIN, batches, build, time_trainers
from scripts.benchmark.methods import Sample

SAM, DELTA_SAM = "sam_adam", "delta_sam_adam"
QUARTER = ["--sam-ascent-fraction", "0.25"]
HALF = ["--sam-ascent-fraction", "0.5"]
NORMS = ["--sam-only", "layer_norm"]
EVERY = ["--sam-every", "5"]

WAYS: Dict[str, List[str]] = {
    "Adam": [SAM, "--sam-rho", "0"],  # with the step that SAM's has
    "SAM": [SAM],
    "SAM, half of the sentences": [SAM, *HALF],
    "SAM, a quarter of the sentences": [SAM, *QUARTER],
    "SAM, every 5th update": [SAM, *EVERY],
    "SAM, layer normalisations only": [SAM, *NORMS],
    "SAM, a quarter, layer normalisations": [SAM, *QUARTER, *NORMS],
    "delta-SAM": [DELTA_SAM],
    "delta-SAM, half of the sentences": [DELTA_SAM, *HALF],
    "delta-SAM, a quarter of the sentences": [DELTA_SAM, *QUARTER],
    "delta-SAM, every 5th update": [DELTA_SAM, *EVERY],
    "delta-SAM, layer normalisations only": [DELTA_SAM, *NORMS],
}


@torch.no_grad()
def loss(trainer: Any, sample: Dict[str, Any]) -> float:
    """Mean loss of all sentences, in nats."""
    total, n, _ = trainer.get_criterion()(trainer.get_model(), sample)
    return float(total) / n


def rise(trainer: Any, samples: Sequence[List[Sample]]) -> float:
    """Mean rise of the batch's loss from ``w`` to ``w + eps*``."""
    _ = trainer.optimizer  # built on first use
    ascent_step, found = trainer._ascent_step, []
    for (sample,) in samples:
        prepared = [trainer._prepare_sample(sample)]
        before = loss(trainer, prepared[0][0])
        ascent_step.run(prepared, RngReplay(trainer._set_seed, host=False), 1.0)
        try:
            found.append(loss(trainer, prepared[0][0]) - before)
        finally:
            ascent_step._sam.restore()
    return statistics.mean(found)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark.ascent_quality",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=20, help="updates of each way (default: 20)")
    parser.add_argument("--warm", type=int, default=50, help="updates of Adam first (default: 50)")
    args, argv = parser.parse_known_args()
    logging.disable(logging.INFO)
    with metrics.aggregate(new_root=True):
        first = build(PLAIN, "adam", argv)
        if first.cfg.checkpoint.finetune_from_model:
            state = load_checkpoint_to_cpu(first.cfg.checkpoint.finetune_from_model)["model"]
            first.get_model().upgrade_state_dict(state)
            first.get_model().load_state_dict(state, strict=False)
        samples = batches(first, max(args.warm, args.rounds))
        for number in range(args.warm):
            first.train_step(samples[number % len(samples)])
        start = {k: v.clone() for k, v in first.get_model().state_dict().items()}
        calm = [*argv, "--dropout", "0", "--attention-dropout", "0", "--pooler-dropout", "0"]
        rises, trainers = {}, {}
        for way, (optimizer, *options) in WAYS.items():
            if way != "Adam":
                still = build(PLAIN, optimizer, [*calm, *options])
                still.get_model().load_state_dict(start)
                rises[way] = rise(still, samples[:10])
            trainers[way] = build(PLAIN, optimizer, [*argv, *options])
            trainers[way].get_model().load_state_dict(start)
        found = time_trainers(trainers, samples, args.rounds)
    clock = "wall" if first.cuda else "cpu"  # other work does not add to the processor's time
    times = {way: statistics.mean(seconds[clock]) for way, seconds in found.items()}
    rows = []
    for way, seconds in times.items():
        left = f"{rises[way] / rises['SAM']:.2f}" if way in rises else "-"
        rows.append([way, f"{1000 * seconds:.0f}", f"{seconds / times['Adam']:.2f}", left])
    header = ["", "processor ms an update", "/ Adam", "rise of the loss / SAM's"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
