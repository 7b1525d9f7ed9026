"""Choose the checkpoints of a folder to average."""

import argparse
import logging
import math
import os
import re
from typing import Dict, List, Optional, Tuple

from fairseq.file_io import PathManager

from deltasam_fairseq.average.mean import read
from deltasam_fairseq.options import UsageError, check_range

logger = logging.getLogger("deltasam_fairseq.average")

_EPOCH = re.compile(r"checkpoint(\d+)\.pt")
_UPDATE = re.compile(r"checkpoint_\d+_(\d+)\.pt")
# Also what --keep-best-checkpoints keeps under names with the metric in them.
_ANY = re.compile(r"checkpoint(\d+|_\d+_\d+|\.best_.+)\.pt")


def _numbered(folder: str, pattern: "re.Pattern[str]", up_to: Optional[int]) -> List[str]:
    """Files of a folder by the number in their names, rising."""
    found = []
    for name in PathManager.ls(folder):
        match = pattern.fullmatch(name)
        if match is not None and (up_to is None or int(match.group(1)) <= up_to):
            found.append((int(match.group(1)), os.path.join(folder, name)))
    return [path for _, path in sorted(found)]


def _score(path: str) -> Tuple[float, int, bool]:
    """Validation metric of a checkpoint, number of its updates, whether more is better.

    The metric is NaN where the file was saved without validation.
    """
    state = read(path)
    metric = state.get("extra_state", {}).get("val_loss")
    metric = math.nan if metric is None else metric
    cfg = state.get("cfg")
    if cfg is not None:
        maximize = cfg["checkpoint"]["maximize_best_checkpoint_metric"]
    else:
        maximize = getattr(state.get("args"), "maximize_best_checkpoint_metric", False)
    history = state.get("optimizer_history") or [{}]
    return float(metric), history[-1].get("num_updates", 0), bool(maximize)


def _best(folder: str, n: int) -> List[str]:
    """The ``n`` best files of a folder, of equal ones the later; by number of updates, rising.

    Raises:
        UsageError: no file has a metric.
    """
    paths = sorted(
        os.path.join(folder, name) for name in PathManager.ls(folder) if _ANY.fullmatch(name)
    )
    # The key is the number of updates: a file may stand there under two names.
    ranked: Dict[int, Tuple[float, float, str]] = {}
    for path in paths:
        metric, updates, maximize = _score(path)
        if math.isnan(metric):
            logger.info(f"{path}: skipped, saved without validation or with NaN as its metric")
            continue
        ranked[updates] = (metric if maximize else -metric, metric, path)
    if paths and not ranked:
        raise UsageError(
            f"--best {n}: no checkpoint in {folder} has a validation metric; use --last-epochs or "
            "--last-updates instead"
        )
    chosen = sorted(ranked, key=lambda updates: (ranked[updates][0], updates))[-n:]
    if len(chosen) == n:
        for updates in sorted(chosen):
            _, metric, path = ranked[updates]
            logger.info(f"{path}: metric {metric:g} after {updates} updates")
    return [ranked[updates][2] for updates in sorted(chosen)]


def select_checkpoints(args: argparse.Namespace) -> List[str]:
    """Return the files to average, the newest last.

    Raises:
        UsageError: options that do not go together, or too few files.
    """
    options = {
        "--last-epochs": args.last_epochs,
        "--last-updates": args.last_updates,
        "--best": args.best,
    }
    given = {option: n for option, n in options.items() if n is not None}
    folder = args.inputs[0]
    if not given:
        for path in args.inputs:
            if not PathManager.isfile(path):
                raise UsageError(
                    f"{path}: not a file; for a folder give --last-epochs N, --last-updates N or "
                    "--best N"
                )
        if args.up_to is not None:
            raise UsageError(f"--up-to {args.up_to}: give --last-epochs or --last-updates with it")
        return list(args.inputs)
    ((option, n),) = given.items()
    check_range(option[2:], n, at_least=1)
    if len(args.inputs) > 1 or not os.path.isdir(folder):
        raise UsageError(f"{option} {n}: give one folder of checkpoints, not {args.inputs}")
    if option == "--best":
        if args.up_to is not None:
            raise UsageError(f"--up-to {args.up_to}: has no meaning with --best; omit it")
        paths = _best(folder, n)
    else:
        pattern = _EPOCH if option == "--last-epochs" else _UPDATE
        paths = _numbered(folder, pattern, args.up_to)[-n:]
    if len(paths) < n:
        raise UsageError(f"{option} {n}: {folder} has {len(paths)} such checkpoints")
    return paths
