"""Figures, tables and plots of what the benchmark measured, and the machine's facts."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import fairseq
import numpy
import torch

from deltasam_fairseq.data.files import atomic_write
from deltasam_fairseq.markdown import markdown_table
from scripts.benchmark.measure import (
    ADDED,
    FORWARD,
    FORWARD_AND_BACKWARD,
    REST,
    WITHOUT_GRAPH,
    Seconds,
)
from scripts.benchmark.methods import DAVDA54, PYTORCH_OPTIMIZER, Setting

GIB = 2.0**30


def spread(ratios: Sequence[float]) -> float:
    """Return half the distance between the quartiles."""
    if len(ratios) < 2:
        return 0.0
    quarters = statistics.quantiles(ratios, n=4)
    return (quarters[2] - quarters[0]) / 2


def ratio(found: Seconds, name: str, base: str, key: str) -> Tuple[float, float]:
    """Return the median of the rounds' ratios of a method to another, and their spread."""
    ratios = [a / b for a, b in zip(found[name][key], found[base][key])]
    return statistics.median(ratios), spread(ratios)


def summary(found: Seconds, setting: Setting, base: str) -> Dict[str, Dict[str, float]]:
    """Return method or pass -> its figures, with ratios to ``base`` within each round."""
    sentences = setting.batch_size * setting.update_freq * setting.processes
    rows = {}
    for name, seconds in found.items():
        row = {"seconds": statistics.median(seconds["wall"])}
        row["samples_per_second"] = sentences / row["seconds"]
        for key in ("wall", "cpu"):
            row[f"{key}_ratio"], row[f"{key}_spread"] = ratio(found, name, base, key)
        rows[name] = row
    return rows


def extra_forwards(setting: Setting) -> int:
    """Return how many forwards without graph delta-SAM makes.

    One at the probe. Half precision probes on both sides of w; with several micro-batches the
    clean losses need a pass before the first backward.
    """
    return 2 if setting.precision != "fp32" or setting.update_freq > 1 else 1


def in_forwards(rows: Dict[str, Dict[str, float]], key: str) -> Dict[str, float]:
    """Return the time of a backward and of a forward without graph, in forwards."""
    forward = rows[FORWARD][f"{key}_ratio"]
    return {
        "backward": rows[FORWARD_AND_BACKWARD][f"{key}_ratio"] / forward - 1,
        WITHOUT_GRAPH: rows[WITHOUT_GRAPH][f"{key}_ratio"] / forward,
    }


def floors(
    found: Seconds, rows: Dict[str, Dict[str, float]], setting: Setting, key: str
) -> Dict[str, float]:
    """Return two estimates of delta-SAM / SAM from other timings of the same rounds.

    With n forwards without graph F0 more than SAM has:

        floor of the passes     1 + n F0 / (2 (forward + backward))
        SAM + n forwards        1 + n F0 / (SAM's update)

    The first has neither the base step nor anything else that both methods do between passes, so
    a true ratio may lie below it. Passes reduce no gradients: for several processes there is only
    the second.
    """
    extra = extra_forwards(setting)
    estimates = {}
    if setting.processes == 1:
        without_graph, both = (
            rows[name][f"{key}_ratio"] for name in (WITHOUT_GRAPH, FORWARD_AND_BACKWARD)
        )
        estimates["floor of the passes"] = 1 + extra * without_graph / (2 * both)
    if "SAM" in found:
        forwards = "one forward" if extra == 1 else f"{extra} forwards"
        seconds = [statistics.median(found[name][key]) for name in (WITHOUT_GRAPH, "SAM")]
        estimates[f"SAM + {forwards}"] = 1 + extra * seconds[0] / seconds[1]
    return estimates


def add_figures(result: Dict[str, Any]) -> Dict[str, Any]:
    """Return a comparison with the figures that follow from the seconds of its rounds."""
    setting, found = Setting(**result["setting"]), result["seconds_of_all_rounds"]
    rows = summary(found, setting, result["base"])
    bare = {FORWARD, WITHOUT_GRAPH, FORWARD_AND_BACKWARD}
    clocks = ("wall", "cpu")
    return {
        **result,
        "rows": {name: row for name, row in rows.items() if name not in bare},
        "passes": {name: row for name, row in rows.items() if name in bare},
        "in_forwards": {key: in_forwards(rows, key) for key in clocks},
        "floors": {key: floors(found, rows, setting, key) for key in clocks},
    }


def method_table(result: Dict[str, Any]) -> str:
    """Return time and memory of every method, and why others are missing."""
    cpu = result["setting"]["device"] == "cpu"
    base = result["base"]
    header = ["method", "ms an update", "samples/s", f"x {base}"]
    header += [f"x {base}, processor time"] if cpu else []
    work = result.get("device_work")
    header += ["peak memory, GiB"] if result["memory"] else []
    header += ["GPU busy", "kernels"] if work else []
    rows = []
    for name, figures in result["rows"].items():
        row = [name, f"{1000 * figures['seconds']:.1f}", f"{figures['samples_per_second']:.1f}"]
        for key in ("wall", "cpu")[: 1 + cpu]:
            row.append(f"{figures[f'{key}_ratio']:.3f} ± {figures[f'{key}_spread']:.3f}")
        if result["memory"]:
            peak = result["memory"].get(name)
            row.append("-" if peak is None else f"{peak / GIB:.2f}")
        if work:
            done = work[name] or {"seconds": float("nan"), "kernels": "-"}  # profiler saw none
            row += [f"{done['seconds'] / figures['seconds']:.0%}", str(done["kernels"])]
        rows.append(row)
    missing = "; ".join(f"{name} ({why})" for name, why in result["unavailable"].items())
    return markdown_table(header, rows) + (f"\n\nNot measured: {missing}." if missing else "")


def floor_table(result: Dict[str, Any]) -> str:
    """Return delta-SAM / SAM as measured and as estimated from the same rounds."""
    if not {"SAM", "delta-SAM"} <= set(result["rows"]):
        return ""
    seconds = result["seconds_of_all_rounds"]
    clocks = ("wall", "cpu") if result["setting"]["device"] == "cpu" else ("wall",)
    header = ["delta-SAM / SAM", "measured"]
    for name in result["floors"]["wall"]:
        header += [name, f"measured / {name}"]
    rows = []
    for key in clocks:
        measured, scatter = ratio(seconds, "delta-SAM", "SAM", key)
        row = ["wall" if key == "wall" else "processor time", f"{measured:.3f} ± {scatter:.3f}"]
        for figure in result["floors"][key].values():
            row += [f"{figure:.3f}", f"{measured / figure:.3f}"]
        rows.append(row)
    taken = result["in_forwards"][clocks[-1]]
    return (
        markdown_table(header, rows)
        + f"\n\nA backward takes {taken['backward']:.2f} forwards, a forward without graph "
        + f"{taken[WITHOUT_GRAPH]:.2f}."
    )


def phase_table(result: Dict[str, Any]) -> str:
    """Return where the time of an update goes, in ms and in percent of the update."""
    found = result["phases"]
    if not found:
        return ""
    rows = []
    for name in dict.fromkeys(name for phases in found.values() for name in phases):
        cells = []
        for phases in found.values():
            whole, part = sum(phases.values()), phases.get(name)
            cells.append("" if part is None else f"{1000 * part:.1f} ({part / whole:.1%})")
        rows.append([name, *cells])
    rows.append(["all", *(f"{1000 * sum(p.values()):.1f}" for p in found.values())])
    base = found.get(result["base"], {}).get(REST, 0.0)
    added = [
        f"{(sum(p.get(name, 0.0) for name in ADDED) + p[REST] - base) / sum(p.values()):.1%}"
        for p in found.values()
    ]
    rows.append([f"beside passes, base step and what {result['base']} has too", *added])
    return markdown_table(["phase, ms (share)", *found], rows)


def reduction_line(result: Dict[str, Any]) -> str:
    """Return what the all-reduces take by themselves."""
    taken = [f"{name}: {1000 * s:.2f} ms" for name, s in result.get("reductions", {}).items()]
    return f"All-reduce alone: {', '.join(taken)}." if taken else ""


def machine(
    args: argparse.Namespace, argv: Sequence[str], program: str = "scripts.benchmark"
) -> Dict[str, Any]:
    """Return what the figures are measured on and with."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    facts = {
        "date": date.today().isoformat(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fairseq": fairseq.__version__,
        "numpy": numpy.__version__,
        **peer_versions(args),
        "command": shlex.join(["python", "-m", program, *argv]),
    }
    if args.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def peer_versions(args: argparse.Namespace) -> Dict[str, str]:
    """Return the versions of the other SAMs that are compared."""
    found = {}
    if PYTORCH_OPTIMIZER in args.methods:
        try:
            found["pytorch_optimizer"] = importlib.metadata.version("pytorch_optimizer")
        except importlib.metadata.PackageNotFoundError:
            pass  # the report says so
    if DAVDA54 in args.methods and args.davda54 is not None and args.davda54.is_file():
        digest = hashlib.sha256(args.davda54.read_bytes()).hexdigest()
        found["davda54's sam.py, sha256"] = digest[:12]
    return found


def markdown(record: Dict[str, Any]) -> str:
    """Return the whole report."""
    facts = record["machine"]
    line = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "command")
    threads = [result["threads"] for result in record["results"]]
    differ = len(set(threads)) > 1
    parts = [f"`{facts['command']}`", line if differ else f"{line}, threads {threads[0]}"]
    for result in record["results"]:
        own = f", threads {result['threads']}" if differ else ""
        parts.append(f"**{Setting(**result['setting']).title}{own}**")
        parts += [method_table(result), floor_table(result), phase_table(result)]
        parts.append(reduction_line(result))
    return "\n\n".join(part for part in parts if part) + "\n"


def axis_position(key: str, result: Dict[str, Any]) -> float:
    """Return where a result is on the axis of what was changed; shapes are ordered by time."""
    value = result["setting"][key]
    seconds: float = result["rows"][result["base"]]["seconds"]
    return seconds if isinstance(value, str) else float(value)


def plot_sweep(record: Dict[str, Any], path: Path) -> None:
    """Draw time per update over size, batch, length, processes; all else as in the first result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results: List[Dict[str, Any]] = record["results"]
    first = results[0]["setting"]
    keys = ("shape", "batch_size", "length", "processes")
    figure, axes = pyplot.subplots(1, len(keys), figsize=(12, 3.2))
    for axis, key in zip(axes, keys):
        mine = [r for r in results if all(r["setting"][k] == first[k] for k in keys if k != key)]
        mine.sort(key=partial(axis_position, key))
        at = [str(r["setting"][key]) for r in mine]
        for name in mine[0]["rows"]:
            seconds = [r["rows"].get(name, {}).get("seconds", float("nan")) for r in mine]
            axis.plot(at, [1000 * s for s in seconds], marker=".", label=name)
        axis.set(xlabel=key.replace("_", " "), yscale="log")
    axes[0].set_ylabel("ms an update")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{Setting(**first).title}; one of them changed at a time", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_report(record: Dict[str, Any], out: Path, plot: bool) -> str:
    """Write benchmark.json, benchmark.md, and sweep.png if asked for; return the Markdown."""
    atomic_write(out / "benchmark.json", json.dumps(record, indent=1) + "\n")
    text = markdown(record)
    if plot:
        plot_sweep(record, out / "sweep.png")
        text += "\n![Time of an update](sweep.png)\n"
    atomic_write(out / "benchmark.md", text)
    return text
