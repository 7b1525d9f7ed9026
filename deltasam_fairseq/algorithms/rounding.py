"""Round to half precision stochastically: exact in expectation, also for tiny movements.

A perturbation of norm rho over d weights moves each by about ``rho / sqrt(d)``, which is below
half a unit in the last place of most half-precision weights: rounding to nearest loses it.
Stochastic rounding goes up or down with the probabilities that make the mean exact
(Connolly, Higham and Mary 2021, "Stochastic Rounding and Its Probabilistic Error Analysis").
"""

from typing import Callable, Iterable, Iterator, List, NamedTuple, Tuple

import torch
from torch import Tensor

_RANDOM_BITS = 15

# Weights rounded at a time. On a CPU intermediate results stay in the cache; a GPU finishes 2^22
# weights before the host has started the next kernels.
_AT_A_TIME = {"cpu": 1 << 18, "cuda": 1 << 24}


def random_bits(n: int, generator: torch.Generator) -> Tensor:
    """Draw ``n`` random numbers below 2^15, two a draw; int16, on the generator's device."""
    pairs = torch.empty((n + 1) // 2, dtype=torch.int32, device=generator.device)
    return pairs.random_(generator=generator).bitwise_and_(0x7FFF7FFF).view(torch.int16)[:n]


def round_stochastically(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round to one of the two neighbours in ``dtype``, so that the expectation is ``x``.

    Add random bits below the last place that is kept, then truncate. Below float16's smallest
    normal number the result is still too long: uniform noise of half a unit in the last place,
    independent of the first, makes the cast round stochastically. It changes no other number, since
    it is less than half a unit of any.

    Args:
        x: float32, flat, not changed. No NaN: its bits could become those of a number.
            Numbers beyond the range of ``dtype`` become infinite.
        dtype: torch.float16 or torch.bfloat16.
        bits: `random_bits`, as many.

    Returns:
        ``dtype``, same shape.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13  # bits of a float32 that do not fit
    if dropped > _RANDOM_BITS:
        noisy = torch.add(x.view(torch.int32), bits, alpha=1 << (dropped - _RANDOM_BITS))
    else:
        noisy = x.view(torch.int32) + (bits >> (_RANDOM_BITS - dropped))
    rounded = (noisy & -(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:
        # 12 bits: the sum is exact below 2^-13, and above it the noise is less than half a unit.
        unit, parts = 2.0**-24, 1 << 12
        rounded.add_((bits >> (_RANDOM_BITS - 12)).roll(1), alpha=unit / parts)
        rounded.sub_(unit * (0.5 - 0.5 / parts))
    return rounded.to(dtype)


def round_moved(
    weights: Tensor, direction: Tensor, scale: Tensor, bits: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return ``w + scale d`` in float32, rounded by `round_stochastically` where ``w`` moves.

    Args:
        weights: ``w``, flat, float32 or ``dtype``.
        direction: ``d``, likewise.
        scale: float32, shape (1,).
        bits: `random_bits`, as many.
        dtype: of the result.

    Returns:
        the moved weights, same shape; NaN where ``w``, ``d`` or ``scale`` is.
    """
    step = direction * scale
    moved = weights + step
    # Skip steps of 0, and NaN, whose bits are all ones on a GPU and would overflow.
    moves = (step.abs() > 0) & (moved == moved)
    return torch.where(moves, round_stochastically(moved, dtype, bits), moved.to(dtype))


def realised_along(
    result: Tensor, weights: Tensor, direction: Tensor, scale: Tensor
) -> Tuple[Tensor, Tensor]:
    """Return how far the weights moved along the exact step.

    Returns:
        ``(w' - w) . scale d`` and ``||scale d||^2``, 0-dim float32.
    """
    step = direction * scale
    return torch.dot(result.float() - weights, step), torch.dot(step, step)


class Kernels(NamedTuple):
    """The operations on a piece of the weights, one after the other or fused."""

    round_moved: Callable[..., Tensor]
    realised_along: Callable[..., Tuple[Tensor, Tensor]]


OPERATIONS = Kernels(round_moved, realised_along)


class StochasticRounding:
    """Move weights with rounding in bulk: small tensors together, large ones in pieces.

    Args:
        dtype: torch.float16 or torch.bfloat16.
        generator: on the device of the weights; the same one gives the same result.
        kernels: an implementation of `round_moved` and `realised_along`.
    """

    def __init__(
        self, dtype: torch.dtype, generator: torch.Generator, kernels: Kernels = OPERATIONS
    ) -> None:
        self.dtype = dtype
        self._generator = generator
        self._kernels = kernels

    def move_(
        self,
        out: Iterable[Tensor],
        weights: Iterable[Tensor],
        direction: Iterable[Tensor],
        scale: Tensor,
    ) -> Tensor:
        """``out_i = w_i + scale d_i``, rounded.

        Args:
            out: receives the result, in ``dtype``; or in float32, which then has values of
                ``dtype``, except weights that do not move, which keep their own.
            weights, direction, scale: as in `move_along_`.

        Returns:
            share of the movement that survives along its direction, 0-dim float64.
        """
        scale = scale.to(torch.float32).reshape(1)
        pieces = _in_bulk(zip(out, weights, direction))
        sums = [torch.stack(self._move_(*piece, scale)) for piece in pieces]
        if not sums:
            return torch.ones((), dtype=torch.float64)
        along, whole = torch.stack(sums).double().sum(dim=0)
        return torch.where(whole > 0, along / whole, torch.ones_like(whole))

    def _move_(
        self, out: List[Tensor], w: Tensor, d: Tensor, scale: Tensor
    ) -> Tuple[Tensor, Tensor]:
        bits = random_bits(w.numel(), self._generator)
        rounded = self._kernels.round_moved(w, d, scale, bits, self.dtype)
        along = self._kernels.realised_along(rounded, w, d, scale)
        if out[0].dtype == torch.float32:
            rounded = torch.where(d * scale == 0, w, rounded.float())
        pieces = rounded.split([v.numel() for v in out])
        copy_lists_(out, [values.view_as(v) for v, values in zip(out, pieces)])
        return along


def copy_lists_(out: List[Tensor], values: List[Tensor]) -> None:
    """Copy ``out_i = values_i``; on a GPU in few kernels with torch 2.1 and later."""
    if out and out[0].is_cuda and hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(out, values)
    else:
        for v, value in zip(out, values):
            v.copy_(value)


# A tensor that receives the result, its weights, their direction.
_Tensors = Tuple[Tensor, Tensor, Tensor]


def _in_bulk(tensors: Iterable[_Tensors]) -> Iterator[Tuple[List[Tensor], Tensor, Tensor]]:
    """Regroup tensors into pieces of nearly one size.

    Yields:
        tensors that receive the result; their weights and directions, flat.
    """
    together: List[_Tensors] = []
    filled = 0
    for v, w, d in tensors:
        size = _AT_A_TIME.get(v.device.type, _AT_A_TIME["cuda"])
        if v.numel() >= size and all(t.is_contiguous() for t in (v, w, d)):
            for piece in zip(*(t.view(-1).split(size) for t in (v, w, d))):
                yield [piece[0]], piece[1], piece[2]
            continue
        if filled + v.numel() > size or not _alike(together, (v, w, d)):
            yield from _joined(together)
            together, filled = [], 0
        together.append((v, w, d))
        filled += v.numel()
    yield from _joined(together)


def _alike(some: List[_Tensors], other: _Tensors) -> bool:
    return not some or all(
        (a.dtype, a.device) == (b.dtype, b.device) for a, b in zip(some[0], other)
    )


def _joined(tensors: List[_Tensors]) -> Iterator[Tuple[List[Tensor], Tensor, Tensor]]:
    if tensors:
        out, weights, direction = zip(*tensors)
        w, d = (torch.cat([t.reshape(-1) for t in each]) for each in (weights, direction))
        yield list(out), w, d


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if it is half precision, else as it is."""
    return x.float() if x.element_size() < 4 else x


def multiplied_in(x: Tensor) -> torch.dtype:
    """Return the precision in which matrix products multiply ``x`` under the current autocast.

    It makes a product of two numbers, which is right on any device and version of torch. Autocast
    casts all dtypes but float64.
    """
    one = torch.ones(1, 1, dtype=torch.float32, device=x.device)
    product = torch.mm(one, one).dtype
    return x.dtype if torch.float32 == product or x.dtype == torch.float64 else product


def multiplies_in_tf32(device: torch.device) -> bool:
    """Whether matrix products of float32 round their operands to TF32's 10 bits of mantissa.

    CUDA does from compute capability 8.0 on if ``torch.backends.cuda.matmul.allow_tf32``,
    ``torch.set_float32_matmul_precision`` or the environment (NVIDIA's containers) asks for it.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch's newer setting is in use, which forbids reading the older one
        return torch.backends.cuda.matmul.fp32_precision == "tf32"  # type: ignore[attr-defined]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative rounding error to nearest: 2^-11 (float16), 2^-8 (bfloat16)."""
    return torch.finfo(dtype).eps / 2
