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
from cost_model import free_port


def launch_options(rank: int, processes: int, port: int, device: str) -> List[str]:
    """Return fairseq's options for one of several processes."""
    words = f"--distributed-world-size {processes} --distributed-rank {rank} --distributed-no-spawn"
    words += f" --distributed-init-method tcp://127.0.0.1:{port} --ddp-backend legacy_ddp"
    words += f" --distributed-backend {'nccl' if device == 'cuda' else 'gloo'}"
    return words.split() + (["--device-id", str(rank)] if device == "cuda" else [])


def start(program: str, argv: Sequence[str], processes: int) -> List[Dict[str, Any]]:
    """Run a program once a rank; return what rank 0 wrote.

    Raises:
        RuntimeError: a process failed; with the end of what rank 0 said.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        errors = Path(folder) / "errors"
        with errors.open("wb") as stream:
            running = [
                subprocess.Popen(
                    [
                        sys.executable,
                        program,
                        *argv,
                        "--rank",
                        *map(str, (r, processes, port, out)),
                    ],
                    stdout=subprocess.DEVNULL,
                    stderr=stream if r == 0 else subprocess.DEVNULL,
                    env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
                )
                for r in range(processes)
            ]
            codes = [process.wait() for process in running]
        if any(codes):
            raise RuntimeError(f"{processes} processes: {codes}\n{errors.read_text()[-2000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


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
