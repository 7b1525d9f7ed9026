"""What SAM and delta-SAM cost: updates of every method side by side, in one run.

    python -m scripts.benchmark --shape base --out benchmark
    python -m scripts.benchmark --shape base --device cuda --precision fp16 --out benchmark-fp16
    python -m scripts.benchmark --sweep --processes 1 2 4 --out sweep

All methods train the same RoBERTa with a classification head on the same random sentences.  They
make one update each in turn, over and over, so that what else the machine does meets all of them;
a ratio is the median over rounds of the ratio within a round, its spread half the distance between
quartiles.  Beside delta-SAM / SAM stand two figures of the same rounds: the floor of the passes,
of forwards and backwards alone, which a true ratio may lie below, for both methods have more than
passes; and SAM's own update with delta-SAM's forwards without graph added.  OUT gets
benchmark.json and benchmark.md, anew after each comparison; ``--trace`` adds torch's profiler
traces.

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
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics

from deltasam_fairseq.trainer.ascent import autocast
from scripts.benchmark.figures import (
    FORWARD,
    FORWARD_AND_BACKWARD,
    WITHOUT_GRAPH,
    Seconds,
    floors,
    of_passes,
    summary,
)
from scripts.benchmark.machine import machine
from scripts.benchmark.methods import (
    OURS,
    Built,
    NotHere,
    Setting,
    Update,
    build,
    samples_of,
)
from scripts.benchmark.options import parser, refusal
from scripts.benchmark.phases import phases
from scripts.benchmark.processes import launch_options, reductions, start
from scripts.benchmark.report import title, write_report

WARM_UP = 2


def waiter(device: str) -> Callable[[], None]:
    """Return what waits until the device has done its work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def passes(trainer: Any) -> Dict[str, Update]:
    """Return the model's passes over an update's micro-batches, by name, without anything else."""

    def loss(sample: Any) -> Any:
        trainer.model.train()
        with autocast(trainer.cfg):
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

    return {FORWARD: forward, WITHOUT_GRAPH: without_graph, FORWARD_AND_BACKWARD: backward}


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
) -> Seconds:
    """Return method -> wall and cpu -> seconds of every round.

    Args:
        periods: updates that are timed together, of methods where it is not one.
    """
    found: Seconds = {n: {"wall": [], "cpu": []} for n in updates}
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


def compare(
    args: argparse.Namespace, setting: Setting, before: Optional[Callable[[Any], Any]] = None
) -> Dict[str, Any]:
    """Return all figures of one setting.

    Args:
        before: called with fairseq's configuration before a model is built.

    Raises:
        NotHere: no method can run.
    """
    updates: Dict[str, Update] = {}
    periods: Dict[str, int] = {}
    left_out: Dict[str, str] = {}
    memory: Dict[str, Optional[int]] = {}
    timed_too: Dict[str, Update] = {}
    samples = samples_of(setting, setting.update_freq)
    for name in args.methods:
        make = partial(build, name, setting, args.davda54, before)
        try:
            peak = peak_memory(make, setting) if args.memory else None
            built = make()
            built.update(samples)
        except (NotHere, ValueError, AssertionError, NotImplementedError) as error:
            left_out[name] = reason(error)
            print(f"{name}: left out, {left_out[name]}", file=sys.stderr)
            continue
        updates[name], periods[name] = built.update, built.period
        if args.memory:
            memory[name] = peak
        timed_too = timed_too or passes(built.trainer)
    if not updates:
        raise NotHere(f"{title(setting._asdict())}: none of --methods can run here")
    base = next(iter(updates))
    found = side_by_side({**updates, **timed_too}, periods, setting, args.rounds)
    rows = summary(found, setting, base)
    wait = waiter(setting.device)
    result: Dict[str, Any] = {"setting": setting._asdict(), "base": base, "left_out": left_out}
    result["threads"] = torch.get_num_threads()
    result["rows"] = {name: rows[name] for name in updates}
    result["memory"] = memory
    result["passes"] = {name: rows[name] for name in timed_too}
    result["in_forwards"] = {key: of_passes(rows, key) for key in ("wall", "cpu")}
    result["floors"] = {key: floors(found, rows, setting, key) for key in ("wall", "cpu")}
    result["phases"] = {
        name: phases(partial(update, samples), args.phase_rounds * periods[name], wait)
        for name, update in updates.items()
        if args.phase_rounds and name in OURS
    }
    result["seconds_of_all_rounds"] = found
    if setting.processes > 1:
        elements = sum(p.numel() for p in built.trainer.get_model().parameters())
        result["reductions"] = reductions(elements, setting.device, wait)
    if args.trace:
        trace(updates, samples, args.out, setting)
    return result


def reason(error: Exception) -> str:
    """Return why a method is left out, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, NotHere) else f"{type(error).__name__} {text}"


def trace(updates: Dict[str, Update], samples: List[Any], out: Path, setting: Setting) -> None:
    """Write torch's profiler trace of one update of each method, for chrome://tracing."""
    for name, update in updates.items():
        with torch.profiler.profile(record_shapes=True) as profile:
            update(samples)
        words = f"{name} {title(setting._asdict())}".replace(",", "").split()
        profile.export_chrome_trace(str(out / f"{'_'.join(words)}.json"))


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
        alone = processes == 1
        found += sweep(setting, args.sweep_shapes) if args.sweep and alone else [setting]
    return found


def measure(args: argparse.Namespace, setting: Setting) -> Dict[str, Any]:
    """Return the comparison of one setting, as one of several processes or alone."""
    torch.set_num_threads(args.threads or max((os.cpu_count() or 1) // setting.processes, 1))
    before = distributed_utils.distributed_init if setting.processes > 1 else None
    with metrics.aggregate(new_root=True):
        return compare(args, setting, before)


def measure_as_rank(args: argparse.Namespace) -> None:
    """Measure the only setting as one of several processes; rank 0 writes the result."""
    rank, processes, port = map(int, args.rank[:3])
    if args.device == "cuda":
        torch.cuda.set_device(rank)  # fairseq-train does so before it starts a rank
    (setting,) = settings_of(args)
    launch = launch_options(rank, processes, port, args.device)
    result = measure(args, setting._replace(processes=processes, rank=rank, launch=launch))
    if rank == 0:
        Path(args.rank[3]).write_text(json.dumps(result), encoding="utf-8")


def measure_in_processes(setting: Setting) -> Dict[str, Any]:
    """Return the comparison of one setting, made by this program in several processes."""
    only = ["--processes", str(setting.processes), "--precision", setting.precision]
    only += ["--update-freq", str(setting.update_freq)]
    return start(__file__, [*sys.argv[1:], *only], setting.processes)


def main() -> int:
    """Measure, write the report, print it; return the exit code."""
    options = parser(__doc__)
    args = options.parse_args()
    wrong = refusal(args)
    if wrong and not args.rank:
        options.exit(2, f"benchmark.py: {wrong}\n")
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    text = ""
    try:
        if args.rank:
            measure_as_rank(args)
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        record: Dict[str, Any] = {"machine": machine(args), "results": []}
        for setting in settings_of(args):
            several = setting.processes > 1
            result = measure_in_processes(setting) if several else measure(args, setting)
            record["results"].append(result)
            text = write_report(record, args.out, plot=args.sweep)
    except NotHere as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
