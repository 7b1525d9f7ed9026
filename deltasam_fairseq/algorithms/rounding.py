"""Rounding to half precision that keeps, in expectation, what nearest rounding throws away.

A perturbation of norm rho over d weights moves each by about ``rho / sqrt(d)``, which is below
half a unit in the last place of most half-precision weights: rounded to nearest it is gone.
Stochastic rounding goes up or down with the probabilities that make the mean exact
(Connolly, Higham and Mary 2021, "Stochastic Rounding and Its Probabilistic Error Analysis").
"""

import torch
from torch import Tensor

# Bits of a float32 that the format has no room for, and its smallest normal number.
_DROPPED_BITS = {torch.float16: 13, torch.bfloat16: 16}


def round_stochastically(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round to one of the two neighbours in ``dtype``, so that the expectation is ``x``.

    Adds random bits below the last place that is kept, and cuts off there. Below float16's
    smallest normal number the spacing is constant, and the rounding is done in its units.

    Args:
        x: float32, any shape; it is not changed. Numbers beyond the range of ``dtype`` become
            infinite when they are cast, NaN and infinity stay.
        dtype: torch.float16 or torch.bfloat16.
        generator: on the device of ``x``; the same everywhere gives the same result everywhere.

    Returns:
        float32 with values that ``dtype`` holds exactly, same shape.
    """
    dropped = _DROPPED_BITS[dtype]
    random_bits = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    random_bits.random_(0, 1 << dropped, generator=generator)
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + random_bits).bitwise_and_(-(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:
        spacing = 2.0**-24
        uniform = random_bits.float().mul_(2.0**-dropped)
        fine = uniform.add_(x * (1 / spacing)).floor_().mul_(spacing)
        rounded = torch.where(x.abs() < torch.finfo(dtype).tiny, fine, rounded)
    # Infinity has no bits to lose; a NaN of all ones would become zero.
    return torch.where(x == x, rounded, x)


def multiplied_in(x: Tensor) -> torch.dtype:
    """Precision that a matrix product multiplies ``x`` in, under the autocast in force.

    Asks a product of two numbers, which on any device and in any version of torch is right.
    """
    one = torch.ones(1, 1, dtype=torch.float32, device=x.device)
    product = torch.mm(one, one).dtype
    return product if x.dtype == torch.float32 else x.dtype


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest: 2^-11 for float16, 2^-8 for bfloat16."""
    return torch.finfo(dtype).eps / 2
