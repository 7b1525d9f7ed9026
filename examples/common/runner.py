"""Runs commands one after another: skips what is complete, shows progress, names the log."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from deltasam_fairseq.data.files import sha256
from examples.common import warm
from examples.common.fairseq_log import read_figures

STAMP = "stage.json"  # written last: a folder that holds it is complete
LOG = "output.log"
LOG_LINES = 15  # of a failed stage, shown


def module(name: str, *arguments: object) -> List[str]:
    """Return the command that runs a module: ``python -m name``."""
    return [sys.executable, "-m", name, *map(str, arguments)]


class StageStopped(RuntimeError):
    """A stage was ended because all were to stop."""


class StageError(RuntimeError):
    """A stage's command failed; the message names its log file and shows the end of it."""


class Stage(NamedTuple):
    """One command and the folder that it makes.

    Attributes:
        title: a few words to show.
        command: program and arguments; ``{out}`` stands for the folder to write.
        out: the folder in which the results are found afterwards.
        inputs: folders of earlier stages that it reads; remade whenever one of them was.
        seconds: expected on two cores, 0 if not known.
        spare: patterns of files that are removed when it is done.
        files: that it reads, beside the absolute paths in the command; remade whenever the content
            of one of them is another.
    """

    title: str
    command: Sequence[str]
    out: Path
    inputs: Sequence[Path] = ()
    seconds: int = 0
    spare: Sequence[str] = ()
    files: Sequence[Path] = ()


def fingerprint(stage: Stage) -> str:
    """Tell by the command and by what it reads whether a result is still good.

    By which name Python was started makes no difference.
    """
    inputs = [read_stamp(folder).get("fingerprint", "") for folder in stage.inputs]
    program, *arguments = stage.command
    program = "python" if program == sys.executable else program
    given = [Path(word) for word in arguments if os.path.isabs(word) and os.path.isfile(word)]
    made = [folder.absolute() for folder in stage.inputs]  # known by their fingerprints
    given = [p for p in given if p.suffix != ".py" and not any(f in p.parents for f in made)]
    told = [program, *arguments, *inputs, *map(content, [*given, *stage.files])]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()


def content(path: Path) -> str:
    """Return a checksum of a file's content, of YAML that of its meaning; empty without a file."""
    try:
        facts = path.stat()
    except OSError:
        return ""
    return _content(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=None)
def _content(path: Path, size: int, changed: int) -> str:
    if path.suffix != ".yaml":
        return sha256(path)
    import yaml  # is there with fairseq

    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def read_stamp(folder: Path) -> dict:
    """Return what was written when the stage ended; empty if it did not."""
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


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


def is_done(stage: Stage) -> bool:
    """Whether the stage's folder is there, complete, and made by the same command."""
    return read_stamp(stage.out).get("fingerprint") == fingerprint(stage)


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
    for pattern in stage.spare:
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


def split_words(words: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Return the words of a command line before ``--``, and those behind it."""
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def option_words(option: str) -> List[str]:
    """Return OPTION=VALUE, or OPTION, as words of a command; files by their absolute paths."""
    name, *value = option.split("=", 1)
    return ["--" + name, *(os.path.abspath(v) if os.path.isfile(v) else v for v in value)]


def sharpness_stage(title: str, run: Path, data: Path, checkpoint: str, *options: object) -> Stage:
    """Return the stage that measures how sharp the minimum is that a run ended in.

    Args:
        title: of the stage.
        run: folder of the run; the results go beside it, where the reports look for them.
        data: folder of the task's data.
        checkpoint: name of a file of the run.
        options: for the sharpness command.
    """
    command = [
        *(sys.executable, "-m", "deltasam_fairseq.sharpness", data, "--path", run / checkpoint),
        *(*options, "--max-batches", 10, "--json", "{out}/sharpness.json"),
    ]
    return Stage(title, [str(word) for word in command], sharpness_folder(run), [run])


def sharpness_folder(run: Path) -> Path:
    """Return the folder of what is measured of a run."""
    return run.with_name(run.name + "-sharpness")


def exit_code(work: Callable[[], object], program: str = "run.py") -> int:
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
