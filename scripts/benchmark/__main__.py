"""Measure what SAM and delta-SAM cost: updates of every method side by side, in one run.

    python -m scripts.benchmark --shape base --out benchmark
    python -m scripts.benchmark --shape base --device cuda --precision fp16 --out benchmark-fp16
    python -m scripts.benchmark --sweep --processes 1 2 4 --out sweep

All methods train the same RoBERTa with a classification head on the same random sentences.  They
make one update each in turn, so that other work on the machine slows all of them.  A ratio is the
median over rounds of the ratio within a round, its spread half the distance between quartiles.
delta-SAM / SAM is compared with two estimates from the same rounds: the floor of the passes, made
of forwards and backwards alone, which a true ratio may lie below because both methods do more than
passes; and SAM's own update with delta-SAM's forwards without graph added.  OUT gets
benchmark.json and benchmark.md, rewritten after each comparison; ``--trace`` adds torch's profiler
traces.

Other SAMs: one of a dozen lines of torch; pytorch_optimizer's, if it is installed; davda54's, with
``--davda54 FILE``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from deltasam_fairseq.options import ranged
from scripts.benchmark.measure import measure
from scripts.benchmark.methods import (
    DAVDA54,
    OTHER_SAMS,
    OURS,
    PRECISIONS,
    SHAPES,
    MethodUnavailable,
    Setting,
)
from scripts.benchmark.report import add_figures, machine, write_report

DEFAULT = ("Adam", "SAM", "delta-SAM", "delta-SAM, two forwards", *OTHER_SAMS)


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m scripts.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, positive = options.add_argument, ranged(int, at_least=1)
    gpu = torch.cuda.is_available()
    add("--shape", choices=list(SHAPES), default="base" if gpu else "small", help="of RoBERTa")
    add("--batch-size", type=positive, default=16, help="sentences of a micro-batch (default: 16)")
    add("--length", type=positive, default=64, help="tokens of a sentence (default: 64)")
    add("--update-freq", type=positive, nargs="+", default=[1], help="micro-batches of an update")
    add("--precision", choices=list(PRECISIONS), nargs="+", default=["fp32"])
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    add("--threads", type=positive, help="of the processor (default: all cores)")
    names = ", ".join(map(repr, (*OURS, *OTHER_SAMS)))
    add(
        "--methods",
        nargs="+",
        choices=(*OURS, *OTHER_SAMS),
        default=list(DEFAULT),
        metavar="METHOD",
        help=f"of {names}; ratios are to the first (default: 1 to 3, two forwards, the last 3)",
    )
    add("--processes", type=positive, nargs="+", default=[1], help="data-parallel processes")
    add("--rounds", type=positive, default=10, help="updates of each method (default: 10)")
    add(
        "--phase-rounds",
        type=ranged(int, at_least=0),
        default=3,
        help="updates for the phases, 0: none (default: 3)",
    )
    add("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    add("--davda54", type=Path, help=f"sam.py of github.com/davda54/sam, for {DAVDA54!r}")
    add("--trace", action="store_true", help="write the profiler's trace of each method too")
    add("--sweep", action="store_true", help="several sizes, batches and lengths, plotted")
    add("--sweep-shapes", nargs="+", choices=list(SHAPES), default=["small", "base"])
    add("--out", type=Path, required=True, help="folder for what is written")
    return options


def refusal(args: argparse.Namespace) -> str:
    """Return what is wrong with the options and what to do, or nothing."""
    most, cuda = max(args.processes), args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        return "--device cuda: torch sees no GPU; use --device cpu"
    if cuda and most > torch.cuda.device_count():
        found = torch.cuda.device_count()
        return f"--processes {most}: each needs a GPU, torch sees {found}; use at most {found}"
    if not cuda and "amp" in args.precision:
        return (
            "--precision amp: on a CPU fairseq's autocast is off, all would be float32; "
            "use bf16, or --device cuda"
        )
    if args.methods[0] not in OURS:
        return (
            f"--methods {args.methods[0]}: the first, to which ratios are taken, has to be "
            "one of this package's, such as Adam"
        )
    if args.trace and most > 1:
        return f"--trace --processes {most}: one process is traced; use --processes 1"
    if args.sweep and args.processes[0] != 1:
        return (
            f"--sweep --processes {args.processes[0]}: sizes are swept in one process; "
            "let --processes begin with 1"
        )
    for option, values in (("--update-freq", args.update_freq), ("--precision", args.precision)):
        if args.sweep and len(values) > 1:
            given = " ".join(map(str, values))
            return f"--sweep {option} {given}: a sweep has one; run it once for each"
    if args.out.exists() and not args.out.is_dir():
        return f"--out {args.out}: a file; name a folder"
    return ""


def sweep(first: Setting, shapes: Sequence[str]) -> List[Setting]:
    """Return settings of several sizes, batches and lengths, one changed at a time."""
    others = [first._replace(shape=s) for s in shapes if s != first.shape]
    others += [first._replace(batch_size=b) for b in (4, 8, 16, 32) if b != first.batch_size]
    others += [first._replace(length=n) for n in (16, 32, 64, 128) if n != first.length]
    return [first, *others]


def settings_of(args: argparse.Namespace) -> List[Setting]:
    """Return the settings that are asked for."""
    found: List[Setting] = []
    for processes, precision, update_freq in itertools.product(
        args.processes, args.precision, args.update_freq
    ):
        sizes = (args.shape, args.batch_size, args.length)
        setting = Setting(*sizes, update_freq, precision, args.device, processes)
        swept = args.sweep and processes == 1
        found += sweep(setting, args.sweep_shapes) if swept else [setting]
    return found


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure, write the report, print it; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = parser()
    args = options.parse_args(argv)
    wrong = refusal(args)
    if wrong:
        options.exit(2, f"{options.prog}: {wrong}\n")
    args.out.mkdir(parents=True, exist_ok=True)
    record: Dict[str, Any] = {"machine": machine(args, argv), "results": []}
    text = ""
    try:
        for setting in settings_of(args):
            record["results"].append(add_figures(measure(args, setting)))
            text = write_report(record, args.out, plot=args.sweep)
    except (MethodUnavailable, ChildFailedError) as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
