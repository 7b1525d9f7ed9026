"""The options of benchmark.py, and which of them cannot be had together."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Optional

import torch

from deltasam_fairseq.options import ranged
from scripts.benchmark.methods import DAVDA54, OURS, PEERS, PRECISIONS, SHAPES

DEFAULT = ("Adam", "SAM", "delta-SAM", "delta-SAM, two forwards", *PEERS)


def parser(description: Optional[str]) -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    positive = ranged(int, at_least=1)
    gpu = torch.cuda.is_available()
    add("--shape", choices=list(SHAPES), default="base" if gpu else "small", help="of RoBERTa")
    add("--batch-size", type=positive, default=16, help="sentences of a micro-batch (default: 16)")
    add("--length", type=positive, default=64, help="tokens of a sentence (default: 64)")
    add("--update-freq", type=positive, nargs="+", default=[1], help="micro-batches of an update")
    add("--precision", choices=list(PRECISIONS), nargs="+", default=["fp32"])
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    add("--threads", type=positive, help="of the processor (default: all cores)")
    add("--methods", nargs="+", choices=(*OURS, *PEERS), default=list(DEFAULT), metavar="METHOD")
    add("--processes", type=positive, nargs="+", default=[1], help="data-parallel processes")
    add("--rank", nargs=4, help=argparse.SUPPRESS)
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
    add("--out", type=Path, required=True, help="folder for benchmark.json and benchmark.md")
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
            "one of this package's, as Adam"
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
