"""Measure the sharpness of a checkpoint's minimum.

    python -m deltasam_fairseq.sharpness DATA --path checkpoint_best.pt --batch-size 32 \\
        --sam-rho-list 0.01 0.02 0.05 --delta-sam-beta 3 --per-instance \\
        --plot sharpness.png --json sharpness.json

Task, model and criterion come from the checkpoint. See docs/sharpness.md.
"""

import argparse
import ast
import json
import logging
import os
import random
import sys
from functools import partial
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch
from fairseq import utils
from fairseq.logging import progress_bar

from deltasam_fairseq.checkpoints import (
    CheckpointDamagedError,
    CheckpointRefusedError,
    DataMismatchError,
    load_on_data,
)
from deltasam_fairseq.options import UsageError, require
from deltasam_fairseq.sharpness.landscapes import Batch, ModelLandscapes, Sample, measure
from deltasam_fairseq.sharpness.options import check, get_parser
from deltasam_fairseq.sharpness.report import Report, as_dict, as_table, plot

logger = logging.getLogger("deltasam_fairseq.sharpness")


def _overrides(args: argparse.Namespace) -> Dict[str, Any]:
    try:
        overrides = ast.literal_eval(args.model_overrides)
    except (SyntaxError, ValueError):
        overrides = None
    require(
        isinstance(overrides, dict),
        "model-overrides",
        args.model_overrides,
        "must be a Python dict of plain values",
    )
    return {"data": args.data, **overrides}


def load(args: argparse.Namespace) -> Tuple[Any, Any, Any, Any]:
    """Load a checkpoint as fairseq-validate does.

    Returns:
        model, criterion, task, and the configuration of the run that wrote the checkpoint.

    Raises:
        UsageError: the checkpoint is damaged or refused, or was trained on other data.
    """
    overrides, name = _overrides(args), f"--path {args.path}"
    try:
        found = load_on_data(args.path, overrides.pop("data"), name, overrides, rescales=False)
    except DataMismatchError as e:
        raise UsageError(str(e)) from e
    except (CheckpointDamagedError, CheckpointRefusedError) as e:
        raise UsageError(f"--path: {e}") from e  # names the file itself
    criterion = found.task.build_criterion(found.cfg.criterion)
    if utils.has_parameters(criterion) and found.criterion is not None:
        criterion.load_state_dict(found.criterion)
    return found.model.float(), criterion.float(), found.task, found.cfg


def _subsets(data: str) -> List[str]:
    """Names of the splits in a data folder, as far as file names tell."""
    names: Set[str] = set()
    for folder, below, files in os.walk(utils.split_paths(data)[0]):
        if folder.count(os.sep) > data.rstrip(os.sep).count(os.sep):
            below.clear()
        names.update(f.split(".")[0] for f in files if f.endswith(".idx"))
    return sorted(names)


def _empty(args: argparse.Namespace) -> str:
    return (
        f"--valid-subset {args.valid_subset}: the split in {args.data} is empty; take another, "
        "or binarize it again"
    )


def _dataset(args: argparse.Namespace, task: Any, cfg: Any) -> Any:
    subset = args.valid_subset
    try:
        task.load_dataset(subset, combine=False, epoch=1, task_cfg=cfg.task)
        dataset = task.dataset(subset)
    except ValueError as e:
        if "empty file" not in str(e):
            raise
        raise UsageError(_empty(args)) from e
    except (KeyError, OSError, AssertionError) as e:
        raise UsageError(
            f"--valid-subset {subset}: not found in {args.data} ({e}); there are "
            f"{', '.join(_subsets(args.data)) or 'none'}"
        ) from e
    if not len(dataset):
        raise UsageError(_empty(args))
    return dataset


def _batches(
    args: argparse.Namespace, task: Any, model: Any, dataset: Any
) -> List[Tuple[int, Any]]:
    """The split's batches as fairseq makes them: (place in the split, dataset indices)."""
    iterator = task.get_batch_iterator(
        dataset=dataset,
        max_tokens=args.max_tokens,
        max_sentences=args.batch_size,
        max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
        ignore_invalid_inputs=args.skip_invalid_size_inputs_valid_test,
        seed=args.seed,
    )
    batches = list(enumerate(iterator.frozen_batches))
    require(
        bool(batches),
        "valid-subset",
        args.valid_subset,
        "no sentence of it is short enough for the model",
    )
    if args.max_batches is not None and args.max_batches < len(batches):
        # fairseq may order them by length: the first ones are no fair sample.
        batches = sorted(random.Random(args.seed).sample(batches, args.max_batches))
    return batches


def _on_device(sample: Sample, device: torch.device) -> Sample:
    return utils.move_to_cuda(sample, device) if device.type == "cuda" else sample


def _alone(dataset: Any, indices: Sequence[int], device: torch.device) -> Iterator[Sample]:
    for i in indices:
        yield _on_device(dataset.collater([dataset[i]]), device)


def _samples(batches: Any, dataset: Any, device: torch.device) -> Iterator[Batch]:
    for number, indices in batches:
        sample = _on_device(dataset.collater([dataset[i] for i in indices]), device)
        yield Batch(number, len(indices), sample, partial(_alone, dataset, indices, device))


def _describe(args: argparse.Namespace, landscapes: ModelLandscapes) -> Dict[str, Any]:
    criterion = type(landscapes.criterion).__name__
    note = ""
    unit, unit_note = "nats per sentence", "fairseq logs bits; token losses are summed"
    if getattr(landscapes.criterion, "regression_target", False):
        unit, unit_note = "squared error per sentence", ""
    if not landscapes.per_sentence:
        unit, unit_note = "the criterion's loss / sample_size", "nats where fairseq logs bits"
        note = (
            f"Only per-batch sharpness: criterion {criterion} gives no per-sentence losses. The "
            "reweighted and the per-instance figure need a method per_sentence_losses(model, "
            "sample) of the criterion (docs/sharpness.md)."
        )
    return {
        "checkpoint": args.path,
        "data": args.data,
        "subset": args.valid_subset,
        "criterion": criterion,
        "unit": unit,
        "unit_note": unit_note,
        "mode": "eval",
        "seed": args.seed,
        "batch_size": args.batch_size,
        "max_tokens": args.max_tokens,
        "note": note,
    }


def main(args: argparse.Namespace) -> Report:
    """Measure, and write what was asked for.

    Raises:
        UsageError: naming the option, its value, and what to do.
    """
    check(args)
    utils.import_user_module(args)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")

    logger.info("loading %s", args.path)
    model, criterion, task, cfg = load(args)
    dataset = _dataset(args, task, cfg)
    batches = _batches(args, task, model, dataset)
    landscapes = ModelLandscapes(model.to(device), criterion.to(device), args.seed)
    logger.info(
        "%d weights on %s, %d batches",
        sum(p.numel() for p in landscapes.parameters),
        device,
        len(batches),
    )
    radii: List[float] = []
    if args.plot:
        radius = args.plot_radius or 2 * max(args.sam_rho_list)
        radii = torch.linspace(-radius, radius, args.plot_points, dtype=torch.float64).tolist()

    figures = []
    # fairseq's bar counts what it iterates over; a batch's samples are made when it is reached.
    progress = progress_bar.progress_bar(
        batches,
        log_format=args.log_format,
        log_interval=args.log_interval,
        prefix=f"sharpness on '{args.valid_subset}'",
        default_log_format="tqdm",
    )
    found = measure(
        landscapes,
        _samples(progress, dataset, device),
        args.sam_rho_list,
        args.delta_sam_beta,
        args.seed,
        per_instance=args.per_instance and landscapes.per_sentence,
        radii=radii,
        random_directions=args.plot_directions,
    )
    for figure in found:
        figures.append(figure)
        progress.log({"loss": figure.loss.item(), "sharpness": figure.per_batch[-1].item()})

    report = Report(
        _describe(args, landscapes), args.sam_rho_list, args.delta_sam_beta, radii, figures
    )
    sys.stdout.write(as_table(report) + "\n")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(as_dict(report), f, indent=2, allow_nan=False)
            f.write("\n")
        logger.info("figures in %s", args.json)
    if args.plot:
        plot(report, args.plot)
        logger.info("plot in %s", args.plot)
    return report


def cli_main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point: errors of usage end with exit code 2 and without traceback."""
    parser = get_parser()
    args = parser.parse_args(argv)
    # stdout is for the table.
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=os.environ.get("LOGLEVEL", "INFO").upper(),
        stream=sys.stderr,
        force=True,
    )
    try:
        main(args)
    except UsageError as e:
        parser.error(str(e))


if __name__ == "__main__":
    cli_main()
