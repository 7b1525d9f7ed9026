"""Averages of weights along a run, and the learning rates that go with them.

Stochastic weight averaging (Izmailov et al. 2018; Lu et al. 2022 for fine-tuning) is the mean of
the weights that a run passes through at a learning rate that keeps it moving.
"""

import math
from typing import Sequence

import torch
from torch import Tensor

STRATEGIES = ("cos", "linear")


def running_mean_(averages: Sequence[Tensor], values: Sequence[Tensor], n: int) -> None:
    """``average <- average + (value - average) / (n + 1)``, the mean of n + 1 values.

    Args:
        averages: means of n values each, float32 or better; written to.
        values: further values, same shapes, any floating dtype and device.
        n: number of values so far, at least 0; with 0 the average becomes a copy.
    """
    if n == 0:
        for average, value in zip(averages, values):
            average.copy_(value)
    else:
        _lerp_(averages, values, 1 / (n + 1))


def exponential_mean_(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """``average <- decay average + (1 - decay) value``.

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
    for average, value in zip(averages, values):  # no second copy of all in the other precision
        average.lerp_(value.to(average), weight)


def annealed_rate(start: float, end: float, step: int, steps: int, strategy: str) -> float:
    """Learning rate that goes from ``start`` to ``end`` in ``steps`` updates and stays there.

    ``(1 - h) start + h end``, with ``h = (1 - cos(pi t)) / 2`` or ``h = t`` for
    ``t = step / steps``, as torch's SWALR has it.

    Args:
        start, end: learning rates.
        step: updates since the start, at least 0.
        steps: length, at least 0; with 0 it is ``end`` at once.
        strategy: one of `STRATEGIES`.
    """
    if step >= steps:
        return end
    t = step / steps
    h = (1 - math.cos(math.pi * t)) / 2 if strategy == "cos" else t
    return (1 - h) * start + h * end


def cyclical_rate(high: float, low: float, step: int, length: int) -> float:
    """Learning rate that falls from ``high`` to ``low`` in every cycle of ``length`` updates.

    ``(1 - t) high + t low`` with ``t = (step mod length + 1) / length`` (Izmailov et al. 2018,
    section 3.2): the last update of a cycle, after which weights are averaged, is made at ``low``.

    Args:
        high, low: learning rates.
        step: updates since the first cycle began, at least 0.
        length: at least 1; with 1 it is ``low``.
    """
    t = (step % length + 1) / length
    return (1 - t) * high + t * low
