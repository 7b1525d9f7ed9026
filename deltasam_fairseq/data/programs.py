"""Run the programs that prepare data or predict; load checkpoints for them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence

import torch

from deltasam_fairseq.checkpoints import (
    CheckpointDamagedError,
    CheckpointRefusedError,
    DataMismatchError,
    Loaded,
    load_on_data,
    require_same_tokens,
)
from deltasam_fairseq.data.files import DataError
from deltasam_fairseq.options import ranged

PACKAGE = "deltasam_fairseq."


def run_program(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], None],
    argv: Optional[Sequence[str]] = None,
) -> int:
    """Do ``work`` with the parsed options; return the exit code, 2 after a DataError.

    Args:
        argv: the command line without the program; default: that of the process.
    """
    args = parser.parse_args(argv)
    try:
        work(args)
    except DataError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def prediction_parser(module: str, description: str, items: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every program that predicts has.

    Args:
        module: as in ``python -m deltasam_fairseq.MODULE``.
        items: what a batch consists of.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, prepare = parser.add_argument, module.replace("predict", "prepare")
    add("--data", type=Path, required=True, help=f"folder made by {prepare}")
    add("--path", type=Path, nargs="+", required=True, help="fine-tuned checkpoints of that task")
    add("--out", type=Path, required=True, help="folder to write")
    add(
        "--batch-size",
        type=ranged(int, at_least=1),
        default=32,
        help=f"{items} at a time (default: 32)",
    )
    return parser


def load_and_check(
    args: argparse.Namespace, check: Callable[[Path, Any], None] = lambda path, cfg: None
) -> List[Loaded]:
    """Load the checkpoints of ``--path`` to predict the data of ``--data``.

    Args:
        check: compares one checkpoint with the data: its path, its configuration.

    Returns:
        models on the device, in evaluation mode, each with its configuration and task.

    Raises:
        DataError: a file is missing or no checkpoint of fairseq, or was trained on other data
            (`fit_to_data`), or ``check`` says so.
    """
    if args.out.exists() and not args.out.is_dir():
        raise DataError(f"--out {args.out}: is a file; give a folder")
    for path in args.path:
        if not path.is_file():
            raise DataError(f"--path {path}: no such file")
    names = [f"--path {path}" for path in args.path]
    found = [_load(path, args.data, check) for path in args.path]
    try:
        require_same_tokens([each.record for each in found], names)
    except DataMismatchError as error:
        raise DataError(str(error)) from error
    for each in found:
        each.model.eval()
        if torch.cuda.is_available():
            each.model.cuda()
    return found


def _load(path: Path, data: Path, check: Callable[[Path, Any], None]) -> Loaded:
    def check_state(state: Any) -> None:
        state["cfg"]["task"].get("data")
        check(path, state["cfg"])

    try:
        return load_on_data(
            str(path), str(data), f"--path {path}", check=check_state, same_preparation=True
        )
    except DataMismatchError as error:
        raise DataError(str(error)) from error
    except (CheckpointDamagedError, CheckpointRefusedError) as error:
        raise DataError(f"--path: {error}") from error  # names the file itself
    except (AttributeError, KeyError, TypeError) as error:  # of fairseq's, which expects its own
        raise DataError(
            f"--path {path}: no checkpoint of fairseq ({type(error).__name__}: {error}); give one "
            "that fairseq-train has written"
        ) from error
