"""Fewer training rows, and wrong labels in them, for experiments; both seeded.

The same arguments choose the same rows on every machine: numpy's ``RandomState`` is fixed for good.
"""

from __future__ import annotations

from typing import List, Sequence, Tuple

import numpy as np


def draw_rows(n: int, count: int, seed: int) -> List[int]:
    """Return the numbers of ``count`` of ``n`` rows, any subset as likely, ascending.

    Args:
        n: rows that there are.
        count: rows to keep, 1 to ``n``.
        seed: of the draw.

    Raises:
        ValueError: ``count`` is out of range.
    """
    if not 0 < count <= n:
        raise ValueError(f"{count} of {n} rows cannot be kept; give 1 to {n}")
    return sorted(np.random.RandomState(seed).permutation(n)[:count].tolist())


def replace_labels(
    labels: Sequence[str], classes: Sequence[str], share: float, seed: int
) -> Tuple[List[str], List[int]]:
    """Replace the labels of ``round(share n)`` rows by another class, each other one as likely.

    Symmetric label noise, as in Foret et al. 2020, section 3.3, but that a replaced label is never
    the right one.

    Args:
        labels: of all rows.
        classes: at least two, in a fixed order.
        share: of the rows, 0 to 1.
        seed: of rows and classes.

    Returns:
        the labels, and the numbers of the rows that were changed, ascending.

    Raises:
        ValueError: ``share`` is out of range, or there are fewer than two classes.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of {share} of the labels cannot be replaced; give 0 to 1")
    if len(classes) < 2:
        raise ValueError(f"there is no other class than {' '.join(classes) or 'none'}")
    generator = np.random.RandomState(seed)
    changed = sorted(generator.permutation(len(labels))[: round(share * len(labels))].tolist())
    noisy = list(labels)
    for row in changed:
        others = [c for c in classes if c != labels[row]]
        noisy[row] = others[generator.randint(len(others))]
    return noisy, changed
