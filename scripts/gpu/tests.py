"""Part 2: run the tests that need a GPU, and say of each how it ended, as it ends."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest

from deltasam_fairseq.data.files import atomic_write
from deltasam_fairseq.markdown import markdown_table
from scripts.gpu.part import part_options

LINES = 12  # of a failure's report
AT_A_TIME = 6  # tests on the one card, where pytest-xdist can start them
LONGEST = 45  # seconds of a test, where pytest-timeout can end it


class Record:
    """A pytest plugin that writes the outcome of every test as soon as it is known."""

    def __init__(self, out: Path, page: Path) -> None:
        self.out, self.page = out, page
        self.tests: Dict[str, Dict[str, Any]] = {}
        self.errors: List[str] = []

    def pytest_collectreport(self, report: Any) -> None:
        """Note a file that cannot be collected."""
        if report.failed:
            self.errors.append(f"{report.nodeid}: {str(report.longrepr)[-1500:]}")
            self.write()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note a test that begins: if it hangs or crashes, this is all there will be."""
        self.tests[nodeid] = {"outcome": "begun", "seconds": 0.0, "report": ""}
        self.write()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note how a phase of a test ended; a failure of one is the test's."""
        test = self.tests[report.nodeid]
        test["seconds"] = round(test["seconds"] + report.duration, 2)
        if report.when == "call" or report.outcome != "passed":
            if test["outcome"] != "failed":
                test["outcome"] = report.outcome
        if report.outcome == "failed":
            test["report"] += str(report.longrepr)
        elif report.outcome == "skipped":
            test["report"] = str(report.longrepr[-1]) if report.longrepr else ""
        if report.when == "call":
            # Figures that a test prints, without what fairseq logs.
            test["printed"] = [x for x in report.capstdout.splitlines() if x and " | " not in x]
        self.write()

    def write(self) -> None:
        """Write both forms."""
        found = {"tests": self.tests, "collection_errors": self.errors}
        atomic_write(self.out, json.dumps(found, indent=1))
        counts = collections.Counter(test["outcome"] for test in self.tests.values())
        rows = [[t["outcome"], f"{t['seconds']:.1f}", name] for name, t in self.tests.items()]
        text = ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "no tests"
        printed = [f"\n    {x}" for t in self.tests.values() for x in t.get("printed", ())]
        text += "".join(["\n", *printed] if printed else []) + "\n"
        for name, test in self.tests.items():
            if test["outcome"] == "failed":
                lines = test["report"].splitlines()[-LINES:]
                text += f"\n{name}\n\n" + "\n".join("    " + line for line in lines) + "\n"
        for error in self.errors:
            text += "\nNot collected: " + "\n".join("    " + x for x in error.splitlines()) + "\n"
        if rows:
            text += "\n" + markdown_table(["outcome", "seconds", "test"], rows) + "\n"
        atomic_write(self.page, text)


def main() -> int:
    """Run them; return 0 if none failed."""
    args = part_options("tests", __doc__).parse_args()
    begin = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    record = Record(args.out / "tests.json", args.work / "tests.md")
    words = ["-m", "cuda", "-p", "no:cacheprovider", "--color=no", "-q", "--tb=short"]
    words += [f"--basetemp={args.work / 'pytest'}", "tests"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        words.append(f"--timeout={LONGEST}")
    if args.device == "cuda" and importlib.util.find_spec("xdist") is not None:
        words += ["-n", str(min(AT_A_TIME, os.cpu_count() or 1)), "--dist", "worksteal"]
    code = pytest.main(words, plugins=[record])
    record.write()
    print(f"{time.monotonic() - begin:.0f} s, pytest's exit code {int(code)}")
    none = pytest.ExitCode.NO_TESTS_COLLECTED
    return 0 if code == pytest.ExitCode.OK else (3 if code == none else 1)


if __name__ == "__main__":
    sys.exit(main())
