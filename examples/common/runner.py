"""Runs commands one after another: skips what is complete, shows progress, names the log."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Union

from examples.common import warm
from examples.common.fairseq_log import read_figures
from examples.common.stage import STAMP, Stage, fingerprint, is_done, sharpness_folder

LOG = "output.log"
LOG_LINES = 15  # of a failed stage, shown


class StageStopped(RuntimeError):
    """A stage was ended because all were to stop."""


class StageError(RuntimeError):
    """A stage's command failed; the message names its log file and shows the end of it."""


def last_lines(log: Path, count: int) -> List[str]:
    """Return the last lines of a log that are not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]


def progress(log: Path) -> str:
    """Return what the newest line of fairseq's JSON log says, in short; empty if there is none."""
    found = next(filter(None, map(read_figures, reversed(last_lines(log, LOG_LINES)))), {})
    figures = {key.replace("train_", "").replace("valid_", ""): v for key, v in found.items()}
    keys = ("epoch", "num_updates", "loss", "accuracy")
    return ", ".join(f"{key} {figures[key]:g}" for key in keys if key in figures)


def run(
    stage: Stage,
    position: str,
    cores: int,
    environment: Optional[Dict[str, str]] = None,
    stop: Optional[threading.Event] = None,
) -> None:
    """Run one stage, unless its folder is there and complete.

    The command writes to ``<out>.partial``, renamed at the end.  A partial folder of the same
    command is kept, so that training goes on from its last checkpoint.

    Raises:
        StageError: the command failed, or another process makes the same folder.
    """
    if not is_done(stage):
        with locked(stage) as lock:
            if not is_done(stage):
                _make(stage, lock, position, cores, environment, stop)
                return
    print(f"[{position}] {stage.title}: already there", flush=True)


@contextlib.contextmanager
def locked(stage: Stage) -> Iterator[int]:
    """Keep other processes from making the stage; the value is a file descriptor.

    A command that inherits it holds the lock too: it may outlive this program, which may be killed.

    Raises:
        StageError: another process makes it.
    """
    path = stage.out.with_name(stage.out.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            raise StageError(
                f"{stage.title} is being made by another process in {stage.out}.partial; "
                "wait for it, or end it"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            break
        os.close(file)  # whoever had it before has just removed it
    try:
        yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(file)


def _make(
    stage: Stage,
    lock: int,
    position: str,
    cores: int,
    environment: Optional[Dict[str, str]],
    stop: Optional[threading.Event],
) -> None:
    """Run a stage's command; ``lock`` is inherited by it."""
    mark = fingerprint(stage)
    partial = stage.out.with_name(stage.out.name + ".partial")
    started = partial / "started"
    if not started.exists() or started.read_text() != mark:
        remove(partial)
        partial.mkdir(parents=True)
        started.write_text(mark)
    log = partial / LOG
    command = [part.replace("{out}", str(partial)) for part in stage.command]
    begin = time.monotonic()
    # Threads that wait asleep: a busy machine would stall ones that wait awake.
    threads = {"OMP_NUM_THREADS": str(cores), "OMP_WAIT_POLICY": "PASSIVE"}
    variables = {**os.environ, **threads, "PYTHONHASHSEED": "0", **(environment or {})}
    with log.open("ab") as output:
        process = warm.start(command, output, lock, variables)
        try:
            watch(process, stage, position, log, begin, stop)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        lines = last_lines(log, 10 * LOG_LINES)
        causes = [line for line in lines[:-LOG_LINES] if "size mismatch" in line][:2]
        shown = "\n".join("    " + line for line in causes + lines[-LOG_LINES:])
        raise StageError(
            f"{stage.title} failed with code {process.returncode}\n{shown}\nlog: {log}"
        )
    seconds = round(time.monotonic() - begin, 1)
    for pattern in stage.removed_when_done:
        for path in partial.glob(pattern):
            path.unlink()
    started.unlink()
    stamp = {"fingerprint": mark, "command": list(stage.command), "seconds": seconds}
    (partial / STAMP).write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    remove(stage.out)
    remove(sharpness_folder(stage.out))  # of weights that are no more
    partial.rename(stage.out)


def watch(
    process: Union[warm.Fork, subprocess.Popen],
    stage: Stage,
    position: str,
    log: Path,
    begin: float,
    stop: Optional[threading.Event] = None,
) -> None:
    """Show the elapsed and the expected time and the newest figures until the process ends.

    Raises:
        StageStopped: ``stop`` was set.
    """
    live = sys.stdout.isatty() and threading.current_thread() is threading.main_thread()
    expected = f" of about {stage.seconds} s" if stage.seconds else ""
    if not live:
        print(f"[{position}] {stage.title}{expected and ':' + expected[3:]}", flush=True)
    next_line = begin + 20
    while True:
        try:
            process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            pass
        if stop is not None and stop.is_set():
            raise StageStopped(stage.title)
        now = time.monotonic()
        ended = process.returncode is not None
        line = f"[{position}] {stage.title}: {now - begin:.0f} s{'' if ended else expected}"
        figures = progress(log)
        line += f" ({figures})" if figures else ""
        if live:
            print("\r" + line[:110].ljust(110), end="\n" if ended else "", flush=True)
        elif ended or now > next_line:
            next_line = now + 20
            print(line, flush=True)
        if ended:
            return


def exit_code(work: Callable[[], object], program: str) -> int:
    """Call ``work``, say how it ended if it did not end well, and return the exit code."""
    try:
        work()
    except StageError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def remove(folder: Path) -> None:
    """Remove a folder that may not be there."""
    shutil.rmtree(folder, ignore_errors=True)


def run_side_by_side(
    jobs: Sequence[Sequence[Stage]], cores: int, environments: Sequence[Dict[str, str]]
) -> Dict[str, str]:
    """Run jobs that do not depend on each other, as many at a time as there are environments.

    A job that fails does not stop the others.

    Args:
        jobs: to run; each is stages that are run in order.
        cores: threads of each.
        environments: variables of each place to run at, such as CUDA_VISIBLE_DEVICES.

    Returns:
        title -> message of the stages that failed.
    """
    waiting = [(f"{i}/{len(jobs)}", job) for i, job in enumerate(jobs, start=1)]
    waiting.reverse()
    failed: Dict[str, str] = {}
    took: List[float] = []
    stop = threading.Event()
    todo = sum(not all(map(is_done, job)) for job in jobs)

    def work(environment: Dict[str, str]) -> None:
        while waiting and not stop.is_set():
            position, job = waiting.pop()
            fresh, begin = not all(map(is_done, job)), time.monotonic()
            for stage in job:
                try:
                    run(stage, position, cores, environment, stop)
                except StageStopped:
                    return
                except StageError as error:
                    failed[stage.title] = str(error)
                    print(f"[{position}] {stage.title}: FAILED, going on with others", flush=True)
                    break
            if fresh:
                took.append(time.monotonic() - begin)
                left = (todo - len(took)) * sum(took) / len(took) / len(environments)
                print(f"{len(took)} of {todo} ended, about {left / 60:.0f} min left", flush=True)

    with concurrent.futures.ThreadPoolExecutor(len(environments)) as pool:
        futures = [pool.submit(work, environment) for environment in environments]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            raise
    return failed


def run_all(stages: Sequence[Stage], cores: int) -> None:
    """Run the stages in order; the first failure ends it."""
    for number, stage in enumerate(stages, start=1):
        run(stage, f"{number}/{len(stages)}", cores)
