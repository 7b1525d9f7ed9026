"""Turn GLUE's TSV files, or your own, into the folder that fairseq's sentence_prediction reads.

    python -m deltasam_fairseq.glue.prepare --glue-dir GLUE --task CoLA --out CoLA-bin \\
        --dict roberta.base/dict.txt --bpe gpt2

``CoLA-bin/`` then holds ``input0/``, ``input1/`` (tasks of sentence pairs) and ``label/``, each
with its ``dict.txt`` and the datasets ``train`` and ``valid`` (MNLI: also ``valid1``, the
mismatched part).  If there is a ``test.tsv``, its sentences become the dataset ``test`` without
labels (MNLI: also ``test1``) and its ids ``id/test.txt``.  ``task.json`` tells a program that
predicts what it needs: the labels by class number, and the scale of a score (STS-B: 5; the data has
score / scale, so score = scale * prediction).

Several tasks (--task CoLA RTE, or --task all) go to OUT/CoLA-bin, OUT/RTE-bin.  What is finished is
skipped when the command is run again, unless its files or options have changed.

To choose hyperparameters without a look at dev.tsv, --hold-out 0.2 takes a fifth of train.tsv's
rows, always the same ones, as ``valid`` and the rest as ``train``.

For experiments, --train-rows 1000 keeps some rows of train.tsv and --label-noise 0.4 replaces
labels in it, each by one of the other classes with equal probability, before any rows are held
out; dev.tsv stays as it is.  label/train.replaced.tsv lists the replaced ones, and the splits
``kept`` and ``replaced`` are the rows of ``train`` with right and with wrong labels: named in
--valid-subset of fairseq-train they show when wrong labels are learnt.  With --hold-out the rows of
dev.tsv are then there too, clean, as ``dev``.

Your own data: GLUE/NAME/train.tsv, dev.tsv and, if you like, test.tsv, with
``--task NAME --columns SENTENCE[,SENTENCE2] LABEL``.  Columns are named (the files have a header
line) or numbered from 1: for sentence<TAB>label it is ``--columns 1 2``.  Whether files of
numbered columns have a header line is seen by their content, that of test.tsv for itself, or said
by --header for all.  Labels are any text, without the blanks around them; --regression is for
scores.

--dict and the files of the BPE may be URLs.  One that ends in #sha256=HEX is checked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Dict, Optional, Sequence

from deltasam_fairseq.data.binarize import processes
from deltasam_fairseq.data.encoding_options import add_encoding_options, encoding_of
from deltasam_fairseq.data.files import DataError
from deltasam_fairseq.data.programs import run_program
from deltasam_fairseq.glue.tasks import GLUE, TASKS, Task, own_task
from deltasam_fairseq.glue.write_splits import Changes, check_splits, splits_of, write_task
from deltasam_fairseq.options import ranged


def tasks_of(args: argparse.Namespace) -> Dict[str, Task]:
    """Return the tasks that the options name."""
    names = list(GLUE) if args.task == ["all"] else list(dict.fromkeys(args.task))
    own = [name for name in names if name not in TASKS]
    if own and not args.columns:
        raise DataError(
            f"--task {own[0]}: GLUE has {', '.join(GLUE)}; for data of your own give --columns"
        )
    if not own and (args.columns or args.regression or args.header):
        raise DataError("--columns, --regression, --header: only for data of your own, see --task")
    scale = args.regression or 0.0
    more = (args.columns, scale, args.header)
    return {
        name: TASKS[name] if name in TASKS else own_task(args.glue_dir, name, *more)
        for name in names
    }


def prepare(args: argparse.Namespace) -> None:
    """Check all that is asked for, then write it."""
    tasks = tasks_of(args)
    encoding, bpe = encoding_of(args)
    changes = Changes(args.train_rows, args.label_noise, args.noise_seed)
    plan = []
    for name, task in tasks.items():
        out = args.out if len(tasks) == 1 else args.out / f"{name}-bin"
        options = (args.hold_out, changes)
        plan.append(list(splits_of(args.glue_dir, name, task, out, bpe, *options)))
    for splits in plan:
        check_splits(splits, args.any_rows)
    with processes(args.workers) as run:
        for splits in plan:
            write_task(splits, bpe, encoding, run, args.any_rows)


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m deltasam_fairseq.glue.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, share = options.add_argument, ranged(float, above=0, below=1)
    add("--glue-dir", type=Path, required=True, help="folder with a folder for each task")
    add("--task", nargs="+", required=True, help=f"all, or of {', '.join(TASKS)}, or your own")
    add("--out", type=Path, required=True, help="folder to write; of several tasks: their parent")
    add("--columns", nargs=2, metavar=("SENTENCE[,SENTENCE2]", "LABEL"), help="of your own task")
    add(
        "--header",
        choices=("yes", "no"),
        help="whether files of numbered columns begin with a header line (default: by content)",
    )
    add(
        "--regression",
        nargs="?",
        type=ranged(float, above=0),
        const=1.0,
        metavar="SCALE",
        help="your own task's labels are scores, to be divided by SCALE (default: 1)",
    )
    add_encoding_options(options)
    add(
        "--hold-out",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of train.tsv's rows to validate with instead of dev.tsv, above 0, below 1",
    )
    add(
        "--train-rows",
        type=ranged(int, at_least=1),
        default=0,
        metavar="N",
        help="for experiments: keep N rows of train.tsv, drawn by --noise-seed (default: all)",
    )
    add(
        "--label-noise",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="for experiments: share of train.tsv's labels to replace by another class",
    )
    add("--noise-seed", type=int, default=1, help="of --train-rows, --label-noise (default: 1)")
    add("--any-rows", action="store_true", help="take files that lack rows, or have more")
    return options


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Do what the command line says; return the exit code."""
    return run_program(parser(), prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
