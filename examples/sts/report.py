"""Table 2 of the delta-SAM paper: what the runs of this example reached, beside its figures.

    python -m examples.sts.report results/sts --recipe roberta --out report

Complete runs count, whatever is still missing: the table says how many seeds a row has.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Dict, List, NamedTuple

import numpy as np

from deltasam_fairseq.markdown import markdown_table, spread
from deltasam_fairseq.sts.datasets import SETS
from examples.common.fairseq_log import read_log

ROWS = ("base", "r3f", "delta_sam", "r3f+delta_sam")
# Average, then each of SETS; means of five seeds.
PAPER = {
    "bert": {
        "base": [74.67, 68.02, 80.68, 71.80, 81.46, 74.48, 76.86, 69.41],
        "r3f": [75.25, 68.53, 80.82, 72.36, 81.99, 75.57, 77.74, 69.78],
        "delta_sam": [75.14, 68.48, 80.66, 72.15, 82.05, 74.45, 77.56, 70.61],
        "r3f+delta_sam": [75.55, 68.45, 81.03, 72.63, 82.33, 75.44, 78.18, 70.83],
    },
    "roberta": {
        "base": [75.40, 65.08, 82.02, 73.40, 80.33, 77.81, 79.14, 69.74],
        "r3f": [76.10, 66.43, 82.66, 74.22, 81.11, 78.72, 79.51, 70.08],
        "delta_sam": [75.54, 65.60, 82.03, 73.48, 80.56, 78.05, 79.15, 69.87],
        "r3f+delta_sam": [75.92, 66.28, 82.50, 73.93, 81.09, 78.45, 79.29, 69.91],
    },
}
TITLES = {"base": "Mirror", "r3f": "+ R3F", "delta_sam": "+ delta-SAM", "r3f+delta_sam": "+ both"}


class Run(NamedTuple):
    """What one run reached.

    Attributes:
        scores: Spearman x 100 of each set that was measured.
        dev: the same of STS-B's dev side, in training.
        seconds: of the updates; fairseq logs whole ones.
    """

    scores: Dict[str, float]
    dev: float
    seconds: float


def read_runs(folder: Path, row: str) -> List[Run]:
    """Return the complete runs of a row, by seed."""
    found = []
    for path in sorted(folder.glob(f"scores/{row}-seed*/sts.json")):
        epochs = read_log(folder / "runs" / path.parent.name / "train.log").epochs
        seconds = sum(epoch.get("train_train_wall", 0.0) for epoch in epochs)
        scores = json.loads(path.read_text(encoding="utf-8"))["spearman"]
        found.append(Run(scores, epochs[-1]["valid_spearman"], seconds))
    return found


def report(runs: Dict[str, List[Run]], recipe: str) -> str:
    """Return the page: a table of the runs, one of the paper's figures, what they are.

    Args:
        runs: row -> its runs; every run has scores on the same sets.
        recipe: ``bert`` or ``roberta``, of the paper's figures.

    Raises:
        ValueError: there is no run, or they were measured on different sets.
    """
    measured = {tuple(run.scores) for found in runs.values() for run in found}
    if len(measured) != 1:
        what = "no run is complete" if not measured else "runs were measured on different sets"
        raise ValueError(f"{what}; run examples.sts.run again")
    sets = [name for name in SETS if name in next(iter(measured))]
    of_base = [run.seconds for run in runs.get(ROWS[0], [])] or [0.0]
    base = np.mean(of_base)  # 0 if there is none, or all ended within half a second
    rows = []
    for row, found in runs.items():
        averages = [float(np.mean([run.scores[name] for name in sets])) for run in found]
        each = [spread([run.scores[name] for run in found], 2) for name in sets]
        seconds = float(np.mean([run.seconds for run in found]))
        relative = f"{seconds / base:.2f}" if base else "-"
        dev = spread([run.dev for run in found], 2)
        time = [f"{seconds:.0f}", relative]
        rows.append([TITLES[row], str(len(found)), spread(averages, 2), *each, dev, *time])
    header = ["", "seeds", f"average of {len(sets)}", *sets, "STS-B dev", "s", "s / Mirror"]
    missing = [name for name in SETS if name not in sets]
    without = f" Not measured: {', '.join(missing)}." if missing else ""
    paper = [[TITLES[row], *(f"{x:.2f}" for x in PAPER[recipe][row])] for row in ROWS]
    return "\n".join(
        [
            markdown_table(header, rows),
            "",
            f"Spearman x 100, mean ± standard deviation over seeds; s: of all updates.{without}",
            "",
            f"The paper's Table 2, {recipe} base, mean of five seeds:",
            "",
            markdown_table(["", "average of 7", *SETS], paper),
            "",
        ]
    )


def main() -> None:
    """Write ``report.md``."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.sts.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="--out of examples.sts.run")
    parser.add_argument("--recipe", choices=PAPER, required=True, help="whose figures are beside")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    found = {row: read_runs(args.folder, row) for row in ROWS}
    try:
        text = report({row: runs for row, runs in found.items() if runs}, args.recipe)
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: {args.folder}: {error}\n")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
