"""Sharpness of a split: means over batches, as a table, as JSON, as a plot."""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from deltasam_fairseq.algorithms.sharpness import mean_over_batches
from deltasam_fairseq.sharpness.landscapes import Sharpness


class Report(NamedTuple):
    """What was measured, and the figures of every batch.

    Attributes:
        about: checkpoint, data, subset, criterion, unit and the like, for the JSON as they are.
        rhos: R radii.
        beta: of delta-SAM.
        radii: distances of the curves, empty without curves.
        batches: figures, one a batch, at least one.
    """

    about: Dict[str, Any]
    rhos: Sequence[float]
    beta: float
    radii: Sequence[float]
    batches: List[Sharpness]


# Name of the figure in the JSON, and the head of its column.
_FIGURES = (
    ("per_batch", "per-batch"),
    ("reweighted", "reweighted"),
    ("per_instance", "per-instance"),
    ("cosine", "cos(eps*, eps')"),
)


def _average(report: Report, figure: str) -> Optional[Tuple[Tensor, Tensor]]:
    """Mean over batches, weighted by sentences, and standard error; None if not measured."""
    values = [getattr(batch, figure) for batch in report.batches]
    if values[0] is None:
        return None
    counts = torch.tensor([batch.sentences for batch in report.batches])
    return mean_over_batches(torch.stack(values), counts)


def _curves(report: Report) -> Optional[Dict[str, Any]]:
    """Mean loss of the split along SAM's, delta-SAM's (shape (R,)) and random ((k, R)) lines."""
    if report.batches[0].curves is None:
        return None
    counts = torch.tensor([batch.sentences for batch in report.batches])
    found: Dict[str, Any] = {}
    for name in ("sam", "delta_sam", "random"):
        values = [getattr(batch.curves, name) for batch in report.batches]
        if values[0] is not None:
            found[name] = mean_over_batches(torch.stack(values), counts)[0]
    return found


def _number(x: Any) -> Optional[float]:
    """For JSON, which has no NaN."""
    return float(x) if math.isfinite(x) else None


def as_dict(report: Report) -> Dict[str, Any]:
    """All figures, for ``json.dump``; null where a figure is not finite or does not exist."""
    loss = _average(report, "loss")
    assert loss is not None
    rows = []
    for i, rho in enumerate(report.rhos):
        row: Dict[str, Any] = {"rho": rho}
        for figure, _ in _FIGURES:
            average = _average(report, figure)
            row[figure] = average and {
                "mean": _number(average[0][i]),
                "standard_error": _number(average[1][i]),
            }
        rows.append(row)
    curves = _curves(report)
    return {
        **report.about,
        "beta": report.beta,
        "sentences": sum(batch.sentences for batch in report.batches),
        "batches": len(report.batches),
        "loss": {"mean": _number(loss[0]), "standard_error": _number(loss[1])},
        "sharpness": rows,
        "curves": curves
        and {
            "radii": list(report.radii),
            **{
                name: [[_number(y) for y in line] for line in lines]
                if lines.dim() == 2
                else [_number(y) for y in lines]
                for name, lines in curves.items()
            },
        },
    }


def as_table(report: Report) -> str:
    """The figures for a terminal; ``+-`` is the standard error over batches."""

    def cell(average: Tuple[Tensor, Tensor], i: Any, digits: str) -> str:
        mean, error = (x[i].item() for x in average)
        return f"{mean:{digits}}" + (f" +- {error:.1e}" if math.isfinite(error) else "")

    about = report.about
    sentences = sum(batch.sentences for batch in report.batches)
    loss = _average(report, "loss")
    assert loss is not None
    averages = {figure: _average(report, figure) for figure, _ in _FIGURES}
    per_instance = averages["per_instance"]

    head, columns = ["rho"], [[f"{rho:g}" for rho in report.rhos]]
    for figure, name in _FIGURES:
        average = averages[figure]
        if average is None:
            continue
        digits = ".4f" if figure == "cosine" else ".4e"
        if figure == "reweighted":
            name += f" (beta {report.beta:g})"
        head.append(name)
        columns.append([cell(average, i, digits) for i in range(len(report.rhos))])
        if per_instance is not None and figure in ("per_batch", "reweighted"):
            share = average[0] / per_instance[0]
            head.append("of per-inst.")
            columns.append([f"{x:.3f}" for x in share.tolist()])
    widths = [max(map(len, [h, *c])) for h, c in zip(head, columns)]
    note = about["unit_note"] and f" ({about['unit_note']})"
    lines = [
        f"{about['checkpoint']} on {about['subset']} of {about['data']}",
        f"{sentences} sentences in {len(report.batches)} batches; eval mode (no dropout), float32",
        f"losses in {about['unit']}{note}; +- is the standard error over batches",
        f"clean loss {cell(loss, (), '.6g')}",
        "",
        "  ".join(h.ljust(w) for h, w in zip(head, widths)).rstrip(),
    ]
    for row in zip(*columns):
        lines.append("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip())
    if about["note"]:
        lines += ["", about["note"]]
    return "\n".join(lines)


def plot(report: Report, path: str) -> None:
    """Draw the mean loss along ascent and random directions into a file.

    Args:
        report: with curves.
        path: of the picture; the suffix says which kind.
    """
    from matplotlib.figure import Figure

    curves = _curves(report)
    assert curves is not None
    figure = Figure(figsize=(7.0, 4.5), dpi=150)
    axes = figure.add_subplot()
    radii = list(report.radii)
    for k, line in enumerate(curves["random"].tolist()):
        label = f"random directions ({len(curves['random'])})" if k == 0 else None
        axes.plot(radii, line, color="0.55", linewidth=1.2, label=label, zorder=2)
    axes.plot(radii, curves["sam"].tolist(), color="C0", label="SAM's ascent direction", zorder=3)
    if "delta_sam" in curves:
        label = f"delta-SAM's ascent direction (beta {report.beta:g})"
        line = curves["delta_sam"].tolist()
        axes.plot(radii, line, color="C1", linestyle="--", label=label, zorder=4)
    for i, rho in enumerate(report.rhos):
        label = "rho = " + ", ".join(f"{r:g}" for r in report.rhos) if i == 0 else None
        axes.axvline(rho, color="0.75", linestyle=":", linewidth=1.0, label=label, zorder=1)
    axes.set_xlabel("distance from the weights (L2 norm in weight space)")
    axes.set_ylabel(f"mean loss ({report.about['unit']})")
    sentences = sum(batch.sentences for batch in report.batches)
    axes.set_title(
        f"{report.about['checkpoint']}\n{report.about['subset']}, {sentences} sentences", fontsize=9
    )
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
