"""The random direction of Eq. 3, the same on every process without being sent."""

from typing import List

import torch
from torch import Tensor

from deltasam_fairseq.algorithms.sam import global_norm

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """Finaliser of splitmix64 (Steele et al. 2014): neighbouring integers to unrelated ones."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def probe_generator(seed: int, update: int, device: torch.device) -> torch.Generator:
    """Random generator of one update's probe.

    Depends on nothing but its arguments, so that all processes and a resumed run draw the same
    direction; apart from the global generators, so that no dropout mask moves. The seed is
    mixed because fairseq seeds its dropout with ``seed + update`` itself.

    Args:
        seed: the run's seed.
        update: number of updates done.
        device: where the weights are.

    Returns:
        a seeded generator on ``device``.
    """
    generator = torch.Generator(device=device)
    generator.manual_seed(_mix(_mix(seed & _MASK) ^ (update & _MASK)) >> 1)
    return generator


def draw_direction_(out: List[Tensor], generator: torch.Generator) -> Tensor:
    """Draw ``u ~ N(0, I)`` into a list of tensors.

    Args:
        out: receives ``u``; one tensor a weight, in an order that is the same everywhere.
        generator: see `probe_generator`.

    Returns:
        ``||u||_2``, 0-dim float64.
    """
    for u in out:
        u.normal_(generator=generator)
    return global_norm(out)
