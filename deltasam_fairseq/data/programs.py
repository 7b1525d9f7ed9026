"""What the programs that prepare data or predict share: running them, loading checkpoints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from fairseq import checkpoint_utils

from deltasam_fairseq.checkpoints import CheckpointDamagedError, CheckpointRefusedError
from deltasam_fairseq.data.files import DataError
from deltasam_fairseq.data.splits import read_record, without_paths
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
        print(f"{parser.prog.rpartition(PACKAGE)[2]}: {error}", file=sys.stderr)
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
    args: argparse.Namespace,
    record: Dict[str, Any],
    check: Callable[[Path, Any, Path], None],
) -> Tuple[List[Any], Any, Any]:
    """Load the checkpoints of ``--path`` to predict the data of ``--data``.

    Args:
        record: of the data.
        check: compares one checkpoint with the data: its path, its configuration, and the folder of
            the data that it was trained on, which may be gone.

    Returns:
        models on the device, in evaluation mode; configuration and task of the first.

    Raises:
        DataError: a file is missing or no checkpoint of fairseq, or was trained on data of another
            encoding, or ``check`` says so.
    """
    if args.out.exists() and not args.out.is_dir():
        raise DataError(f"--out {args.out}: is a file; give a folder")
    for path in args.path:
        cfg = _configuration(path)
        origin = Path(cfg["task"].get("data") or "")
        check(path, cfg, origin)
        made = read_record(origin)
        for key in ("bpe", "separators"):
            if made and without_paths(made.get(key)) != without_paths(record.get(key)):
                raise DataError(
                    f"--path {path}: trained on data of another {key}, --data {args.data} does not "
                    f"go with it; prepare it with what {origin} was made with"
                )
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(path) for path in args.path], arg_overrides={"data": str(args.data)}
    )
    for model in models:
        model.eval()
        if torch.cuda.is_available():
            model.cuda()
    return models, cfg, task


def _configuration(path: Path) -> Any:
    """Return the configuration in a checkpoint; its ``task`` is there."""
    if not path.is_file():
        raise DataError(f"--path {path}: no such file")
    try:
        cfg = checkpoint_utils.load_checkpoint_to_cpu(str(path))["cfg"]
        cfg["task"].get("data")
    except (CheckpointDamagedError, CheckpointRefusedError) as error:
        raise DataError(f"--path: {error}") from error  # names the file itself
    except (AttributeError, KeyError, TypeError) as error:  # of fairseq's, which expects its own
        raise DataError(
            f"--path {path}: no checkpoint of fairseq ({type(error).__name__}: {error}); give one "
            "that fairseq-train has written"
        ) from error
    return cfg
