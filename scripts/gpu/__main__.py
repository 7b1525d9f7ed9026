"""Run the parts that settle, on a GPU, what a CPU cannot; each under a time limit of its own.

    bash scripts/gpu/first_run.sh --minutes 10
    bash scripts/gpu/first_run.sh --device cpu --minutes 3    # the dry run

    smoke      one update of every optimizer in every precision: finite, restored, logged
    tests      the tests that need a GPU
    costs      the benchmark: Adam, SAM, delta-SAM on RoBERTa base and large
    trainings  whole trainings of MiniLM on GLUE's small tasks

A part writes its findings as it goes: a cut at any moment leaves what was found before it.  A part
that fails, hangs or crashes does not stop the next; what a part leaves of its time is shared by
those behind it.  OUT gets ``first_run.md``, a JSON file a part, and ``output.log``.  What has been
started ends with this program, also where that is killed (on Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch

from deltasam_fairseq.data.files import atomic_write
from deltasam_fairseq.options import ranged

PARTS = {"smoke": 60, "tests": 120, "costs": 150, "trainings": 270}  # seconds of ten minutes
GRACE = 5  # seconds between asking a part to end and killing it
LAST_LINES = 15  # of the output of a part that failed, shown
ROOT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m scripts.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the dry run, tiny shapes")
    add("--minutes", type=ranged(float, above=0), default=10.0, help="for all parts (default: 10)")
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    add("--kit", type=Path, default=Path(".gpu"), help="folder with minilm/ and glue/")
    add("--out", type=Path, required=True, help="folder for the findings")
    add("--work", type=Path, help="folder for data and runs (default: a temporary one)")
    return options


def wrong(args: argparse.Namespace) -> Optional[str]:
    """Return what is wrong with the options and what to give instead, or None; makes OUT."""
    least = 2 * GRACE * len(args.parts) / 60
    if args.minutes < least:
        return f"--minutes {args.minutes:g}: {len(args.parts)} parts need at least {least:.2g}"
    if args.device == "cuda" and not torch.cuda.is_available():
        build = f"torch {torch.__version__} finds no GPU"
        return f"--device cuda: {build}; --device cpu --minutes 3 makes the dry run without one"
    for folder, option in ((args.out, "--out"), (args.work, "--work")):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            return f"{option} {folder}: cannot be written, {error.strerror}; give another folder"
    if (args.out / "first_run.md").exists():
        return f"--out {args.out}: has the findings of an earlier run; move them, or give another"
    return None


def end_with_parent() -> None:
    """Have the kernel end this process when its parent has died, where it can."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def facts(device: str, command: str) -> str:
    """Return the heading of the findings: card, versions, date, command."""
    machine = "CPU"
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        machine = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    line = f"{machine}; {versions}; {os.cpu_count()} CPU cores; {datetime.date.today()}"
    return f"# First run on a GPU\n\n{line}\n\n    {command}\n"


class FirstRun:
    """Runs the parts and keeps ``first_run.md`` up to date.

    Args:
        args: of the command line.
        work: folder for what is not a finding.
        heading: of the findings.
    """

    def __init__(self, args: argparse.Namespace, work: Path, heading: str) -> None:
        self.args, self.work, self.heading = args, work, heading
        self.state: Dict[str, str] = {}
        self.last_lines: Dict[str, List[str]] = {}

    def text(self) -> str:
        """Return what all parts have found so far."""
        pages = [self.heading]
        for part, state in self.state.items():
            page = self.work / f"{part}.md"
            found = page.read_text(encoding="utf-8").strip() if page.is_file() else ""
            lines = self.last_lines.get(part)
            last = "\n".join(["The end of its output:\n", *(f"    {x}" for x in lines or ())])
            blocks = [f"# Part {part}: {state}", found, last if lines else ""]
            pages.append("\n\n".join(block for block in blocks if block) + "\n")
        return "\n".join(pages)

    def write(self) -> None:
        """Write it; a disk that is full may have room later."""
        try:
            atomic_write(self.args.out / "first_run.md", self.text())
        except OSError as error:
            print(f"first_run.md: {error}", file=sys.stderr, flush=True)

    def command(self, part: str, seconds: float) -> List[str]:
        """Return the command of a part."""
        words: List[Any] = [sys.executable, "-m", f"scripts.gpu.{part}"]
        words += ["--device", self.args.device, "--seconds", round(seconds), "--kit", self.args.kit]
        return [str(word) for word in [*words, "--work", self.work, "--out", self.args.out]]

    def run(self, part: str, seconds: float) -> bool:
        """Run a part for at most ``seconds``; return whether it ended well."""
        begin, state = time.monotonic(), "interrupted"
        self.state[part] = "running"
        try:
            code = self._run(part, seconds)
            cut = time.monotonic() - begin >= seconds
            state = "cut at its time limit" if cut else f"failed with code {code}"
            state = "done" if code == 0 else state
        except OSError as error:
            state = f"failed, {error}"
        finally:
            self.state[part] = f"{state}, {time.monotonic() - begin:.0f} s"
            self.write()
            print(f"{part}: {self.state[part]}", flush=True)
        return state == "done"

    def _run(self, part: str, seconds: float) -> int:
        """Run a part; return its exit code, and keep its last lines where that is not 0."""
        deadline = time.monotonic() + seconds
        with (self.args.out / "output.log").open("a+b", buffering=0) as output:
            output.write(f"==== {part}, at most {seconds:.0f} s\n".encode())
            start = output.tell()
            process = subprocess.Popen(
                self.command(part, seconds - GRACE),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
            try:
                while process.poll() is None and time.monotonic() < deadline:
                    self.write()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=min(2.0, max(deadline - time.monotonic(), 0.01)))
            finally:
                end(process)
                if process.returncode != 0:
                    output.seek(start)
                    lines = output.read().decode(errors="replace").splitlines()
                    self.last_lines[part] = lines[-LAST_LINES:]
        return process.returncode


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a part and all that it has started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
        if sign == signal.SIGTERM and process.poll() is not None:
            time.sleep(0.2)  # its own children end with it


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the parts; return 0 if all ended well."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parser()
    args = options.parse_args(argv)
    args.parts = list(dict.fromkeys(args.parts))
    args.kit, args.out = args.kit.absolute(), args.out.absolute()
    message = wrong(args)
    if message:
        options.error(message)
    begin, limit = time.monotonic(), 60 * args.minutes
    heading = facts(args.device, shlex.join(["python", "-m", "scripts.gpu", *argv]))
    well = []
    with contextlib.ExitStack() as stack:
        work = args.work or stack.enter_context(
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        )
        run = FirstRun(args, Path(work).absolute(), heading)
        try:
            for i, part in enumerate(args.parts):
                left = limit - (time.monotonic() - begin)
                share = PARTS[part] / sum(PARTS[p] for p in args.parts[i:])
                well.append(run.run(part, max(left * share, 2 * GRACE)))
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        finally:
            print(run.text(), flush=True)
    return 0 if all(well) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
