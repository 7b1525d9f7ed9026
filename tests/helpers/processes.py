"""Programs and ranks as processes of their own, forked from one that has imported fairseq.

Importing torch and fairseq takes 3 s, longer than most runs. A fork server (the standard
library's, one for each pytest process) imports them once, before any thread or process group
exists. Every run is a fresh fork of it, so that no state passes from one to another. A fork ends
by os._exit after flushing its output: no thread of gloo or of fairseq's data buffer lives to see
Python take down what it uses, which aborts some orderly exits.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch

from examples.common import warm

HERE = Path(__file__).parent
PATH = str(HERE.parent.parent)

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *("fairseq_cli.train", "fairseq_cli.validate", "fairseq_cli.generate", "sklearn.metrics"),
        *("pandas", "scipy.stats", "matplotlib.pyplot"),
        *warm.PRELOAD,  # among them torch._dynamo, 0.8 s, else when the first optimizer is made
    ]
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _fork_warm_server() -> None:
    """Let the server of examples.common.warm be a fork of this process, imports and all."""
    warm._server, theirs = socket.socketpair()
    if not os.fork():
        warm._server.close()
        os.environ.update(warm.SERVER)
        warm.become(*warm.serve(theirs))
        sys.exit()
    theirs.close()


def _become(
    module: str, argv: List[str], env: Dict[str, str], cwd: str, output: str, errors: str
) -> None:
    """Run a module as `python -m module argv` does, in this fork."""
    for path, stream in ((output, 1), (errors, 2)):
        if path:
            fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(fd, stream)
            os.close(fd)
        else:
            os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    if module.startswith("fairseq_cli."):  # imported already
        program = importlib.import_module(module)
        sys.argv = [str(program.__file__), *argv]
        program.cli_main()
    else:
        if module.startswith("examples."):
            _fork_warm_server()
        sys.argv = [module, *argv]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def fork(
    module: str,
    argv: Sequence[Any],
    output: Path,
    errors: Optional[Path] = None,
    env: Optional[Dict[str, str]] = None,
    cwd: Optional[Path] = None,
) -> Any:
    """Start a module as a process of its own; output goes to a file, errors too unless named."""
    words = [str(word) for word in argv]
    whole = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    where = str(cwd or os.getcwd())
    args = (module, words, whole, where, str(output), str(errors or ""))
    process = _server.Process(target=_become, args=args)
    process.start()
    return process


def run_module(
    module: str,
    argv: Sequence[Any],
    folder: Path,
    env: Optional[Dict[str, str]] = None,
    cwd: Optional[Path] = None,
    separate: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m module argv` to its end.

    Args:
        folder: where its output is kept.
        separate: errors in ``stderr``; else they are in ``stdout``, in the order of writing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output, errors = folder / "stdout", folder / "stderr"
    for file in (output, errors):
        file.write_text("")
    process = fork(module, argv, output, errors if separate else None, env, cwd)
    try:
        process.join()
    finally:
        process.kill()
    return subprocess.CompletedProcess(
        [module, *map(str, argv)], process.exitcode, output.read_text(), errors.read_text()
    )


def run_together(spec: Dict[str, Any]) -> None:
    """Run fairseq-train once for each rank, side by side, and write how the ranks ended.

    The specification: ``out`` (prefix of files), ``ranks`` (a command line each), ``env``,
    ``timeout`` in seconds, ``hanging`` (how many ranks are not waited for). Written: OUT.RANK.log,
    and OUT.json with ``status``, the exit status of every rank (negative: a signal; None: it did
    not end by itself), and ``later``, the seconds from the first end to its own.
    """
    processes = []
    for rank, argv in enumerate(spec["ranks"]):
        log = Path(f"{spec['out']}.{rank}.log")
        log.write_text("")
        processes.append(fork("fairseq_cli.train", argv, log, env=spec["env"]))
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    statuses: Dict[int, Optional[int]] = {}
    ends: Dict[int, float] = {}
    start = time.monotonic()
    while len(running) > spec["hanging"] and time.monotonic() - start < spec["timeout"]:
        for sentinel in wait(list(running), timeout=1):
            rank = running.pop(sentinel)  # type: ignore[call-overload]
            statuses[rank], ends[rank] = processes[rank].exitcode, time.monotonic()
    for process in processes:
        process.kill()
        process.join()
    first = min(ends.values(), default=start)
    ranks = range(len(processes))
    result = {
        "status": [statuses.get(rank) for rank in ranks],
        "later": [ends[rank] - first if rank in ends else None for rank in ranks],
    }
    Path(f"{spec['out']}.json").write_text(json.dumps(result))


def run_ranks(folder: Path, runs: Dict[str, Any], timeout: float = 240) -> Dict[str, Any]:
    """Make the runs of worker.py, those of one world size in one process group.

    Args:
        folder: where specifications and results go.
        runs: name -> dict(argv, updates, dtype).

    Returns:
        name -> what each rank saw, a list.
    """
    by_size: Dict[int, Any] = {}
    for name, spec in runs.items():
        spec = dict(spec, argv=[str(a) for a in spec["argv"]], out=str(folder / name))
        by_size.setdefault(len(spec["updates"][0]), []).append(spec)
    for world_size, specs in by_size.items():
        spec_file = folder / f"{world_size}.json"
        spec_file.write_text(
            json.dumps({"runs": specs, "world_size": world_size, "port": free_port()})
        )
        logs = [folder / f"{world_size}.{rank}.log" for rank in range(world_size)]
        processes = [
            fork("tests.helpers.worker", [spec_file, rank], log) for rank, log in enumerate(logs)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.join()
        for rank, (process, log) in enumerate(zip(processes, logs)):
            output = log.read_text()[-4000:]
            assert process.exitcode == 0, f"rank {rank} of {world_size}:\n{output}"
    return {
        name: [
            torch.load(folder / f"{name}.{rank}.pt", weights_only=False)
            for rank in range(len(spec["updates"][0]))
        ]
        for name, spec in runs.items()
    }
