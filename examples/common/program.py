"""Read the command line of an example program; options to log and save a training."""

from __future__ import annotations

import argparse
import sys
from typing import Callable, List, Optional, Tuple

from examples.common.stage import split_words

TO_FAIRSEQ = "What follows -- goes to fairseq-train as it is."
# No thread that reads ahead: the cores are for the runs, and collating is short.
LOGGED = (
    *("--num-workers", 0, "--data-buffer-size", 0, "--save-dir", "{out}"),
    *("--log-format", "json", "--log-interval", 25, "--log-file", "{out}/train.log"),
)


def read_arguments(
    parser: argparse.ArgumentParser,
    check: Callable[[argparse.Namespace], Optional[str]],
) -> Tuple[argparse.Namespace, List[str]]:
    """Return the options of this process, and the words behind ``--``; exit if one is wrong.

    Args:
        check: returns what is wrong and what to do, or None.
    """
    words, extra = split_words(sys.argv[1:])
    args = parser.parse_args(words)
    wrong = check(args)
    if wrong is not None:
        parser.exit(2, f"{parser.prog}: {wrong}\n")
    return args, extra
