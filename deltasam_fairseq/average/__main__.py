"""Average the checkpoints of a run after the fact.

    python -m deltasam_fairseq.average checkpoints/ --last-epochs 5 --output average.pt
    python -m deltasam_fairseq.average checkpoints/ --best 3 --output average.pt
    python -m deltasam_fairseq.average checkpoint3.pt checkpoint_4_2000.pt --output average.pt

The result is an ordinary checkpoint, for fairseq-validate, fairseq-generate, from_pretrained and
--finetune-from-model. See docs/swa.md.
"""

import argparse
import logging
import os
import sys
from typing import Optional, Sequence

import torch
from fairseq.file_io import PathManager

from deltasam_fairseq.average.mean import average
from deltasam_fairseq.average.selection import select_checkpoints
from deltasam_fairseq.options import UsageError

logger = logging.getLogger("deltasam_fairseq.average")


def get_parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m deltasam_fairseq.average", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("inputs", nargs="+", help="checkpoint files; or one folder, and which of its files")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--last-epochs", type=int, metavar="N", help="the last N of checkpoint<epoch>.pt"
    )
    which.add_argument(
        "--last-updates", type=int, metavar="N", help="the last N of checkpoint_<epoch>_<update>.pt"
    )
    which.add_argument(
        "--best",
        type=int,
        metavar="N",
        help="the N with the best validation metric, of all files of epochs and updates and those "
        "of --keep-best-checkpoints; the metric is the run's --best-checkpoint-metric",
    )
    add("--up-to", type=int, metavar="M", help="of --last-*: none after epoch or update M")
    add(
        "--raw",
        action="store_true",
        help="of runs with --lr-scheduler swa_*: the weights themselves, not their averages",
    )
    add("--output", required=True, metavar="FILE", help="checkpoint to write")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Average and write; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = get_parser()
    args = parser.parse_args(argv)
    try:
        folder = os.path.dirname(os.path.abspath(args.output))
        if not os.path.isdir(folder):
            raise UsageError(
                f"--output {args.output}: directory {folder} does not exist; create it first"
            )
        if os.path.isdir(args.output):
            raise UsageError(f"--output {args.output}: is a folder; name a file in it")
        paths = select_checkpoints(args)
        state = average(paths, args.raw)
    except UsageError as e:
        parser.exit(2, f"{parser.prog}: {e}\n")
    partial = args.output + ".tmp"
    with PathManager.open(partial, "wb") as f:
        torch.save(state, f)
    os.replace(partial, args.output)
    logger.info(f"{args.output}: average of {len(paths)} checkpoints")
    for path in paths:
        logger.info(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
