"""What SAM and delta-SAM cost: updates of every method side by side, in one run.

    python scripts/benchmark.py --shape base --out benchmark
    python scripts/benchmark.py --shape base --device cuda --precision fp16 --out benchmark-fp16
    python scripts/benchmark.py --sweep --processes 1 2 4 --out sweep

All methods train the same RoBERTa with a classification head on the same random sentences.  They
make one update each in turn, over and over, so that what else the machine does meets all of them;
a ratio is the median over rounds of the ratio within a round, its spread half the distance between
quartiles.  The floor of delta-SAM / SAM is made of forward and backward passes timed in the same
rounds.  OUT gets benchmark.json and benchmark.md; ``--trace`` adds torch's profiler traces.

Peers: a SAM of a dozen lines of torch; pytorch_optimizer's, where it is installed; davda54's, with
``--davda54 FILE``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch
from benchmark_methods import (
    DAVDA54,
    OURS,
    PEERS,
    PRECISIONS,
    SHAPES,
    Built,
    NotHere,
    Setting,
    Update,
    autocast,
    build,
    samples_of,
)
from benchmark_phases import phases
from benchmark_processes import launch_options, reductions, start
from benchmark_report import write_report
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics

PASSES = ("forward", "forward without graph", "forward and backward")
DEFAULT = ("Adam", "SAM", "delta-SAM", "delta-SAM, two forwards", *PEERS)
WARM_UP = 2


def waiter(device: str) -> Callable[[], None]:
    """Return what waits until the device has done its work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def passes(trainer: Any) -> Dict[str, Update]:
    """Return the model's passes over an update's micro-batches, by name, without anything else."""

    def loss(sample: Any) -> Any:
        trainer.model.train()
        with autocast(trainer):
            return trainer.criterion(trainer.model, trainer._prepare_sample(sample)[0])[0]

    def forward(samples: List[Any]) -> None:
        for sample in samples:
            loss(sample)  # its graph is dropped before the next is made, as in training

    def without_graph(samples: List[Any]) -> None:
        with torch.no_grad():
            forward(samples)

    def backward(samples: List[Any]) -> None:
        for sample in samples:
            trainer.optimizer.backward(loss(sample))
        trainer.zero_grad()

    return dict(zip(PASSES, (forward, without_graph, backward)))


def timed(
    update: Update, period: int, samples: List[Any], wait: Callable[[], None]
) -> Dict[str, float]:
    """Return the wall seconds of an update, and the processor seconds, of ``period`` the mean."""
    wait()
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(period):
        update(samples)
    wait()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {"wall": wall / period, "cpu": processor / period}


def side_by_side(
    updates: Dict[str, Update], periods: Dict[str, int], setting: Setting, rounds: int
) -> Dict[str, Dict[str, List[float]]]:
    """Return method -> wall and cpu -> seconds of every round.

    Args:
        periods: updates that are timed together, of methods where it is not one.
    """
    found: Dict[str, Dict[str, List[float]]] = {n: {"wall": [], "cpu": []} for n in updates}
    samples = [samples_of(setting, setting.update_freq, seed) for seed in range(4)]
    wait = waiter(setting.device)
    gc.disable()
    try:
        for number in range(WARM_UP + rounds):
            for name, update in updates.items():
                taken = timed(update, periods.get(name, 1), samples[number % len(samples)], wait)
                if number >= WARM_UP:
                    for key, seconds in taken.items():
                        found[name][key].append(seconds)
            gc.collect()
    finally:
        gc.enable()
    return found


def peak_memory(make: Callable[[], Built], setting: Setting) -> Optional[int]:
    """Return the peak of the bytes in tensors, from an empty device through three updates.

    On a CPU from the profiler's record of every allocation.
    """

    def train() -> None:
        built = make()
        # With it fairseq's train_step sets the peak back after every update.
        built.trainer.cuda_env = None
        for number in range(3):
            built.update(samples_of(setting, setting.update_freq, number))

    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        train()
    kineto = profile.profiler.kineto_results if profile.profiler is not None else None
    if kineto is None or not hasattr(kineto, "events"):
        return None
    now = peak = 0
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def summary(
    found: Dict[str, Dict[str, List[float]]], setting: Setting, base: str
) -> Dict[str, Dict[str, float]]:
    """Return method -> its figures, ratios to ``base``."""
    sentences = setting.batch_size * setting.update_freq * setting.processes
    out = {}
    for name, seconds in found.items():
        row = {"seconds": statistics.median(seconds["wall"])}
        row["samples_per_second"] = sentences / row["seconds"]
        for key in ("wall", "cpu"):
            ratios = [a / b for a, b in zip(seconds[key], found[base][key])]
            row[f"{key}_ratio"] = statistics.median(ratios)
            quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [0.0, 0.0, 0.0]
            row[f"{key}_spread"] = (quarters[2] - quarters[0]) / 2
        out[name] = row
    return out


def forwards_without_graph(setting: Setting) -> int:
    """Return how many delta-SAM makes: of the probe, in bfloat16 on both sides.

    And of the clean losses where batches are accumulated.
    """
    return 1 + ("bf16" in setting.precision) + (setting.update_freq > 1)


def floor(rows: Dict[str, Dict[str, float]], setting: Setting, key: str) -> Dict[str, float]:
    """Return the ratios that the passes alone allow, from those of the same rounds.

    What SAM and delta-SAM have in common beside passes is left out, so that a true ratio may be
    a little lower.
    """
    forward, nograd, both = (rows[name][f"{key}_ratio"] for name in PASSES)
    return {
        "delta-SAM / SAM": 1 + forwards_without_graph(setting) * nograd / (2 * both),
        "backward / forward": both / forward - 1,
        "forward without graph / forward": nograd / forward,
    }


def compare(
    args: argparse.Namespace, setting: Setting, before: Optional[Callable[[Any], Any]] = None
) -> Dict[str, Any]:
    """Return all figures of one setting.

    Args:
        before: called with fairseq's configuration before a model is built.
    """
    updates: Dict[str, Update] = {}
    periods: Dict[str, int] = {}
    left_out: Dict[str, str] = {}
    memory: Dict[str, Optional[int]] = {}
    timed_too: Dict[str, Update] = {}
    for name in args.methods:
        try:
            if args.memory:
                memory[name] = peak_memory(
                    partial(build, name, setting, args.davda54, before), setting
                )
            built = build(name, setting, args.davda54, before)
        except NotHere as reason:
            left_out[name] = str(reason)
            print(f"{name}: left out, {reason}", file=sys.stderr)
            continue
        updates[name], periods[name] = built.update, built.period
        timed_too = timed_too or passes(built.trainer)
    base = next(iter(updates))
    found = side_by_side({**updates, **timed_too}, periods, setting, args.rounds)
    rows = summary(found, setting, base)
    wait = waiter(setting.device)
    result: Dict[str, Any] = {"setting": setting._asdict(), "base": base, "left_out": left_out}
    result["rows"] = {name: rows[name] for name in updates}
    result["memory"] = {name: peak for name, peak in memory.items() if name in updates}
    result["passes"] = {name: rows[name] for name in timed_too}
    result["floor"] = {key: floor(rows, setting, key) for key in ("wall", "cpu")}
    samples = samples_of(setting, setting.update_freq)
    result["phases"] = {
        name: phases(partial(update, samples), args.phase_rounds * periods[name], wait)
        for name, update in updates.items()
        if args.phase_rounds and name in OURS
    }
    result["seconds_of_all_rounds"] = found
    if setting.processes > 1:
        elements = sum(p.numel() for p in built.trainer.get_model().parameters())
        result["reductions"] = reductions(elements, setting.device, wait)
    if args.trace and setting.processes == 1:
        trace(updates, samples, args.out)
    return result


def trace(updates: Dict[str, Update], samples: List[Any], out: Path) -> None:
    """Write torch's profiler trace of one update of each method, for chrome://tracing."""
    for name, update in updates.items():
        with torch.profiler.profile(record_shapes=True) as profile:
            update(samples)
        profile.export_chrome_trace(str(out / f"{name.replace(', ', '_').replace(' ', '_')}.json"))


def machine(device: str) -> Dict[str, Any]:
    """Return what the figures were measured on and with."""
    import fairseq
    import numpy

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    found = {
        "date": date.today().isoformat(),
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fairseq": fairseq.__version__,
        "numpy": numpy.__version__,
        "command": " ".join(map(shlex.quote, ["python", "scripts/benchmark.py", *sys.argv[1:]])),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def sweep(args: argparse.Namespace, first: Setting) -> List[Setting]:
    """Return settings of several sizes, batches and lengths, one changed at a time."""
    others = [first._replace(shape=s) for s in args.sweep_shapes if s != first.shape]
    others += [first._replace(batch_size=b) for b in (4, 8, 16, 32) if b != first.batch_size]
    others += [first._replace(length=n) for n in (16, 32, 64, 128) if n != first.length]
    return [first, *others]


def measure(
    args: argparse.Namespace, processes: int = 1, rank: int = 0, port: int = 0
) -> List[Dict[str, Any]]:
    """Return the comparisons that are asked for, as one of several processes or alone."""
    cores = os.cpu_count() or 1
    torch.set_num_threads(args.threads or max(cores // processes, 1))
    several = processes > 1
    launch = launch_options(rank, processes, port, args.device) if several else []
    before = distributed_utils.distributed_init if several else None
    settings = [
        Setting(
            args.shape,
            args.batch_size,
            args.length,
            update_freq,
            precision,
            args.device,
            processes,
            rank,
            launch,
        )
        for precision, update_freq in itertools.product(args.precision, args.update_freq)
    ]
    if args.sweep and not several:
        settings = sweep(args, settings[0])
    with metrics.aggregate(new_root=True):
        return [compare(args, setting, before) for setting in settings]


def positive(text: str) -> int:
    """Return a number above 0."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def not_negative(text: str) -> int:
    """Return a number of 0 or above."""
    if int(text) < 0:
        raise ValueError(text)
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
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
        type=not_negative,
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


def main() -> int:
    """Measure, write the report, print it; return the exit code."""
    options = parser()
    args = options.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        options.exit(2, "benchmark.py: --device cuda: torch sees no GPU; use --device cpu\n")
    if args.methods[0] not in OURS:
        options.exit(
            2,
            f"benchmark.py: --methods {args.methods[0]}: the first, to which ratios "
            "are taken, has to be one of this package's, as Adam\n",
        )
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    if args.rank:
        rank, processes, port, out = args.rank
        results = measure(args, int(processes), int(rank), int(port))
        if rank == "0":
            Path(out).write_text(json.dumps(results), encoding="utf-8")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for processes in args.processes:
        several = processes > 1
        results += start(__file__, sys.argv[1:], processes) if several else measure(args)
    record = {"machine": machine(args.device), "results": results}
    (args.out / "benchmark.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(write_report(record, args.out, plot=args.sweep))
    return 0


if __name__ == "__main__":
    sys.exit(main())
