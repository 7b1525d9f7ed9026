"""Runs of fairseq-train with several ranks, each a process that is forked from this one.

    python forked.py SPEC.json

Forked because importing torch and fairseq takes longer than the runs. The specification is a
list of runs that are made one after the other: ``out`` (prefix of files), ``ranks`` (a command
line each), ``env``, ``timeout`` in seconds, ``hanging`` (how many ranks are not waited for).
Written: OUT.RANK.log, and OUT.json with ``status``, the exit status of every rank (negative: a
signal; None: it did not end by itself), and ``later``, the seconds from the first end to its own.
"""

import json
import os
import signal
import sys
import time
import traceback

import fairseq_cli.train  # noqa: F401
import torch

torch.set_num_threads(1)


def become(argv, env, log):
    """One rank: fairseq-train with this command line, as a process of its own."""
    fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ.update(env)
    sys.argv = ["fairseq-train", *argv]
    status = 0
    try:
        fairseq_cli.train.cli_main()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(spec):
    pids = {}
    for rank, argv in enumerate(spec["ranks"]):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            become(argv, spec["env"], f"{spec['out']}.{rank}.log")
        pids[pid] = rank
    statuses, ends, start = {}, {}, time.monotonic()
    while (
        len(statuses) < len(pids) - spec["hanging"] and time.monotonic() - start < spec["timeout"]
    ):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.01)
            continue
        killed = os.WIFSIGNALED(status)
        statuses[pids[pid]] = -os.WTERMSIG(status) if killed else os.WEXITSTATUS(status)
        ends[pids[pid]] = time.monotonic()
    for pid, rank in pids.items():
        if rank not in statuses:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    first = min(ends.values(), default=start)
    result = {
        "status": [statuses.get(rank) for rank in range(len(pids))],
        "later": [ends[rank] - first if rank in ends else None for rank in range(len(pids))],
    }
    with open(f"{spec['out']}.json", "w") as f:
        json.dump(result, f)


if __name__ == "__main__":
    with open(sys.argv[1]) as f:
        for each in json.load(f):
            run(each)
