"""What an update costs on 1 to 1024 GPUs: a model on paper, and its check on this machine's CPUs.

    python -m scripts.benchmark.cost_model --plot docs/cost_model.png   # the table and the plot
    python -m scripts.benchmark.cost_model --measure                    # the check, about a minute

    update = forwards F + no-grad forwards F0 + backwards B + passes over the weights
             + reductions of the gradients + small collectives

    ring all-reduce of S bytes on n ranks:   2 (n - 1) alpha + 2 (n - 1) / n  S / beta

Of every gradient reduction the part that a backward can hide (``OVERLAP``) is taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

TESTS = Path(__file__).resolve().parents[1] / "tests"
MEASURED_SIZES = (1, 2, 4)


class Method(NamedTuple):
    """What an update of a method consists of, with one micro-batch a rank.

    Counted in the code; the collectives also by tests/distributed/test_equivalence.py.
    """

    forwards: int
    nograd_forwards: int
    backwards: int
    weight_passes: int  # reads and writes of all weights, beside the base optimizer's own
    reductions: int  # of all gradients
    small_collectives: int  # of a few numbers; two of them carry fairseq's log


METHODS = {
    "Adam": Method(1, 0, 1, 0, 1, 2),
    "SAM, rank": Method(2, 0, 2, 4, 1, 2),
    "SAM, global": Method(2, 0, 2, 4, 2, 2),
    "delta-SAM, rank": Method(2, 1, 2, 9, 1, 2),
    "delta-SAM, global": Method(2, 1, 2, 9, 2, 3),
}
ADAM_PASSES = 7  # reads w, m, v, g; writes w, m, v


class Machine(NamedTuple):
    """Seconds and bytes of one kind of hardware and model."""

    forward: float  # s
    nograd_forward: float  # s
    backward: float  # s
    weight_pass: float  # s to read or write all weights once
    gradient_bytes: float
    alpha: float  # s, latency of a message within a node
    beta: float  # bytes/s of a ring within a node
    alpha_far: float  # the same between nodes
    beta_far: float
    ranks_a_node: int
    overlap: float  # share of a backward that can hide a reduction


# RoBERTa large, fp16, 32 sentences of 128 tokens a GPU.
PARAMETERS = 355e6  # Liu et al. 2019
MATRIX_PARAMETERS = 302e6  # 24 layers x 12 x 1024^2: those that every token is multiplied by
TOKENS = 32 * 128  # assumed
FLOPS = 0.4 * 312e12  # assumed: 40 % of an A100's fp16 peak (data sheet)
MEMORY = 0.8 * 2.0e12  # assumed: 80 % of an A100 80GB's bandwidth, bytes/s (data sheet)
NVLINK = 200e9  # assumed: ring bandwidth in a node of 8 (NVLink 3: 300e9 a direction)
INFINIBAND = 80e9  # assumed: 4 x 200 Gb/s a node (100e9), 80 % of it
ALPHA, ALPHA_FAR = 3e-6, 10e-6  # assumed
OVERLAP = 0.0  # legacy_ddp hides nothing; --overlap 0.7 for pytorch_ddp


def roberta_large(overlap: float) -> Machine:
    """RoBERTa large on nodes of 8 GPUs; no figure of it was measured here."""
    forward = 2 * MATRIX_PARAMETERS * TOKENS / FLOPS
    return Machine(
        forward=forward,
        nograd_forward=forward,
        backward=2 * forward,
        weight_pass=2 * PARAMETERS / MEMORY,
        gradient_bytes=2 * PARAMETERS,
        alpha=ALPHA,
        beta=NVLINK,
        alpha_far=ALPHA_FAR,
        beta_far=INFINIBAND,
        ranks_a_node=8,
        overlap=overlap,
    )


def all_reduce(machine: Machine, size: float, ranks: int) -> float:
    """Seconds of a ring all-reduce: ``2 (n-1) alpha + 2 (n-1)/n size/beta``; 0 for one rank."""
    far = ranks > machine.ranks_a_node
    alpha = machine.alpha_far if far else machine.alpha
    beta = machine.beta_far if far else machine.beta
    return 2 * (ranks - 1) * alpha + 2 * (ranks - 1) / ranks * size / beta


def update_time(machine: Machine, method: Method, ranks: int) -> float:
    """Seconds of one update; gradients of the rank are those of ``machine``."""
    compute = (
        method.forwards * machine.forward
        + method.nograd_forwards * machine.nograd_forward
        + method.backwards * machine.backward
        + (ADAM_PASSES + method.weight_passes) * machine.weight_pass
    )
    reduction = all_reduce(machine, machine.gradient_bytes, ranks)
    exposed = max(0.0, reduction - machine.overlap * machine.backward)
    small = method.small_collectives * all_reduce(machine, 32, ranks)
    return compute + method.reductions * exposed + small


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paper(overlap: float, plot: str) -> None:
    machine = roberta_large(overlap)
    sizes = [2**k for k in range(11)]
    times = {m: [update_time(machine, METHODS[m], n) for n in sizes] for m in METHODS}
    print(f"RoBERTa large, {TOKENS} tokens a GPU, overlap {overlap:g}: ms an update (x Adam)\n")
    rows = [
        [str(n)]
        + [f"{1e3 * times[m][i]:.0f} ({times[m][i] / times['Adam'][i]:.2f})" for m in METHODS]
        for i, n in enumerate(sizes)
    ]
    print(table(["GPUs", *METHODS], rows))
    if plot:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(6, 3.5))
        for name, seconds in times.items():
            style = "--" if "rank" in name else "-"
            axes.plot(sizes, [1e3 * s for s in seconds], style, marker=".", label=name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="GPUs (8 a node)", ylabel="ms an update", ylim=(0, None))
        axes.set_title("RoBERTa large on paper; every GPU figure is assumed", fontsize=9)
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(plot, dpi=110)


# The check: the same formula with compute from one process and the network from all-reduces.

SMALL_ROBERTA = (
    "--encoder-layers 4 --encoder-embed-dim 256 --encoder-ffn-embed-dim 1024 "
    "--encoder-attention-heads 4 --dropout 0 --attention-dropout 0"
).split()
OPTIONS = {
    "Adam": ["--optimizer", "adam"],
    "SAM, rank": ["--optimizer", "sam_adam", "--sam-scope", "rank"],
    "SAM, global": ["--optimizer", "sam_adam"],
    "delta-SAM, rank": ["--optimizer", "delta_sam_adam", "--sam-scope", "rank"],
    "delta-SAM, global": ["--optimizer", "delta_sam_adam"],
}
WARM_UP, REPEATS = 2, 6


def cpu_seconds(act: Any, repeats: int = REPEATS) -> float:
    """Median of the processor time of several calls: other work on the machine hardly adds to it.

    It has no waiting in it, neither for a core nor for another rank.
    """
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        act()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def parts_of(trainer: Any, sample: Dict[str, Any]) -> Dict[str, float]:
    """Forward, backward and a pass over the weights, each timed alone."""
    import torch

    def loss() -> Any:
        return trainer.criterion(trainer.model, sample)[0]

    def without_graph() -> None:
        with torch.no_grad():
            loss()

    weights = [p.data for p in trainer.get_model().parameters()]
    copies = [w.clone() for w in weights]

    def copy() -> None:
        for w, c in zip(weights, copies):
            c.copy_(w)

    forward = cpu_seconds(loss)
    return {
        "forward": forward,
        "nograd_forward": cpu_seconds(without_graph),
        "backward": cpu_seconds(lambda: loss().backward()) - forward,
        "weight_pass": cpu_seconds(copy) / 2,
        "gradient_bytes": 4.0 * sum(w.numel() for w in weights),
    }


def work(data: str, rank: int, world_size: int, port: int, out: str) -> None:
    """One process of the check; rank 0 writes what it measured."""
    import tiny
    import torch
    import torch.distributed as dist
    from fairseq.distributed import utils as distributed_utils

    trainers = {}
    for name, options in OPTIONS.items():
        argv = tiny.arguments(Path(data), Path(out).parent, *SMALL_ROBERTA, *options)
        argv += ["--batch-size", "32", "--find-unused-parameters", "--ddp-backend", "legacy_ddp"]
        argv += ["--no-save", "--distributed-world-size", str(world_size)]
        if world_size > 1:
            argv += ["--distributed-rank", str(rank), "--distributed-no-spawn"]
            argv += ["--distributed-init-method", f"tcp://127.0.0.1:{port}"]
            argv += ["--distributed-backend", "gloo"]
        init = distributed_utils.distributed_init if world_size > 1 else None
        trainers[name] = trainer = tiny.build_trainer(argv, before=init)
        samples = tiny.batches(trainer)[:1]
    cpu: Dict[str, List[float]] = {name: [] for name in trainers}
    wall: Dict[str, List[float]] = {name: [] for name in trainers}
    for i in range(WARM_UP + REPEATS):  # in turn, so that a busy spell meets all
        for name, each in trainers.items():
            start = time.process_time(), time.perf_counter()
            each.train_step(samples)
            if i >= WARM_UP:
                cpu[name].append(time.process_time() - start[0])
                wall[name].append(time.perf_counter() - start[1])
    found: Dict[str, Any] = {
        key: {name: statistics.median(seconds) for name, seconds in taken.items()}
        for key, taken in (("cpu", cpu), ("wall", wall))
    }
    if world_size == 1:
        found.update(parts_of(trainer, samples[0]))
    else:
        for key, n in (("gradients", sum(p.numel() for p in trainer._trainable())), ("small", 8)):
            buffer = torch.zeros(n)
            found[key] = cpu_seconds(lambda b=buffer: dist.all_reduce(b), 20)
    if rank == 0:
        Path(out).write_text(json.dumps(found))


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def measure() -> None:
    """Run 1, 2 and 4 processes, print measured and predicted updates."""
    import tiny

    seen: Dict[int, Dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = tiny.write_classification(Path(folder) / "data")
        for n in MEASURED_SIZES:
            port, out = free_port(), f"{folder}/{n}.json"
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-W", "ignore", __file__, "--work", str(data), out]
            processes = [
                subprocess.Popen(
                    [*command, *map(str, (rank, n, port))], env=env, stderr=subprocess.DEVNULL
                )
                for rank in range(n)
            ]
            if any(status != 0 for status in [p.wait() for p in processes]):
                raise RuntimeError(f"a process of {n} failed")
            seen[n] = json.loads(Path(out).read_text())

    parts = ("forward", "nograd_forward", "backward", "weight_pass", "gradient_bytes")
    alone = {key: seen[1][key] for key in parts}
    print(f"one process, ms: {', '.join(f'{k} {1e3 * alone[k]:.1f}' for k in parts[:4])}")
    print(f"gradients {alone['gradient_bytes'] / 1e6:.1f} MB; cores {os.cpu_count()}, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}\n")
    rows = []
    for n in MEASURED_SIZES:
        alpha, beta = 0.0, 1.0
        if n > 1:  # from a small and a large all-reduce on the same ranks
            alpha = seen[n]["small"] / (2 * (n - 1))
            wire = max(seen[n]["gradients"] - seen[n]["small"], 1e-9)
            beta = 2 * (n - 1) / n * alone["gradient_bytes"] / wire
        machine = Machine(
            **alone,
            alpha=alpha,
            beta=beta,
            alpha_far=alpha,
            beta_far=beta,
            ranks_a_node=n,
            overlap=0.0,
        )
        adam = update_time(machine, METHODS["Adam"], n)
        for name, method in METHODS.items():
            predicted = update_time(machine, method, n)
            cpu, wall = seen[n]["cpu"], seen[n]["wall"]
            milliseconds = [f"{1e3 * t:.0f}" for t in (predicted, cpu[name], wall[name])]
            ratios = (predicted / adam, cpu[name] / cpu["Adam"], wall[name] / wall["Adam"])
            rows.append([str(n), name, *milliseconds, *(f"{r:.2f}" for r in ratios)])
    header = ["processes", "method", "predicted ms", "CPU ms", "wall ms"]
    print(table([*header, "predicted / Adam", "CPU / Adam", "wall / Adam"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", default="", help="file to draw the model on paper to")
    parser.add_argument("--overlap", type=float, default=OVERLAP, help="see OVERLAP in the source")
    parser.add_argument("--measure", action="store_true", help="check the model on CPUs instead")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        data, out, rank, world_size, port = args.work
        work(data, int(rank), int(world_size), int(port), out)
    elif args.measure:
        measure()
    else:
        paper(args.overlap, args.plot)


if __name__ == "__main__":
    main()
