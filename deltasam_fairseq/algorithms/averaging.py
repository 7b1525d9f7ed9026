"""Average weights along a run; compute the learning rates for it.

Stochastic weight averaging (Izmailov et al. 2018; Lu et al. 2022 for fine-tuning) is the mean of
a run's weights at a learning rate that keeps them moving.
"""

import math
from typing import Sequence

import torch
from torch import Tensor

STRATEGIES = ("cos", "linear")


def running_mean_(averages: Sequence[Tensor], values: Sequence[Tensor], n: int) -> None:
    """Update means: ``average <- average + (value - average) / (n + 1)``.

    Args:
        averages: means of n values each, float32 or better; written to.
        values: further values, same shapes, any floating dtype and device.
        n: number of values so far, at least 0; 0 copies the values.
    """
    if n == 0:
        for average, value in zip(averages, values):
            average.copy_(value)
    else:
        _lerp_(averages, values, 1 / (n + 1))


def exponential_mean_(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """Update exponential means: ``average <- decay average + (1 - decay) value``.

    Args:
        averages: float32 or better; written to.
        values: same shapes, any floating dtype and device.
        decay: between 0 and 1.
    """
    _lerp_(averages, values, 1 - decay)


@torch.no_grad()
def _lerp_(averages: Sequence[Tensor], values: Sequence[Tensor], weight: float) -> None:
    alike = all(a.dtype == v.dtype and a.device == v.device for a, v in zip(averages, values))
    if alike and hasattr(torch, "_foreach_lerp_") and len(averages):
        torch._foreach_lerp_(list(averages), list(values), weight)
        return
    for average, value in zip(averages, values):  # converts one tensor at a time
        average.lerp_(value.to(average), weight)


def annealed_rate(start: float, end: float, step: int, steps: int, strategy: str) -> float:
    """Return a learning rate that goes from ``start`` to ``end`` in ``steps`` updates and stays.

    ``(1 - h) start + h end``, with ``h = (1 - cos(pi t)) / 2`` or ``h = t`` for
    ``t = step / steps``, as in torch's SWALR.

    Args:
        start, end: learning rates.
        step: updates since the start, at least 0.
        steps: length, at least 0; 0 gives ``end`` at once.
        strategy: one of `STRATEGIES`.
    """
    if step >= steps:
        return end
    t = step / steps
    h = (1 - math.cos(math.pi * t)) / 2 if strategy == "cos" else t
    return (1 - h) * start + h * end


def cyclical_rate(high: float, low: float, step: int, length: int) -> float:
    """Return a learning rate that falls from ``high`` to ``low`` in every ``length`` updates.

    ``(1 - t) high + t low`` with ``t = (step mod length + 1) / length`` (Izmailov et al. 2018,
    section 3.2): the last update of a cycle has the rate ``low``; weights are averaged after it.

    Args:
        high, low: learning rates.
        step: updates since the first cycle began, at least 0.
        length: at least 1; 1 gives ``low``.
    """
    t = (step % length + 1) / length
    return (1 - t) * high + t * low
