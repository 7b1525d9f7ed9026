"""Tables and plots of what benchmark.py measured."""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any, Dict, List

from deltasam_fairseq.data.files import atomic_write
from scripts.benchmark.cost_model import table
from scripts.benchmark.figures import WITHOUT_GRAPH, spread
from scripts.benchmark.phases import ADDED, REST

GIB = 2.0**30


def title(setting: Dict[str, Any]) -> str:
    """Return one line that says what was compared."""
    parts = [f"RoBERTa {setting['shape']}", setting["device"], setting["precision"]]
    parts.append(f"{setting['batch_size']} sentences of {setting['length']} tokens")
    if setting["update_freq"] > 1:
        parts.append(f"{setting['update_freq']} micro-batches an update")
    if setting["processes"] > 1:
        parts.append(f"{setting['processes']} processes")
    return ", ".join(parts)


def reduction_line(result: Dict[str, Any]) -> str:
    """What the reductions take by themselves."""
    taken = [f"{name}: {1000 * s:.2f} ms" for name, s in result.get("reductions", {}).items()]
    return f"All-reduce alone: {', '.join(taken)}." if taken else ""


def comparison(result: Dict[str, Any]) -> str:
    """The table of methods."""
    cpu = result["setting"]["device"] == "cpu"
    base = result["base"]
    header = ["method", "ms an update", "samples/s", f"x {base}"]
    header += [f"x {base}, processor time"] if cpu else []
    header += ["peak memory, GiB"] if result["memory"] else []
    lines = []
    for name, row in result["rows"].items():
        line = [name, f"{1000 * row['seconds']:.0f}", f"{row['samples_per_second']:.1f}"]
        for key in ("wall", "cpu")[: 1 + cpu]:
            line.append(f"{row[f'{key}_ratio']:.3f} ± {row[f'{key}_spread']:.3f}")
        if result["memory"]:
            peak = result["memory"].get(name)
            line.append("-" if peak is None else f"{peak / GIB:.2f}")
        lines.append(line)
    lines += [[f"{n}: {why}"] + [""] * (len(header) - 1) for n, why in result["left_out"].items()]
    return table(header, lines)


def against_floors(result: Dict[str, Any]) -> str:
    """delta-SAM to SAM, measured and as other figures of the same rounds would have it."""
    rows = result["rows"]
    if not {"SAM", "delta-SAM"} <= set(rows):
        return ""
    seconds = result["seconds_of_all_rounds"]
    clocks = ("wall", "cpu") if result["setting"]["device"] == "cpu" else ("wall",)
    header = ["delta-SAM / SAM", "measured"]
    for name in result["floors"]["wall"]:
        header += [name, f"measured / {name}"]
    lines = []
    for key in clocks:
        ratios = [a / b for a, b in zip(seconds["delta-SAM"][key], seconds["SAM"][key])]
        measured = statistics.median(ratios)
        line = ["wall" if key == "wall" else "processor time"]
        line.append(f"{measured:.3f} ± {spread(ratios):.3f}")
        for figure in result["floors"][key].values():
            line += [f"{figure:.3f}", f"{measured / figure:.3f}"]
        lines.append(line)
    taken = result["in_forwards"][clocks[-1]]
    return (
        table(header, lines)
        + f"\n\nA backward takes {taken['backward']:.2f} forwards, a forward without graph "
        + f"{taken[WITHOUT_GRAPH]:.2f}."
    )


def phase_table(result: Dict[str, Any]) -> str:
    """Where the time of an update goes, in ms and in percent of the update."""
    found = result["phases"]
    if not found:
        return ""
    names = list(dict.fromkeys(name for phases in found.values() for name in phases))
    lines = []
    for name in names:
        cells = []
        for phases in found.values():
            whole, part = sum(phases.values()), phases.get(name)
            cells.append("" if part is None else f"{1000 * part:.1f} ({part / whole:.1%})")
        lines.append([name, *cells])
    lines.append(["all", *(f"{1000 * sum(p.values()):.1f}" for p in found.values())])
    base = found.get(result["base"], {}).get(REST, 0.0)
    added = [
        f"{(sum(p.get(name, 0.0) for name in ADDED) + p[REST] - base) / sum(p.values()):.1%}"
        for p in found.values()
    ]
    lines.append([f"beside passes, base step and what {result['base']} has too", *added])
    return table(["phase, ms (share)", *found], lines)


def markdown(record: Dict[str, Any]) -> str:
    """The whole report."""
    found = record["machine"]
    of = ", ".join(f"{key} {value}" for key, value in found.items() if key != "command")
    threads = [result["threads"] for result in record["results"]]
    differ = len(set(threads)) > 1
    of += "" if differ else f", threads {threads[0]}"
    parts = [f"`{found['command']}`", of]
    for result in record["results"]:
        own = f", threads {result['threads']}" if differ else ""
        parts.append(f"**{title(result['setting'])}{own}**")
        parts += [comparison(result), against_floors(result), phase_table(result)]
        parts.append(reduction_line(result))
    return "\n\n".join(part for part in parts if part) + "\n"


def _place(key: str, result: Dict[str, Any]) -> float:
    """Return where a result stands on the axis of what was changed; shapes by their time."""
    value = result["setting"][key]
    seconds: float = result["rows"][result["base"]]["seconds"]
    return seconds if isinstance(value, str) else float(value)


def plot_sweep(record: Dict[str, Any], path: Path) -> None:
    """Draw time per update against size, batch, length; each other thing as in the first result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results: List[Dict[str, Any]] = record["results"]
    first = results[0]["setting"]
    keys = ("shape", "batch_size", "length", "processes")
    figure, axes = pyplot.subplots(1, len(keys), figsize=(12, 3.2))
    for axis, key in zip(axes, keys):
        mine = [r for r in results if all(r["setting"][k] == first[k] for k in keys if k != key)]
        mine.sort(key=partial(_place, key))
        at = [str(r["setting"][key]) for r in mine]
        for name in mine[0]["rows"]:
            seconds = [r["rows"].get(name, {}).get("seconds", float("nan")) for r in mine]
            axis.plot(at, [1000 * s for s in seconds], marker=".", label=name)
        axis.set(xlabel=key.replace("_", " "), yscale="log")
    axes[0].set_ylabel("ms an update")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{title(first)}; one of them changed at a time", fontsize=9)
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
