"""The benchmark in several data-parallel processes of one machine."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import torch
import torch.distributed as dist

from scripts.benchmark.cost_model import free_port


def launch_options(rank: int, processes: int, port: int, device: str) -> List[str]:
    """Return fairseq's options for one of several processes."""
    words = f"--distributed-world-size {processes} --distributed-rank {rank} --distributed-no-spawn"
    words += f" --distributed-init-method tcp://127.0.0.1:{port} --ddp-backend legacy_ddp"
    words += f" --distributed-backend {'nccl' if device == 'cuda' else 'gloo'}"
    return words.split() + (["--device-id", str(rank)] if device == "cuda" else [])


def start(program: str, argv: Sequence[str], processes: int) -> Dict[str, Any]:
    """Run a program once a rank; return what rank 0 wrote.

    Raises:
        RuntimeError: a rank failed; with the end of what it said. The others are ended.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        said = [Path(folder) / f"errors-{rank}" for rank in range(processes)]
        running: List[subprocess.Popen] = []
        try:
            for rank, errors in enumerate(said):
                words = ["--rank", *map(str, (rank, processes, port, out))]
                with errors.open("wb") as stream:
                    running.append(
                        subprocess.Popen(
                            [sys.executable, program, *argv, *words],
                            stdout=subprocess.DEVNULL,
                            stderr=stream,
                            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
                        )
                    )
            failed = first_failed(running)
        finally:
            end(running)
        if failed:
            ends = [f"rank {r}: {said[r].read_text(errors='replace')[-2000:]}" for r in failed]
            raise RuntimeError(f"of {processes} processes failed " + "\n".join(ends))
        return json.loads(out.read_text(encoding="utf-8"))


def first_failed(running: Sequence[subprocess.Popen]) -> List[int]:
    """Wait for all, or until one fails; return the ranks that failed, [] where all succeed."""
    while True:
        codes = [process.poll() for process in running]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed or None not in codes:
            return failed
        time.sleep(0.1)


def end(running: Sequence[subprocess.Popen]) -> None:
    """End the processes that still run."""
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def reductions(elements: int, device: str, wait: Callable[[], None]) -> Dict[str, float]:
    """Return median seconds of the reductions of an update, by what is reduced.

    One number and a thousand beside delta-SAM's four show whether these cost more than a message.

    Args:
        elements: of the gradients.
        device: where they are.
        wait: returns when the device has done its work.
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
            wait()
            begin = time.perf_counter()
            dist.all_reduce(buffer)
            wait()
            seconds.append(time.perf_counter() - begin)
        found[name] = statistics.median(seconds)
    return found
