"""Turn files of SQuAD's layout into the folder that the task span_prediction reads.

    python -m deltasam_fairseq.squad.prepare --train train-v1.1.json --valid dev-v1.1.json \\
        --out SQuAD-bin --dict roberta.base/dict.txt --bpe gpt2

SQuAD 1.1 and 2.0 (questions without an answer), or your own files of the same layout.  A context
that does not fit into --max-seq-length tokens together with its question becomes several windows
that overlap.  ``SQuAD-bin/`` then holds ``dict.txt``, ``task.json`` and, for each of train, valid
and test, the windows, where answers and contexts are in them, which characters every token
stands for, the contexts and the gold answers.

What is finished is skipped when the command is run again, unless its file or options have changed.
Splits that the command does not name stay as they are.
--dict and the files of the BPE may be URLs.  One that ends in #sha256=HEX is checked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

from deltasam_fairseq.data.binarize import processes
from deltasam_fairseq.data.encoding_options import add_encoding_options, encoding_of
from deltasam_fairseq.data.files import DataError
from deltasam_fairseq.data.programs import run_program
from deltasam_fairseq.options import ranged
from deltasam_fairseq.squad.windows import Layout
from deltasam_fairseq.squad.write_splits import split_of, write_splits


def prepare(args: argparse.Namespace) -> None:
    """Check all that is asked for, then write it."""
    files = {name: getattr(args, name) for name in ("train", "valid", "test")}
    if not any(files.values()):
        raise DataError("give --train, --valid or --test, a file of SQuAD's layout")
    separators = args.separators or (1 if args.bpe == "wordpiece" else 2)
    room = args.max_seq_length - args.max_query_length - separators - 2
    if room < args.doc_stride:
        raise DataError(
            f"--max-seq-length {args.max_seq_length}: with a question of --max-query-length "
            f"{args.max_query_length} a window has {room} tokens of the context, fewer than "
            f"--doc-stride {args.doc_stride}: some would be in no window; change one of them"
        )
    layout = Layout(args.max_seq_length, args.doc_stride, args.max_query_length, separators)
    encoding, bpe = encoding_of(args)
    splits = [
        split_of(name, source, args.out, layout, args.any_rows, bpe)
        for name, source in files.items()
        if source
    ]
    with processes(args.workers) as run:
        write_splits(splits, bpe, encoding, run)


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m deltasam_fairseq.squad.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--train", type=Path, metavar="JSON", help="file to train on")
    add("--valid", type=Path, metavar="JSON", help="file to validate on: SQuAD's dev file")
    add("--test", type=Path, metavar="JSON", help="file to predict, with answers or without")
    add("--out", type=Path, required=True, help="folder to write")
    positive = ranged(int, at_least=1)
    add("--max-seq-length", type=positive, default=384, help="tokens of a window (default: 384)")
    add("--doc-stride", type=positive, default=128, help="tokens between windows (default: 128)")
    add("--max-query-length", type=positive, default=64, help="tokens of a question (default: 64)")
    add(
        "--separators",
        type=int,
        choices=(1, 2),
        help="</s> between question and context: 1 as BERT, 2 as RoBERTa (default: by --bpe)",
    )
    add_encoding_options(options)
    add("--any-rows", action="store_true", help="take incomplete files, drop misplaced answers")
    return options


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Do what the command line says; return the exit code."""
    return run_program(parser(), prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
