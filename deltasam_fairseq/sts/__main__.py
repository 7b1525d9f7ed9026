"""Measure sentence embeddings: Spearman's correlation on semantic textual similarity.

    python -m deltasam_fairseq.sts --sts STS --data sts-bin --path checkpoint_best.pt
    python -m deltasam_fairseq.sts --sts STS --data sts-bin --path roberta.base/model.pt \\
        --pooling cls

``STS/`` has SentEval's folders ``STS12-en-test`` to ``STS16-en-test``, ``STSBenchmark`` and
``SICK``; what is not there is not in the average, and the output says so.  The score of a set
is Spearman's correlation of cosines and scores, times 100, over all scored pairs of all files of
the set together (STS13 without SMT, STS-B test, SICK-R test).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Optional, Sequence

from deltasam_fairseq.data.files import DataError, atomic_write
from deltasam_fairseq.data.programs import run_program
from deltasam_fairseq.markdown import markdown_table
from deltasam_fairseq.options import ranged
from deltasam_fairseq.sts.datasets import SETS, available, read_set
from deltasam_fairseq.sts.embeddings import POOLINGS
from deltasam_fairseq.sts.evaluation import as_rows, load_model, mean_of
from deltasam_fairseq.sts.task import EVALUATION_LENGTH


def evaluate(args: argparse.Namespace) -> None:
    """Measure and print; write the JSON file if one is asked for."""
    if not args.sts.is_dir():
        raise DataError(f"--sts {args.sts}: no such folder; give the one that the sets are in")
    names = args.sets or available(args.sts)
    if not names:
        raise DataError(
            f"--sts {args.sts}: no folder such as STSBenchmark or STS16-en-test there; give the "
            "folder that they are in"
        )
    pairs = {name: read_set(args.sts, name, args.any_rows) for name in dict.fromkeys(names)}
    model = load_model(args.path, args.data, args.pooling)
    positions = model.task.max_positions()
    if args.max_length > positions:
        raise DataError(f"--max-length {args.max_length}: the model has {positions} positions")
    model = model._replace(max_length=args.max_length, batch_size=args.batch_size)
    scores = {name: model.score(pairs[name]) for name in pairs}
    print(markdown_table(["set", "Spearman x 100"], as_rows(scores)))
    print(mean_of(scores, args.sets or SETS))
    if args.json is not None:
        found = {"pooling": model.pooling, "max_length": model.max_length, "spearman": scores}
        atomic_write(args.json, json.dumps(found, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m deltasam_fairseq.sts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, positive = options.add_argument, ranged(int, at_least=1)
    add("--sts", type=Path, required=True, help="folder of the sets")
    add("--data", type=Path, required=True, help="folder made by sts.prepare: dict.txt and BPE")
    add("--path", type=Path, required=True, help="checkpoint of RoBERTa or BERT")
    add("--sets", nargs="+", choices=SETS, metavar="SET", help=f"of {', '.join(SETS)}")
    add("--pooling", choices=POOLINGS, help="what an embedding is (default: as in training)")
    add(
        "--max-length",
        type=ranged(int, at_least=3),
        default=EVALUATION_LENGTH,
        help=f"tokens of a sentence (default: {EVALUATION_LENGTH})",
    )
    add("--batch-size", type=positive, default=128, help="sentences at a time (default: 128)")
    add("--json", type=Path, metavar="FILE", help="write the scores there too")
    add("--any-rows", action="store_true", help="take sets with other rows than published")
    return options


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Do what the command line says; return the exit code."""
    return run_program(parser(), evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
