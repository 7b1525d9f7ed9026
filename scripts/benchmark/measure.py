"""Measure one setting: seconds of every method's updates, their phases, peak memory, all-reduces.

The methods take turns, one update each, so that other work on the machine slows all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import statistics
import sys
import time
import unittest.mock
import warnings
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from fairseq.logging import metrics
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from deltasam_fairseq.trainer.ascent import autocast
from scripts.benchmark.methods import (
    OURS,
    Built,
    MethodUnavailable,
    Sample,
    Setting,
    Update,
    build,
    random_batches,
)

Seconds = Dict[str, Dict[str, List[float]]]  # method or pass -> wall and cpu -> of every round

WARM_UP = 2
FORWARD, WITHOUT_GRAPH = "forward", "forward without graph"
FORWARD_AND_BACKWARD = "forward and backward"
REST = "rest: preparation, checks, log"
UPDATE = "benchmark-update"
PHASES = {  # name of a record_function in fairseq or this package -> row of the table
    "sam-forward": "forward",
    "forward": "forward",
    "sam-forward-nograd": "forward without graph",
    "backward": "backward",
    "sam-backward": "backward",
    "sam-draw": "probe: draw",
    "sam-perturb": "perturb, norms",
    "sam-restore": "restore",
    "sam-reweight": "weights of the sentences",
    "sam-log": "log of the ascent",
    "sam-ascent": "rest of the ascent",
    "sam-reduce": "reduce",
    "reduce-grads": "reduce",
    "multiply-grads": "scale the gradient",
    "clip-grads": "norm of the gradient",
    "optimizer": "base step",
    UPDATE: REST,
}
# What SAM and delta-SAM add to forwards and backwards.
ADDED = (
    "probe: draw",
    "perturb, norms",
    "restore",
    "weights of the sentences",
    "log of the ascent",
    "rest of the ascent",
)


def synchronize(device: str) -> None:
    """Wait until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(update: Update, period: int, samples: List[Sample], device: str) -> Dict[str, float]:
    """Return wall and processor seconds of an update, the mean of ``period`` updates."""
    synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(period):
        update(samples)
    synchronize(device)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {"wall": wall / period, "cpu": processor / period}


def time_in_turn(
    updates: Dict[str, Update],
    batches: Sequence[List[Sample]],
    rounds: int,
    device: str,
    periods: Optional[Dict[str, int]] = None,
) -> Seconds:
    """Return method -> wall and cpu -> seconds of every round, after two rounds of warm-up.

    Args:
        batches: the micro-batches of an update, of each round in turn.
        periods: updates that are timed together, for methods where this is not one.
    """
    found: Seconds = {name: {"wall": [], "cpu": []} for name in updates}
    gc.disable()
    try:
        for number in range(WARM_UP + rounds):
            for name, update in updates.items():
                period = (periods or {}).get(name, 1)
                taken = timed(update, period, batches[number % len(batches)], device)
                if number >= WARM_UP:
                    for key, seconds in taken.items():
                        found[name][key].append(seconds)
            gc.collect()
    finally:
        gc.enable()
    return found


def passes(trainer: Any) -> Dict[str, Update]:
    """Return the model's bare passes over an update's micro-batches, by name."""

    def loss(sample: Any) -> Any:
        trainer.model.train()
        with autocast(trainer.cfg):
            return trainer.criterion(trainer.model, trainer._prepare_sample(sample)[0])[0]

    def forward(samples: List[Sample]) -> None:
        for sample in samples:
            loss(sample)  # its graph is freed before the next is made, as in training

    def backward(samples: List[Sample]) -> None:
        for sample in samples:
            trainer.optimizer.backward(loss(sample))
        trainer.zero_grad()

    without_graph = torch.no_grad()(forward)
    return {FORWARD: forward, WITHOUT_GRAPH: without_graph, FORWARD_AND_BACKWARD: backward}


def phases(update: Callable[[], Any], rounds: int, device: str) -> Dict[str, float]:
    """Return the mean seconds of each phase of an update.

    Time in a phase inside another counts for the inner one alone. Both ends of a mark wait for the
    device, so that its work is in the phase.
    """
    seconds: Dict[str, float] = {}
    entered: List[str] = []  # the innermost last
    last = 0.0

    def charge() -> None:
        nonlocal last
        synchronize(device)
        now = time.perf_counter()
        if entered:
            seconds[entered[-1]] = seconds.get(entered[-1], 0.0) + now - last
        last = now

    @contextlib.contextmanager
    def mark(name: str, args: Optional[str] = None) -> Iterator[None]:
        if name not in PHASES:
            yield
            return
        charge()
        entered.append(PHASES[name])
        try:
            yield
        finally:
            charge()
            entered.pop()

    with unittest.mock.patch.object(torch.autograd.profiler, "record_function", mark):
        if dist.is_initialized():
            dist.barrier()  # ranks come here at different moments
        for _ in range(rounds):
            with mark(UPDATE):
                update()
    order = dict.fromkeys(PHASES.values())
    return {name: seconds[name] / rounds for name in order if name in seconds}


def device_work(update: Callable[[], Any]) -> Optional[Dict[str, float]]:
    """Return seconds and number of a GPU's kernels and copies in an update; None: not recorded.

    Where the seconds are fewer than the update's own, the GPU waits for the processor.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        update()
        torch.cuda.synchronize()
    spans = [
        event.time_range.elapsed_us()
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not (event.name in PHASES or getattr(event, "is_user_annotation", False))
    ]
    return {"seconds": 1e-6 * sum(spans), "kernels": len(spans)} if spans else None


def build_and_measure_memory(
    make: Callable[[], Built], setting: Setting
) -> Tuple[Built, Optional[int]]:
    """Return a method and its peak of the bytes in tensors, from building through three updates.

    On a CPU from the profiler's record of every allocation; None where torch does not show it.
    """

    def train() -> Built:
        built = make()
        own, built.trainer.cuda_env = built.trainer.cuda_env, None
        for number in range(3):  # with cuda_env fairseq's train_step resets the peak after each
            built.update(random_batches(setting, setting.update_freq, number))
        built.trainer.cuda_env = own
        return built

    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return train(), torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        built = train()
    kineto = profile.profiler.kineto_results if profile.profiler is not None else None
    if kineto is None or not hasattr(kineto, "events"):
        return built, None
    now = peak = 0
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return built, peak


def time_reductions(elements: int, device: str) -> Dict[str, float]:
    """Return median seconds of an update's all-reduces, by what is reduced.

    One number and a thousand beside delta-SAM's four show whether these cost more than a message.

    Args:
        elements: of all gradients.
    """
    found = {}
    numbers = torch.zeros(1000, dtype=torch.float64, device=device)
    for name, buffer, repeats in (
        ("one float64 number", numbers[:1], 50),
        ("four float64 numbers", numbers[:4], 50),  # delta-SAM's
        ("1000 float64 numbers", numbers, 50),
        ("gradients, float32", torch.zeros(elements, device=device), 10),
    ):
        seconds = []
        for _ in range(repeats):
            dist.barrier()
            synchronize(device)
            begin = time.perf_counter()
            dist.all_reduce(buffer)
            synchronize(device)
            seconds.append(time.perf_counter() - begin)
        found[name] = statistics.median(seconds)
    return found


def compare(args: argparse.Namespace, setting: Setting, model: Any = None) -> Dict[str, Any]:
    """Return what was measured of all methods in one setting.

    Args:
        model: to copy, see `build_trainer`.

    Raises:
        MethodUnavailable: no method can run.
    """
    updates: Dict[str, Update] = {}
    periods: Dict[str, int] = {}
    unavailable: Dict[str, str] = {}
    memory: Dict[str, Optional[int]] = {}
    base_steps: Dict[str, str] = {}
    bare: Dict[str, Update] = {}
    batches = [random_batches(setting, setting.update_freq, seed) for seed in range(4)]
    for name in args.methods:
        make = partial(build, name, setting, args.davda54, model)
        try:
            built, peak = build_and_measure_memory(make, setting) if args.memory else (make(), None)
            built.update(batches[0])
        except (MethodUnavailable, RuntimeError, ValueError, AssertionError) as error:
            if setting.processes > 1 and type(error) is RuntimeError:
                raise  # of one rank, while the others wait for it
            kind = "" if isinstance(error, MethodUnavailable) else f"{type(error).__name__} "
            unavailable[name] = kind + " ".join(str(error).split())
            if setting.rank == 0:
                print(f"{name}: unavailable, {unavailable[name]}", file=sys.stderr)
            continue
        updates[name], periods[name] = built.update, built.period
        if name in OURS:
            base_steps[name] = type(built.trainer.optimizer.optimizer).__name__
        if args.memory:
            memory[name] = peak
        bare = bare or passes(built.trainer)
    if not updates:
        raise MethodUnavailable(f"{setting.title}: none of --methods can run here")
    result: Dict[str, Any] = {
        "setting": setting._asdict(),
        "threads": torch.get_num_threads(),
        "base": next(iter(updates)),
        "base_steps": base_steps,
        "unavailable": unavailable,
        "memory": memory,
        "seconds_of_all_rounds": time_in_turn(
            {**updates, **bare}, batches, args.rounds, setting.device, periods
        ),
        "phases": {
            name: phases(
                partial(update, batches[1]), args.phase_rounds * periods[name], setting.device
            )
            for name, update in updates.items()
            if args.phase_rounds and name in OURS
        },
        "device_work": {
            name: device_work(partial(update, batches[1]))
            for name, update in updates.items()
            if setting.device == "cuda" and args.phase_rounds
        },
    }
    if setting.processes > 1:
        elements = sum(p.numel() for p in built.trainer.get_model().parameters())
        result["reductions"] = time_reductions(elements, setting.device)
    for name, update in updates.items() if args.trace else ():
        with torch.profiler.profile(record_shapes=True) as profile:
            update(batches[1])
        words = f"{name} {setting.title}".replace(",", "").split()
        profile.export_chrome_trace(str(args.out / f"{'_'.join(words)}.json"))
    return result


def measure(args: argparse.Namespace, setting: Setting) -> Dict[str, Any]:
    """Return the comparison of one setting, made in as many processes as it has."""
    if setting.processes > 1:
        result: Dict[str, Any] = run_in_processes(measure_rank, setting.processes, args, setting)
        return result
    return measure_here(args, setting)


def measure_here(args: argparse.Namespace, setting: Setting, model: Any = None) -> Dict[str, Any]:
    """Return the comparison of one setting, made in this process; arguments as of `compare`."""
    torch.set_num_threads(args.threads or max((os.cpu_count() or 1) // setting.processes, 1))
    logging.disable(logging.INFO)
    with warnings.catch_warnings(), metrics.aggregate(new_root=True):
        warnings.simplefilter("ignore")
        return compare(args, setting, model)


def measure_rank(args: argparse.Namespace, setting: Setting) -> Optional[Dict[str, Any]]:
    """Measure as one of torchrun's processes; rank 0 returns the comparison."""
    rank = int(os.environ["RANK"])
    if setting.device == "cuda":
        torch.cuda.set_device(rank)  # before anything else, as fairseq-train does
    result = measure_here(args, setting._replace(rank=rank))
    return result if rank == 0 else None


def run_in_processes(function: Callable[..., Any], processes: int, *args: Any) -> Any:
    """Run ``function(*args)`` in processes of one machine, as torchrun does; return rank 0's value.

    Raises:
        ChildFailedError: a rank failed; the others are ended. The message has its traceback.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # ranks share the cores
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="benchmark",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    return elastic_launch(config, function)(*args)[0]
