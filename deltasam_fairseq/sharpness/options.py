"""Options of ``python -m deltasam_fairseq.sharpness``, and the checks that need no model."""

import argparse
import os

from fairseq import utils
from fairseq.file_io import PathManager

from deltasam_fairseq.options import UsageError, check_range, require

# Smallest values.
_LEAST = {
    "batch_size": 1,
    "max_tokens": 1,
    "max_batches": 1,
    "log_interval": 1,
    "plot_points": 2,
    "plot_directions": 0,
}


def get_parser() -> argparse.ArgumentParser:
    """The command's options, named as fairseq's where fairseq has them."""
    parser = argparse.ArgumentParser(
        prog="python -m deltasam_fairseq.sharpness",
        description="Sharpness of a checkpoint on a split: how much the loss rises at distance "
        "rho from the weights, along SAM's ascent direction (per-batch), along delta-SAM's "
        "(reweighted) and, with --per-instance, along every sentence's own gradient. The model "
        "is in eval mode (no dropout) and in float32. Losses are in nats per sentence, where "
        "fairseq logs bits. Task, model and criterion come from the checkpoint.",
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="binarized data, as for fairseq-train")
    add("--path", required=True, metavar="FILE", help="checkpoint to measure")
    add("--valid-subset", default="valid", metavar="SPLIT", help="split to measure on")

    group = parser.add_argument_group("sharpness")
    add = group.add_argument
    add(
        "--sam-rho-list",
        type=float,
        nargs="+",
        default=[0.01, 0.02, 0.05],
        metavar="RHO",
        help="radii, L2 norm in weight space, each above 0 (default: 0.01 0.02 0.05)",
    )
    add(
        "--delta-sam-beta",
        type=float,
        default=3.0,
        metavar="BETA",
        help="strength of delta-SAM's reweighting, at least 0 (default: 3; 0: the reweighted "
        "figure is the per-batch one)",
    )
    add(
        "--per-instance",
        action="store_true",
        help="also the paper's per-instance sharpness (Eq. 2), exact and slow: a backward pass "
        "for every sentence",
    )
    add(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="of delta-SAM's probe, of the random directions, and of the choice of batches",
    )

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--batch-size", type=int, metavar="N", help="sentences in a batch; sharpness depends on it")
    add("--max-tokens", type=int, metavar="N", help="tokens in a batch")
    add(
        "--max-batches",
        type=int,
        metavar="N",
        help="measure N batches, drawn at random by --seed (default: all)",
    )
    add(
        "--skip-invalid-size-inputs-valid-test",
        action="store_true",
        help="drop sentences that are too long for the model",
    )

    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--json", metavar="FILE", help="write all figures to FILE")
    add(
        "--plot",
        metavar="FILE",
        help="draw the loss along ascent and random directions to FILE (.png, .pdf, .svg); "
        "needs matplotlib",
    )
    add(
        "--plot-radius",
        type=float,
        metavar="R",
        help="the plot goes from -R to R (default: twice the largest rho)",
    )
    add(
        "--plot-points",
        type=int,
        default=21,
        metavar="N",
        help="points on each line (default: 21), a forward pass each a batch",
    )
    add(
        "--plot-directions", type=int, default=5, metavar="K", help="random directions (default: 5)"
    )
    add("--log-format", choices=["json", "none", "simple", "tqdm"], help="of the progress")
    add("--log-interval", type=int, default=10, metavar="N", help="batches between two lines")

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--cpu", action="store_true", help="do not use CUDA")
    add("--user-dir", metavar="DIR", help="your own plugin, if the checkpoint was trained with one")
    add(
        "--model-overrides",
        default="{}",
        metavar="DICT",
        help="options of the checkpoint to replace, such as \"{'bpe': None}\"",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Check everything that can be checked before a model is loaded.

    Raises:
        UsageError: naming the option, its value, what is allowed and what to do.
    """
    for rho in args.sam_rho_list:
        check_range("sam-rho-list", rho, "such as 0.01 0.02 0.05", above=0)
    check_range("delta-sam-beta", args.delta_sam_beta, "such as 3", at_least=0)
    for option, least in _LEAST.items():
        if getattr(args, option) is not None:
            check_range(option, getattr(args, option), at_least=least)
    if args.plot_radius is not None:
        check_range("plot-radius", args.plot_radius, "such as 0.1", above=0)
    if args.batch_size is None and args.max_tokens is None:
        raise UsageError(
            "--batch-size is missing: give the batch size of training (or --max-tokens), for "
            "per-batch and reweighted sharpness depend on it"
        )
    require(
        PathManager.isfile(args.path),
        "path",
        args.path,
        "is not a file; give the path of a checkpoint (checkpoint_best.pt)",
    )
    data = utils.split_paths(args.data)[0]
    if not os.path.exists(data):
        raise UsageError(f"DATA {data} does not exist; give the folder of the binarized data")
    for option in ("json", "plot"):
        folder = os.path.dirname(os.path.abspath(getattr(args, option) or ""))
        require(
            os.path.isdir(folder),
            option,
            getattr(args, option),
            f"directory {folder} does not exist; create it first",
        )
    if args.plot:
        require(
            args.plot.lower().endswith((".png", ".pdf", ".svg")),
            "plot",
            args.plot,
            "the name must end in .png, .pdf or .svg",
        )
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UsageError(
                f"--plot {args.plot}: matplotlib is not installed; run pip install matplotlib "
                "(or install deltasam_fairseq with its extra, [report]), or omit --plot"
            ) from None
