"""Report GLUE runs as papers do: tables, paired tests, times, curves; Markdown, CSV and HTML.

    python -m examples.glue.report OUT --out REPORT [--baseline adam] [--tasks ...] [--methods ...]

OUT holds OUT/<TASK>/<method>-seed<N>/train.log, fairseq's log with ``--log-format json
--log-file``, and, where it was measured, <method>-seed<N>-sharpness/sharpness.json beside it, as
``python -m deltasam_fairseq.sharpness --json`` writes it.  REPORT gets report.html, report.md, a
picture a task, and runs.csv, summary.csv, comparisons.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from examples.glue.report.content import Report, blocks_of, columns, make
from examples.glue.report.numbers import Row
from examples.glue.report.page import to_html, to_markdown
from examples.glue.report.runs import Metric, Run, number_of, read_runs

PAPER = Path(__file__).with_name("paper.json")


def write_csv(path: Path, rows: Sequence[Dict[str, Any]]) -> None:
    """Write rows with all their digits; an empty cell for what is missing."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        for row in rows:
            lacking = {k for k, v in row.items() if isinstance(v, float) and math.isnan(v)}
            writer.writerow({k: "" if k in lacking or v is None else v for k, v in row.items()})


def _run_row(run: Run, metric: Metric, row: Row) -> Dict[str, Any]:
    rise = run.rises.get(row.rho) if row.rho is not None else None
    return {
        "task": run.task,
        "method": run.method,
        "seed": run.seed,
        "state": run.state,
        "why": run.why,
        "metric": metric.key,
        "best": run.best,
        "best_epoch": run.best_epoch or None,
        "last": run.last,
        "epochs": number_of(run.log) or None,
        "updates_per_second": run.log.paces.get(row.pace_by),
        "pace_by": row.pace_by,
        "rho": row.rho,
        "sharpness": rise,
        "starts": run.log.starts or None,
        **run.parts,
    }


def write(report: Report, source: Path, out: Path, command: str) -> None:
    """Write report.html, report.md, the pictures and the three CSV files."""
    out.mkdir(parents=True, exist_ok=True)
    blocks = blocks_of(report, source, out, command)
    (out / "report.md").write_text(to_markdown(blocks), encoding="utf-8")
    (out / "report.html").write_text(to_html(blocks), encoding="utf-8")
    runs = report.runs
    write_csv(
        out / "runs.csv",
        [_run_row(r, runs.tasks[r.task], report.row(r.task, r.method)) for r in runs.runs],
    )
    rows = [row for row in report.rows if row.task in columns(report)]
    write_csv(
        out / "summary.csv",
        [{**{k: v for k, v in r._asdict().items() if k != "parts"}, **r.parts} for r in rows],
    )
    write_csv(
        out / "comparisons.csv",
        [
            {
                **{k: v for k, v in c._asdict().items() if k != "differences"},
                "n": len(c.differences),
                "differences": " ".join(f"{s}:{d!r}" for s, d in c.differences.items()),
            }
            for c in report.compared
        ]
        or [{"task": None}],
    )


def time_baseline(methods: Sequence[str], given: Optional[str]) -> Optional[str]:
    """Return the method whose time counts as 1: as given, else sam, else sam_adam, else sam_*."""
    found = [given] if given else ["sam", "sam_adam", *(m for m in methods if m[:4] == "sam_")]
    return next((method for method in found if method in methods), None)


def main(words: Optional[Sequence[str]] = None) -> int:
    """Write the report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", type=Path, metavar="OUT", help="holds <TASK>/<method>-seed<N>/train.log")
    add("--out", type=Path, required=True, metavar="REPORT", help="folder to write")
    add("--baseline", help="method that the others are compared with (default: adam)")
    add("--time-baseline", help="method whose time counts as 1 (default: sam, sam_adam or sam_*)")
    add("--tasks", nargs="+", help="read only these, in this order (default: all)")
    add("--methods", nargs="+", help="likewise; one that was not run is listed as missing")
    add("--paper", type=Path, default=PAPER, help="figures of the paper (default: the paper's)")
    args = parser.parse_args(words)
    try:
        if not args.runs.is_dir():
            raise ValueError(f"{args.runs}: is no folder; give the one that holds a folder a task")
        runs = read_runs(args.runs, args.tasks, args.methods)
        for option in ("baseline", "time_baseline"):
            value = getattr(args, option)
            if value is not None and value not in runs.methods:
                name, known = option.replace("_", "-"), ", ".join(runs.methods)
                raise ValueError(f"--{name} {value}: is not among the methods; name one of {known}")
        paper = json.loads(args.paper.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"examples.glue.report: {error}", file=sys.stderr)
        return 2
    baseline = args.baseline or ("adam" if "adam" in runs.methods else None)
    report = make(runs, baseline, time_baseline(runs.methods, args.time_baseline), paper)
    words = sys.argv[1:] if words is None else words
    command = "python -m examples.glue.report " + " ".join(map(shlex.quote, words))
    write(report, args.runs, args.out, command)
    complete = sum(run.state == "complete" for run in runs.runs)
    print(f"{args.out}: report.html, report.md, CSV files; {complete} of {len(runs.runs)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
