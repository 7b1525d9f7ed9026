"""Run the parts that settle, on a GPU, what a CPU cannot; each under a time limit of its own.

    bash scripts/gpu/first_run.sh --minutes 10
    bash scripts/gpu/first_run.sh --device cpu --minutes 3    # the dry run

    smoke      one update of every optimizer in every precision: finite, restored, logged
    tests      the tests that need a GPU
    costs      the benchmark: Adam, SAM, delta-SAM on RoBERTa base and large
    trainings  whole trainings of MiniLM on GLUE's small tasks

A part writes its findings as it goes: a cut at any moment leaves what was found before it.  A part
that fails, hangs or crashes does not stop the next; what a part leaves of its time is shared by
those behind it.  OUT gets ``first_run.md``, a JSON file a part, and ``output.log``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from deltasam_fairseq.data.files import atomic_write
from deltasam_fairseq.options import ranged

PARTS = {"smoke": 60, "tests": 120, "costs": 150, "trainings": 270}  # seconds of ten minutes
GRACE = 5  # seconds between asking a part to end and killing it
LAST_LINES = 15  # of the output of a part that failed, shown


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


def facts(device: str, command: Sequence[str]) -> str:
    """Return the heading of the findings: card, versions, date, command."""
    script = (
        "import platform, torch; c = torch.cuda; card = c.get_device_name() + ', ' + "
        "'%.0f GiB' % (c.get_device_properties(0).total_memory / 2**30) if "
        f"{device == 'cuda'} else 'CPU'; "
        "print(f'{card}; torch {torch.__version__}, Python {platform.python_version()}')"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    versions = found.stdout.strip() or (found.stderr.strip().splitlines() or ["no answer"])[-1]
    date = datetime.date.today().isoformat()
    return (
        f"# First run on a GPU\n\n{versions}; {os.cpu_count()} CPU cores; {date}\n\n    {command}\n"
    )


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

    def write(self) -> None:
        """Write what all parts have found so far."""
        pages = [self.heading]
        for part, state in self.state.items():
            page = self.work / f"{part}.md"
            text = page.read_text(encoding="utf-8") if page.is_file() else ""
            pages.append(f"# Part {part}: {state}\n\n{text}".rstrip() + "\n")
        atomic_write(self.args.out / "first_run.md", "\n".join(pages))

    def command(self, part: str, seconds: float) -> List[str]:
        """Return the command of a part."""
        words: List[Any] = [sys.executable, "-m", f"scripts.gpu.{part}"]
        words += ["--device", self.args.device, "--seconds", round(seconds), "--kit", self.args.kit]
        return [str(word) for word in [*words, "--work", self.work, "--out", self.args.out]]

    def run(self, part: str, seconds: float) -> bool:
        """Run a part for at most ``seconds``; return whether it ended well."""
        begin = time.monotonic()
        self.state[part] = "running"
        log = self.args.out / "output.log"
        with log.open("ab") as output:
            output.write(f"==== {part}, at most {seconds:.0f} s\n".encode())
            output.flush()
            start = output.tell()
            process = subprocess.Popen(
                self.command(part, seconds - GRACE),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
            try:
                self._wait(process, begin + seconds)
            finally:
                end(process)
        took = time.monotonic() - begin
        code = process.returncode
        well = code == 0
        cut = took >= seconds
        ending = "cut at its time limit" if cut else f"failed with code {code}"
        self.state[part] = f"{'done' if well else ending}, {took:.0f} s"
        if not well:
            with log.open("rb") as output:
                output.seek(start)
                lines = output.read().decode(errors="replace").splitlines()[-LAST_LINES:]
            page = self.work / f"{part}.md"
            found = page.read_text(encoding="utf-8") if page.is_file() else ""
            last = "\n".join("    " + line for line in lines)
            atomic_write(page, f"{found}\nThe end of its output:\n\n{last}\n")
        self.write()
        print(f"{part}: {self.state[part]}", flush=True)
        return well

    def _wait(self, process: "subprocess.Popen[bytes]", deadline: float) -> None:
        while process.poll() is None and time.monotonic() < deadline:
            self.write()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(2.0, max(deadline - time.monotonic(), 0.01)))


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
    args = parser().parse_args(argv)
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    begin, limit = time.monotonic(), 60 * args.minutes
    heading = facts(args.device, shlex.join(["python", "-m", "scripts.gpu", *argv]))
    with contextlib.ExitStack() as stack:
        work = args.work or stack.enter_context(
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        )
        run = FirstRun(args, Path(work).absolute(), heading)
        run.work.mkdir(parents=True, exist_ok=True)
        well = []
        for i, part in enumerate(args.parts):
            left = limit - (time.monotonic() - begin)
            share = PARTS[part] / sum(PARTS[p] for p in args.parts[i:])
            well.append(run.run(part, max(left * share, 2 * GRACE)))
        text = (args.out / "first_run.md").read_text(encoding="utf-8")
    print(text)
    return 0 if all(well) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
