"""Running several ranks as processes on this machine, gloo over TCP."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
PATH = str(HERE.parent.parent)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(folder, runs, timeout=240):
    """Make the runs of worker.py, those of one world size in one process group.

    Args:
        folder: where specifications and results go.
        runs: name -> dict(argv, updates, dtype).

    Returns:
        name -> what each rank saw, a list.
    """
    by_size = {}
    for name, spec in runs.items():
        spec = dict(spec, argv=[str(a) for a in spec["argv"]], out=str(folder / name))
        by_size.setdefault(len(spec["updates"][0]), []).append(spec)
    for world_size, specs in by_size.items():
        spec_file = folder / f"{world_size}.json"
        spec_file.write_text(
            json.dumps({"runs": specs, "world_size": world_size, "port": free_port()})
        )
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.worker", str(spec_file), str(rank)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                universal_newlines=True,
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [p.communicate(timeout=timeout)[0] for p in processes]
        finally:
            for p in processes:
                p.kill()
        for rank, (process, output) in enumerate(zip(processes, outputs)):
            assert process.returncode == 0, f"rank {rank} of {world_size}:\n{output[-4000:]}"
    return {
        name: [
            torch.load(folder / f"{name}.{rank}.pt", weights_only=False)
            for rank in range(len(spec["updates"][0]))
        ]
        for name, spec in runs.items()
    }
