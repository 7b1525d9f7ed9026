"""The figures of the GLUE report: one panel a question, as SVG for the page and as PNG."""

from __future__ import annotations

import io
import math
import re
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

from examples.glue.report.numbers import Comparison, common_rho
from examples.glue.report.runs import Metric, Run, Runs

# Of middle lightness, so that they stand out from white and from black.
COLOURS = "#3b82c4 #e0803a #2f9e6e #b45fc4 #c9971c #d9556b #3fa7b8 #7f8a96".split()
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")

# Stand-ins in the SVG for what depends on the page's theme.
_INK, _GRID = "#010203", "#040506"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "glue_report",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
}


def _style(ink: str, grid: str) -> Any:
    """Return matplotlib's settings."""
    parts = ("text.", "xtick.", "ytick.", "axes.label", "axes.edge", "axes.title")
    return {**_STYLE, **{f"{part}color": ink for part in parts}, "grid.color": grid}


class Look(NamedTuple):
    """How a method is drawn, the same in all figures."""

    colour: str
    marker: str
    line: str


def looks(methods: Sequence[str]) -> Dict[str, Look]:
    """Return a look for every method: colour and marker; past eight also another line."""
    count = len(COLOURS)
    return {
        method: Look(COLOURS[i % count], MARKERS[i % count], LINES[i // count % len(LINES)])
        for i, method in enumerate(methods)
    }


Panel = Tuple[str, Callable[[Any], None]]  # title, and what draws it on the axes


Points = Dict[float, List[float]]  # figures of the runs, by epoch or by distance


def _over_epochs(runs: Sequence[Run], key: str) -> Points:
    found: Points = {}
    for run in runs:
        for epoch in run.log.epochs:
            if math.isfinite(epoch.get(key, math.nan)):
                found.setdefault(epoch["epoch"], []).append(epoch[key])
    return found


def _over_distance(runs: Sequence[Run]) -> Points:
    found: Points = {}
    for run in runs:
        for radius, loss in zip(*((run.curves or {}).get(key) or () for key in ("radii", "sam"))):
            if loss is not None:
                found.setdefault(radius, []).append(loss)
    return found


def _lines(groups: Dict[str, Points], styles: Dict[str, Look], below: str) -> Any:
    """Return what draws a line a method through the means, in a band over all runs."""

    def draw(axes: Any) -> None:
        for method, points in groups.items():
            if not points:
                continue
            look, x = styles[method], sorted(points)
            low, high = [min(points[i]) for i in x], [max(points[i]) for i in x]
            axes.fill_between(x, low, high, color=look.colour, alpha=0.1, lw=0)
            axes.plot(
                x,
                [statistics.mean(points[i]) for i in x],
                look.line,
                color=look.colour,
                marker=look.marker,
                ms=3.5,
                lw=1.5,
            )
        axes.set_xlabel(below)
        if below == "epoch":
            axes.xaxis.get_major_locator().set_params(integer=True)
            seen = {x for points in groups.values() for x in points}
            if len(seen) == 1:
                axes.set_xlim(min(seen) - 1, min(seen) + 1)

    return draw


def _differences(found: Sequence[Comparison], styles: Dict[str, Look]) -> Any:
    def draw(axes: Any) -> None:
        axes.axvline(0, color=axes.xaxis.label.get_color(), lw=0.9)
        for i, comparison in enumerate(found):
            look = styles[comparison.method]
            values = list(comparison.differences.values())
            axes.plot(values, [i] * len(values), look.marker, color=look.colour, ms=5, alpha=0.6)
            if comparison.low is not None:
                axes.plot([comparison.low, comparison.high], [i, i], color=look.colour, lw=1.4)
            axes.plot([comparison.mean] * 2, [i - 0.28, i + 0.28], color=look.colour, lw=2.6)
        axes.set_yticks(range(len(found)), [comparison.method for comparison in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlabel(f"points above {found[0].baseline}, by seed")
        axes.grid(False, axis="y")

    return draw


def _rises(groups: Dict[str, List[Run]], styles: Dict[str, Look], rho: float) -> Any:
    measured = {m: [r.rises[rho] for r in g if rho in r.rises] for m, g in groups.items()}
    measured = {method: values for method, values in measured.items() if values}

    def draw(axes: Any) -> None:
        for i, (method, values) in enumerate(measured.items()):
            look = styles[method]
            axes.barh(i, statistics.mean(values), height=0.6, color=look.colour, alpha=0.35)
            axes.plot(values, [i] * len(values), look.marker, color=look.colour, ms=5)
        axes.set_yticks(range(len(measured)), list(measured))
        axes.set_ylim(len(measured) - 0.5, -0.5)
        axes.set_xlabel(f"rise of the loss, rho {rho:g}")
        axes.grid(False, axis="y")

    return draw


def panels(
    runs: Runs, task: str, metric: Metric, found: Sequence[Comparison], styles: Dict[str, Look]
) -> List[Panel]:
    """Return the panels of a task that its runs have figures for."""
    groups = {method: runs.of(task, method) for method in runs.methods}
    groups = {method: group for method, group in groups.items() if group}
    complete = [run for group in groups.values() for run in group]
    over_epochs = {
        metric.key: f"{metric.name}, validation",
        "valid_loss": "loss, validation",
        "train_loss": "loss, training",
        "train_sharpness": "sharpness while training",
    }
    list_: List[Panel] = []
    for key, title in over_epochs.items():
        points = {method: _over_epochs(group, key) for method, group in groups.items()}
        if any(points.values()):
            list_.append((title, _lines(points, styles, "epoch")))
    here = [c for c in found if c.task == task and c.differences]
    if here:
        list_.append((f"best epoch, difference to {here[0].baseline}", _differences(here, styles)))
    rho = common_rho(complete)
    if rho is not None:
        list_.append(("sharpness of the minimum", _rises(groups, styles, rho)))
    points = {method: _over_distance(group) for method, group in groups.items()}
    if any(points.values()):
        below = "distance along SAM's ascent"
        list_.append(("loss around the minimum", _lines(points, styles, below)))
    return list_


def as_svg(panel: Panel, name: str) -> str:
    """Return a panel as an SVG element whose ink and grid follow the page.

    Args:
        panel: what to draw.
        name: of the figure, unique in the page: identifiers within begin with it.
    """
    import matplotlib
    from matplotlib.figure import Figure

    title, draw = panel
    with matplotlib.rc_context(_style(_INK, _GRID)):
        figure = Figure(figsize=(3.9, 2.7), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, loc="left")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows them
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg role="img" viewBox="\1">', svg)
    svg = svg.replace(">", f"><title>{title}</title>", 1)
    return svg.strip()


def as_png(panels_: Sequence[Panel], styles: Dict[str, Look], path: Path) -> None:
    """Write the panels of a task, with a legend, as one picture for the Markdown report."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(3, len(panels_))
    rows = -(-len(panels_) // columns)
    with matplotlib.rc_context(_style("black", "#dddddd")):
        figure = Figure(figsize=(3.9 * columns, 2.7 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid[len(panels_) :]:
            axes.set_axis_off()
        for axes, (title, draw) in zip(grid, panels_):
            draw(axes)
            axes.set_title(title, loc="left")
        keys = [
            Line2D([], [], color=look.colour, marker=look.marker, ls=look.line, label=method)
            for method, look in styles.items()
        ]
        figure.legend(handles=keys, loc="outside upper center", ncols=min(6, len(keys)))
        figure.savefig(path, dpi=110, metadata={"Software": None})
