"""SLURM's commands as far as the examples use them, on this machine; tasks are processes.

    sbatch [OPTIONS] SCRIPT [ARGUMENTS]    reads #SBATCH lines, starts the script; knows --wait
    srun [OPTIONS] COMMAND                 starts it once a task, with SLURM's variables
    scontrol show hostnames LIST           every node is this machine
    scontrol requeue ID                    notes the request in $SLURM_HERE/requeued
    sacct                                  all jobs are running

`install` makes them; ``$SLURM_HERE`` is a folder for what they note.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

JOB_ID = str(os.getpid() % 10000)
WITH_VALUE = ("--output", "--error")


def install(folder, environment=os.environ):
    """Make the commands in `folder`; returns the variables with which they are found."""
    bin_dir = folder / "bin"
    bin_dir.mkdir()
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        (bin_dir / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        (bin_dir / name).chmod(0o755)
    return {"PATH": f"{bin_dir}{os.pathsep}{environment['PATH']}", "SLURM_HERE": str(folder)}


def split(words):
    """Options, as a dictionary, and the command behind them."""
    options, words = {}, list(words)
    while words and words[0].startswith("-"):
        name, _, value = words.pop(0).partition("=")
        options[name] = words.pop(0) if name in WITH_VALUE else value
    return options, words


def sbatch(words):
    given, (script, *arguments) = split(words)
    lines = [line.split()[1] for line in open(script) if line.startswith("#SBATCH --")]
    options = {**split(lines)[0], **given}
    env = {
        **os.environ,
        "SLURM_JOB_ID": JOB_ID,
        "SLURM_NNODES": options["--nodes"],
        "SLURM_JOB_NUM_NODES": options["--nodes"],
        "SLURM_NTASKS_PER_NODE": options["--ntasks-per-node"],
        "SLURM_JOB_NODELIST": f"node[1-{options['--nodes']}]",
    }
    with open(Path(os.environ["SLURM_HERE"]) / "output", "a") as output:
        job = subprocess.Popen(
            ["bash", script, *arguments], env=env, stdout=output, stderr=subprocess.STDOUT
        )
    print(f"Submitted batch job {JOB_ID}", flush=True)
    return job.wait() if "--wait" in options else 0


def srun(words):
    options, command = split(words)
    tasks_per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
    n = int(os.environ["SLURM_NNODES"]) * tasks_per_node
    tasks = []
    for rank in range(n):
        env = {
            **os.environ,
            "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
            "SLURM_NTASKS": str(n),
            "SLURM_PROCID": str(rank),
            "SLURM_NODEID": str(rank // tasks_per_node),
            "SLURM_LOCALID": str(rank % tasks_per_node),
        }
        tasks.append(subprocess.Popen(command, env=env))
    while None in [task.poll() for task in tasks]:
        if any(task.returncode for task in tasks):  # as srun --kill-on-bad-exit
            for task in tasks:
                task.terminate()
        time.sleep(0.1)
    return max(abs(task.returncode) for task in tasks)


def scontrol(words):
    if words[0] == "requeue":
        (Path(os.environ["SLURM_HERE"]) / "requeued").write_text(words[1])
    else:
        print("localhost\n" * int(os.environ["SLURM_NNODES"]), end="")
    return 0


def sacct(words):
    print("JobID|State|NodeList")
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
