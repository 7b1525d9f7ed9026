"""Compare fine-tuning runs: a table (Markdown, CSV) and the curves (PNG).

    python -m examples.common.report RUNS/adam-seed1 RUNS/sam_adam-seed1 \\
        --metric accuracy --out report

A run is a folder ``<method>-seed<number>`` with the JSON log of fairseq in ``train.log``
(``--log-format json --log-file``).  Where ``<run>-sharpness/sharpness.json`` is beside it, as
``python -m deltasam_fairseq.sharpness`` writes it, the sharpness of the minimum is in the table.
Where the run was validated on ``kept`` and ``replaced``, the training rows with right and with
wrong labels (``python -m deltasam_fairseq.glue.prepare --label-noise``), what was learnt of each.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any, Dict, Sequence

import pandas as pd

from deltasam_fairseq.markdown import markdown_table, spread
from examples.common.fairseq_log import WHOLE_EPOCHS, read_log
from examples.common.stage import sharpness_folder

NOTE = """
Metric and loss: on the validation data, at the last epoch; best: of all epochs.
Sharpness: by how much the validation loss (nats) rises along SAM's ascent, at the last
weights. Time: of the updates, without start-up.
"""
NOTE_NOISE = """Right labels, wrong labels: on how many of the training rows of either kind the
model agrees with the label, at the last epoch; with the wrong ones it agrees where it is wrong
itself or has learnt them by heart.
"""
LEARNT = {"right labels": "kept_accuracy", "wrong labels": "replaced_accuracy"}


def read_run(folder: Path, metric: str) -> Dict[str, Any]:
    """Return a run's row of the table, before means, and its ``epochs``.

    Raises:
        ValueError: there is no complete epoch in its log.
    """
    log = read_log(folder / "train.log")
    if not log.epochs or "train_ups" not in log.epochs[-1]:
        raise ValueError(f"{folder / 'train.log'}: holds no complete epoch")
    last, key = log.epochs[-1], f"valid_{metric}"
    measured, sharpness = sharpness_folder(folder) / "sharpness.json", None
    if measured.is_file():
        figures = json.loads(measured.read_text(encoding="utf-8"))
        sharpness = figures["sharpness"][-1]["per_batch"]["mean"]
    # validation sets beside ``valid``, such as MNLI's mismatched ``valid1``
    others = [k for k in sorted(last) if re.fullmatch(rf"valid\d+_{metric}", k)]
    return {
        "method": folder.name.rpartition("-seed")[0],
        metric: last.get(key),
        f"best {metric}": max(epoch.get(key, 0.0) for epoch in log.epochs),
        **{f"{metric} ({other.split('_')[0]})": last[other] for other in others},
        **{name: last[key] for name, key in LEARNT.items() if key in last},
        "valid loss": last.get("valid_loss"),
        "sharpness": sharpness,
        "time (s)": last["train_num_updates"] / log.updates_per_second[WHOLE_EPOCHS],
        "epochs": log.epochs,
    }


def table(runs: Sequence[Dict[str, Any]]) -> pd.DataFrame:
    """Return one row a method, means and standard deviations over its seeds, as text.

    A figure that one of the seeds lacks is a dash; times are also relative to the first method.
    """
    frame = pd.DataFrame(runs).drop(columns="epochs").astype({"sharpness": float})
    groups = frame.groupby("method", sort=False)
    digits = {"valid loss": 3, "sharpness": 4}
    rows = pd.DataFrame({"seeds": groups.size().astype(str)})
    for name in frame.columns[1:-1]:
        rows[name] = [
            "-" if values.isna().any() else spread(values, digits.get(name, 1))
            for _, values in groups[name]
        ]
    time = groups["time (s)"].mean()
    rows["time (s)"] = time.map("{:.1f}".format)
    rows[f"time / {time.index[0]}"] = (time / time.iloc[0]).map("{:.2f}".format)
    return rows.reset_index()


def in_short(runs: Sequence[Dict[str, Any]], metric: str) -> str:
    """Return what the table shows as one sentence: each method against the first."""
    frame = pd.DataFrame(runs).drop(columns="epochs")
    means = frame.groupby("method", sort=False).mean(numeric_only=True)
    first = means.index[0]
    found = []
    differences = (means[metric] - means[metric][first]).round(1).drop(first).dropna()
    for method, difference in differences.items():
        side = "ahead of" if difference > 0 else "behind" if difference < 0 else "level with"
        points = f"{abs(difference):.1f} points " if difference else ""
        found.append(f"{method} is {points}{side} {first}")
    text = f"At the last epoch {', '.join(found)} in {metric.replace('_', ' ')}"
    if "wrong labels" in means:
        learnt = [f"{method} {share:.0f} %" for method, share in means["wrong labels"].items()]
        text += f"; of the wrong labels {', '.join(learnt)} were learnt"
    seeds = frame.groupby("method").size().max()
    return text + (" (one seed)." if seeds == 1 else f" (mean of {seeds} seeds).")


def draw(runs: Sequence[Dict[str, Any]], metric: str, path: Path) -> None:
    """Draw over epochs, as mean and range of the seeds: the metric, the sharpness that the training
    logged, and what was learnt of right and of wrong labels, or else the losses.
    """
    from matplotlib.figure import Figure

    panels = {
        f"valid_{metric}": metric.replace("_", " ") + ", validation",
        "kept_accuracy": "right labels learnt, training rows",
        "replaced_accuracy": "wrong labels learnt, training rows",
        "valid_loss": "loss, validation",
        "train_loss": "loss, training (at w)",
        "train_sharpness": "sharpness, training",
    }
    logged = set().union(*(epoch for run in runs for epoch in run["epochs"]))
    dropped = ("valid_loss", "train_loss") if "kept_accuracy" in logged else tuple(LEARNT.values())
    panels = {key: title for key, title in panels.items() if key not in dropped}
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["method"] for r in runs))}
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items()):
        for method, colour in colours.items():
            found = [run["epochs"] for run in runs if run["method"] == method]
            points = [{e["epoch"]: e[key] for e in epochs if key in e} for epochs in found]
            seeds = pd.DataFrame(points).sort_index(axis=1)
            if seeds.size:
                axes.plot(seeds.columns, seeds.mean(), "o-", ms=3, color=colour, label=method)
                axes.fill_between(seeds.columns, seeds.min(), seeds.max(), color=colour, alpha=0.15)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Write ``report.md``, ``report.csv`` and ``curves.png``."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.common.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders <method>-seed<number>")
    parser.add_argument("--metric", default="accuracy", help="key of fairseq's log, less valid_")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()

    runs = [read_run(folder, args.metric) for folder in args.runs]
    rows = table(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    text = markdown_table(list(rows), rows.to_numpy().tolist())
    if rows["method"].nunique() > 1:
        text = f"{in_short(runs, args.metric)}\n\n{text}"
    note = NOTE + NOTE_NOISE if "wrong labels" in rows else NOTE
    (args.out / "report.md").write_text(f"{text}\n{note}", encoding="utf-8")
    rows.to_csv(args.out / "report.csv", index=False)
    draw(runs, args.metric, args.out / "curves.png")


if __name__ == "__main__":
    main()
