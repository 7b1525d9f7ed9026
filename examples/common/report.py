"""Lay fine-tuning runs side by side: a table (Markdown, CSV) and the curves (PNG).

    python -m examples.common.report RUNS/adam-seed1 RUNS/sam_adam-seed1 \\
        --metric accuracy --out report

A run is a folder ``<method>-seed<number>`` with the JSON log of fairseq in ``train.log``
(``--log-format json --log-file``).  Where ``<run>-sharpness/sharpness.json`` stands beside it, as
``python -m deltasam_fairseq.sharpness`` writes it, the sharpness of the minimum is in the table.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from deltasam_fairseq.markdown import markdown_table

Epoch = Dict[str, float]  # fairseq's figures at the end of an epoch: valid_loss, train_ups, ...


class Run(NamedTuple):
    """One fine-tuning run: its epochs, and the sharpness of the weights that it ended with."""

    method: str
    seed: str
    epochs: List[Epoch]
    sharpness: Optional[float]


def read_epochs(log: Path) -> List[Epoch]:
    """Return the figures of every epoch; a run that was resumed repeats none."""
    epochs: Dict[int, Epoch] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        if not line.startswith('{"epoch"'):
            continue
        # Numbers come as strings, but for the epoch; validation also logs lists of predictions.
        stats = {k: float(v) for k, v in json.loads(line).items() if isinstance(v, (int, str))}
        if any(key.endswith("_loss") for key in stats):
            epochs.setdefault(int(stats["epoch"]), {}).update(stats)
    return [epochs[number] for number in sorted(epochs)]


def read_run(folder: Path) -> Run:
    """Read one run's folder.

    Raises:
        ValueError: there is no complete epoch in its log.
    """
    method, _, seed = folder.name.rpartition("-seed")
    epochs = read_epochs(folder / "train.log")
    if not epochs or "train_ups" not in epochs[-1]:
        raise ValueError(f"{folder / 'train.log'}: holds no complete epoch")
    measured = folder.with_name(folder.name + "-sharpness") / "sharpness.json"
    sharpness = None
    if measured.is_file():
        figures = json.loads(measured.read_text(encoding="utf-8"))
        sharpness = figures["sharpness"][-1]["per_batch"]["mean"]
    return Run(method, seed, epochs, sharpness)


def seconds(run: Run) -> float:
    """Return how long the updates took, less start-up: updates / (updates a second), by epoch."""
    total, before = 0.0, 0.0
    for epoch in run.epochs:
        total += (epoch["train_num_updates"] - before) / max(epoch["train_ups"], 1e-9)
        before = epoch["train_num_updates"]
    return total


def mean(values: Sequence[Optional[float]], digits: int) -> str:
    """Return mean and standard deviation; a dash where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def table(runs: Sequence[Run], metric: str) -> List[Dict[str, str]]:
    """Return one row a method, means over its seeds; times relative to the first."""
    by_method: Dict[str, List[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    key = f"valid_{metric}"
    first = statistics.mean(seconds(run) for run in next(iter(by_method.values())))
    rows = []
    for method, group in by_method.items():
        time = statistics.mean(seconds(run) for run in group)
        last = [run.epochs[-1] for run in group]
        rows.append(
            {
                "method": method,
                "seeds": str(len(group)),
                f"{metric}": mean([epoch.get(key) for epoch in last], 1),
                f"best {metric}": mean([max(e.get(key, 0) for e in r.epochs) for r in group], 1),
                **{
                    f"{metric} ({subset})": mean([e.get(f"{subset}_{metric}") for e in last], 1)
                    for subset in extra_subsets(runs[0], metric)
                },
                "valid loss": mean([epoch.get("valid_loss") for epoch in last], 3),
                "sharpness": mean([run.sharpness for run in group], 4),
                "time (s)": f"{time:.1f}",
                f"time / {next(iter(by_method))}": f"{time / first:.2f}",
            }
        )
    return rows


def extra_subsets(run: Run, metric: str) -> List[str]:
    """Return the validation sets beside ``valid``, such as MNLI's mismatched ``valid1``."""
    keys = sorted(run.epochs[-1])
    return [key.split("_")[0] for key in keys if re.fullmatch(rf"valid\d+_{metric}", key)]


def draw(runs: Sequence[Run], metric: str, path: Path) -> None:
    """Draw the metric, the losses and the sharpness that the training logged, over epochs."""
    from matplotlib.figure import Figure

    panels = {
        f"valid_{metric}": metric.replace("_", " ") + ", validation",
        "valid_loss": "loss, validation",
        "train_loss": "loss, training (at w)",
        "train_sharpness": "sharpness, training",
    }
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r.method for r in runs))}
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items()):
        labelled = set()
        for run in runs:
            points = [(epoch["epoch"], epoch[key]) for epoch in run.epochs if key in epoch]
            if not points:
                continue
            label = None if run.method in labelled else run.method
            labelled.add(run.method)
            axes.plot(*zip(*points), marker="o", ms=3, color=colours[run.method], label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if labelled:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Write ``report.md``, ``report.csv`` and ``curves.png``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders <method>-seed<number>")
    parser.add_argument("--metric", default="accuracy", help="key of fairseq's log, less valid_")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()

    runs = [read_run(folder) for folder in args.runs]
    rows = table(runs, args.metric)
    args.out.mkdir(parents=True, exist_ok=True)
    note = (
        "\nMetric and loss: on the validation data, at the last epoch; best: of all epochs.\n"
        "Sharpness: by how much the validation loss (nats) rises along SAM's ascent, at the last\n"
        "weights. Time: of the updates, without start-up.\n"
    )
    table_ = markdown_table(list(rows[0]), [list(row.values()) for row in rows])
    (args.out / "report.md").write_text(f"{table_}\n{note}", encoding="utf-8")
    with (args.out / "report.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(runs, args.metric, args.out / "curves.png")


if __name__ == "__main__":
    main()
