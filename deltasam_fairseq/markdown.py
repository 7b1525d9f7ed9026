"""Markdown tables and their cells, for every report of this project."""

from __future__ import annotations

from typing import Sequence

import numpy as np


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean and, of several values, the standard deviation (with n - 1).

    >>> spread([60, 62])
    '61.0 ± 1.4'
    """
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are also aligned in plain text.

    >>> print(markdown_table(["method", "score"], [["sam", "61.0"]]))
    | method | score |
    | ------ | ----- |
    | sam    | 61.0  |

    Args:
        header: one name a column; names may repeat.
        rows: each as long as ``header``; a ``|`` in a cell is escaped.

    Returns:
        The lines, without a line break after the last one.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"{len(line)} cells in a table of {len(header)} columns: {line}")
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths)] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)
