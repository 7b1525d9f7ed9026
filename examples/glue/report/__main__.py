"""Report runs as papers do: tables, paired tests, times, curves; Markdown, CSV and HTML.

    python -m examples.glue.report OUT --out REPORT [--baseline adam] [--tasks ...] [--methods ...]

OUT holds OUT/<TASK>/<method>-seed<N>/train.log, fairseq's log with ``--log-format json
--log-file``, and, where it was measured, <method>-seed<N>-sharpness/sharpness.json beside it, as
``python -m deltasam_fairseq.sharpness --json`` writes it.  REPORT gets report.html, report.md, a
picture a task, and runs.csv, summary.csv, comparisons.csv.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Dict, Optional, Sequence

import pandas as pd

from examples.glue.report import plots
from examples.glue.report.content import Report, context, make
from examples.glue.report.numbers import Comparison
from examples.glue.report.page import to_html, to_markdown
from examples.glue.report.runs import EARLY, read_runs, rescored

PAPER = Path(__file__).with_name("paper.json")


def write_csv(report: Report, out: Path) -> None:
    """Write all figures with all their digits; an empty cell for what is missing."""
    report.runs.frame().to_csv(out / "runs.csv", index=False)
    report.rows.to_csv(out / "summary.csv", index=False)
    compared = pd.DataFrame(report.compared, columns=Comparison._fields)
    differences = compared.pop("differences")
    compared["n"] = [len(found) for found in differences]
    compared["differences"] = [
        " ".join(f"{seed}:{d!r}" for seed, d in found.items()) for found in differences
    ]
    compared.to_csv(out / "comparisons.csv", index=False)


def write(report: Report, source: Path, out: Path, command: str) -> None:
    """Write report.html, report.md, the pictures and the three CSV files."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(report, out)
    facts = {**context(report), "source": source, "command": command}
    facts["date"] = datetime.date.today().isoformat()
    styles = plots.line_styles(report.runs.methods)
    figures: Dict[str, Sequence[str]] = {}
    for index, section in enumerate(facts["tasks"]):
        methods = [method for method in report.runs.methods if not method.endswith(EARLY)]
        groups = {m: report.runs.of(section["name"], m) for m in methods}
        groups = {method: group for method, group in groups.items() if group}
        found = [c for c in report.compared if c.task == section["name"]]
        panels = plots.task_panels(groups, section["metric"], found, styles)
        png, section["png"] = section["png"], section["png"] if panels else ""
        if panels:
            plots.write_png(panels, {m: styles[m] for m in groups}, out / png)
            svgs = [plots.as_svg(panel, f"f{index}-{i}") for i, panel in enumerate(panels)]
            figures[png] = [plots.html_legend({m: styles[m] for m in groups}), *svgs]
    text = to_markdown(facts)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(to_html(text, figures), encoding="utf-8")


def time_baseline(methods: Sequence[str], given: Optional[str]) -> Optional[str]:
    """Return the method whose time counts as 1: as given, else sam, else sam_adam, else sam_*."""
    found = [given] if given else ["sam", "sam_adam", *(m for m in methods if m[:4] == "sam_")]
    return next((method for method in found if method in methods), None)


def main(words: Optional[Sequence[str]] = None) -> int:
    """Write the report; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.glue.report", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("runs", type=Path, metavar="OUT", help="holds <TASK>/<method>-seed<N>/train.log")
    add("--out", type=Path, required=True, metavar="REPORT", help="folder to write")
    add("--baseline", help="method that the others are compared with (default: adam)")
    add("--time-baseline", help="method whose time counts as 1 (default: sam, sam_adam or sam_*)")
    add("--tasks", nargs="+", help="read only these, in this order (default: all)")
    add("--methods", nargs="+", help="likewise; one that was not run is listed as missing")
    add("--metric", metavar="KEY", help="of the log, as dev_accuracy (default: the task's metric)")
    add("--epoch", choices=("best", "last"), default="best", help="to score (default: best)")
    add(
        "--early",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="rows METHOD:early: the same runs at the best epoch by the task's metric on valid",
    )
    add("--paper", type=Path, default=PAPER, help="figures of the paper (default: paper.json)")
    args = parser.parse_args(words)
    try:
        if not args.runs.is_dir():
            raise ValueError(f"{args.runs}: not a directory; give the one with a folder a task")
        runs = read_runs(args.runs, args.tasks, args.methods)
        if args.metric or args.early or args.epoch != "best":
            runs = rescored(runs, args.metric, args.epoch, args.early)
        for option in ("baseline", "time_baseline"):
            value = getattr(args, option)
            if value is not None and value not in runs.methods:
                name, known = option.replace("_", "-"), ", ".join(runs.methods)
                raise ValueError(f"--{name} {value}: is not among the methods; name one of {known}")
        paper = json.loads(args.paper.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    baseline = args.baseline or ("adam" if "adam" in runs.methods else None)
    report = make(runs, baseline, time_baseline(runs.methods, args.time_baseline), paper)
    words = sys.argv[1:] if words is None else words
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq has set it to DEBUG
    write(report, args.runs, args.out, f"{parser.prog} {' '.join(map(shlex.quote, words))}")
    complete = sum(run.state == "complete" for run in runs.runs)
    print(f"{args.out}: report.html, report.md, CSV files; {complete} of {len(runs.runs)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
