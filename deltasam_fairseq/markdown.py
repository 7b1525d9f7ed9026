"""Markdown tables, for every report of this project."""

from __future__ import annotations

from typing import Sequence


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
