"""What the example programs share: reading the command line, and how a training logs and saves."""

from __future__ import annotations

import argparse
import sys
from typing import Callable, List, Optional, Sequence, Tuple

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
    positive: Sequence[str] = (),
) -> Tuple[argparse.Namespace, List[str]]:
    """Return the options of this process, and the words behind ``--``; exit if one is wrong.

    Args:
        check: returns what is wrong and what to do, or None.
        positive: options that, if given, must be at least 1.
    """
    words, extra = split_words(sys.argv[1:])
    args = parser.parse_args(words)
    small = [n for n in positive if getattr(args, n) is not None and getattr(args, n) < 1]
    wrong = check(args)
    if small:
        name = small[0]
        wrong = f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1"
    if wrong is not None:
        parser.exit(2, f"{parser.prog}: {wrong}\n")
    return args, extra
