"""The figures of the GLUE report: one panel a question, as SVG for the page and as PNG."""

from __future__ import annotations

import html
import io
import math
import re
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.glue.report.numbers import Comparison
from examples.glue.report.runs import LEARNT, Metric, Run, common_rho

# Of middle lightness, so that they stand out from white and from black.
COLOURS = "#3b82c4 #e0803a #2f9e6e #b45fc4 #c9971c #d9556b #3fa7b8 #7f8a96".split()
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")

# Stand-ins in the SVG for what depends on the page's theme.
_INK, _GRID = "#010203", "#040506"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "glue_report",
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


class LineStyle(NamedTuple):
    """How a method is drawn, the same in all figures."""

    colour: str
    marker: str
    line: str


Styles = Dict[str, LineStyle]
Groups = Dict[str, List[Run]]  # method -> its runs
Panel = Tuple[str, Callable[[Any], None]]  # title, and what draws it on the axes


def line_styles(methods: Sequence[str]) -> Styles:
    """Return a style for every method: colour and marker; past eight also another line."""
    count = len(COLOURS)
    return {
        method: LineStyle(COLOURS[i % count], MARKERS[i % count], LINES[i // count % len(LINES)])
        for i, method in enumerate(methods)
    }


def over_epochs(key: str, run: Run) -> Dict[float, float]:
    """Return a figure of a run by epoch."""
    return {e["epoch"]: e[key] for e in run.log.epochs if math.isfinite(e.get(key, math.nan))}


def _over_distance(run: Run) -> Dict[float, float]:
    points = zip(run.curves.get("radii") or (), run.curves.get("sam") or ())
    return {radius: loss for radius, loss in points if loss is not None}


def _lines(
    title: str, groups: Groups, points: Callable[[Run], Dict[float, float]], styles: Styles, x: str
) -> Optional[Panel]:
    """Return the panel with a line a method through the means, in a band over all runs."""
    tables = {m: pd.DataFrame([points(run) for run in group]) for m, group in groups.items()}
    tables = {method: table.sort_index(axis=1) for method, table in tables.items() if table.size}
    if not tables:
        return None

    def draw(axes: Any) -> None:
        for method, table in tables.items():
            style = styles[method]
            axes.fill_between(
                table.columns, table.min(), table.max(), color=style.colour, alpha=0.1, lw=0
            )
            kind = {"color": style.colour, "marker": style.marker, "ls": style.line}
            axes.plot(table.columns, table.mean(), ms=3.5, lw=1.5, **kind)
        axes.set_xlabel(x)
        if x == "epoch":
            axes.xaxis.get_major_locator().set_params(integer=True)
            seen = {epoch for table in tables.values() for epoch in table.columns}
            if len(seen) == 1:
                axes.set_xlim(min(seen) - 1, min(seen) + 1)

    return title, draw


def _differences(found: Sequence[Comparison], styles: Styles) -> Optional[Panel]:
    def draw(axes: Any) -> None:
        axes.axvline(0, color=axes.xaxis.label.get_color(), lw=0.9)
        for i, c in enumerate(found):
            style, values = styles[c.method], list(c.differences.values())
            axes.plot(values, [i] * len(values), style.marker, color=style.colour, ms=5, alpha=0.6)
            if c.low is not None:
                axes.plot([c.low, c.high], [i, i], color=style.colour, lw=1.4)
            axes.plot([c.mean] * 2, [i - 0.28, i + 0.28], color=style.colour, lw=2.6)
        _name_rows(axes, [c.method for c in found])
        axes.set_xlabel(f"points above {found[0].baseline}, by seed")

    return (f"score, difference to {found[0].baseline}", draw) if found else None


def _rises(groups: Groups, styles: Styles, rho: Optional[float]) -> Optional[Panel]:
    found = {m: [r.rises[rho] for r in g if rho in r.rises] for m, g in groups.items() if rho}
    found = {method: values for method, values in found.items() if values}

    def draw(axes: Any) -> None:
        for i, (method, values) in enumerate(found.items()):
            style = styles[method]
            mean = sum(values) / len(values)
            axes.barh(i, mean, height=0.6, color=style.colour, alpha=0.35)
            axes.plot(values, [i] * len(values), style.marker, color=style.colour, ms=5)
        _name_rows(axes, list(found))
        axes.set_xlabel(f"rise of the loss, rho {rho:g}")

    return ("sharpness of the minimum", draw) if found else None


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(False, axis="y")


def curves(groups: Groups, metric: Metric, styles: Styles) -> List[Panel]:
    """Return the panels over epochs that the runs have figures for."""
    titles = {
        metric.key: f"{metric.name}, validation",
        **{key: f"{name}, training rows" for key, name in LEARNT},
        "valid_loss": "loss, validation",
        "train_loss": "loss, training",
        "train_sharpness": "sharpness while training",
    }
    panels = [
        _lines(title, groups, partial(over_epochs, key), styles, "epoch")
        for key, title in titles.items()
    ]
    return [panel for panel in panels if panel]


def task_panels(
    groups: Groups, metric: Metric, found: Sequence[Comparison], styles: Styles
) -> List[Panel]:
    """Return the panels of a task that its complete runs have figures for."""
    rho = common_rho([run for group in groups.values() for run in group])
    below = "distance along SAM's ascent"
    panels = [
        _differences([c for c in found if c.differences], styles),
        _rises(groups, styles, rho),
        _lines("loss around the minimum", groups, _over_distance, styles, below),
    ]
    return [*curves(groups, metric, styles), *(panel for panel in panels if panel)]


def as_svg(panel: Panel, name: str) -> str:
    """Return a panel as an SVG element whose ink and grid follow the page.

    Args:
        panel: what to draw.
        name: of the figure, unique in the page: identifiers within begin with it.
    """
    title, draw = panel
    with matplotlib.rc_context(_style(_INK, _GRID)):
        figure = Figure(figsize=(3.9, 2.7), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, loc="left")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows them
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    return svg.replace("<svg ", '<svg role="img" ', 1).strip()


def html_legend(styles: Styles) -> str:
    """Return the methods with their colours, for the page."""
    lines = {"-": "solid", ":": "dotted"}
    keys = (
        f'<span style="border-top: 3px {lines.get(style.line, "dashed")} {style.colour}">'
        f"{html.escape(method)}</span>"
        for method, style in styles.items()
    )
    return f'<p class="keys">{" ".join(keys)}</p>'


def write_png(panels: Sequence[Panel], styles: Styles, path: Path) -> None:
    """Write panels, with a legend, as one picture."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_style("black", "#dddddd")):
        figure = Figure(figsize=(3.9 * columns, 2.7 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, draw) in zip(grid, panels):
            draw(axes)
            axes.set_title(title, loc="left")
        keys = [
            Line2D([], [], color=style.colour, marker=style.marker, ls=style.line, label=method)
            for method, style in styles.items()
        ]
        figure.legend(handles=keys, loc="outside upper center", ncols=min(6, len(keys)))
        figure.savefig(path, dpi=110, metadata={"Software": None})
