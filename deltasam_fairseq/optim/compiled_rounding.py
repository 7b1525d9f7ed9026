"""Stochastic rounding in one kernel, by torch's own compiler.

Rounding is some fifteen operations on every weight, each of which reads and writes memory. On a
GPU that is more than the update of a small batch can hide. Fused, a weight is read and written
once.
"""

import functools
import logging
import os
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from deltasam_fairseq.algorithms import OPERATIONS, Kernels, random_bits

logger = logging.getLogger(__name__)

_WORTH_IT = 1024  # weights of a piece
_REMEDY = "the result is the same, the rounding slower; TORCH_COMPILE_DISABLE=1 skips the attempt"


def fused_kernels(
    dtype: torch.dtype,
    weights: Tensor,
    direction_in: torch.dtype,
    compiled: Optional[bool] = None,
) -> Kernels:
    """What `StochasticRounding` is to compute with.

    Args:
        dtype: that is rounded to.
        weights: some of the weights, in the precision that they are kept in.
        direction_in: precision of what they move along.
        compiled: whether to; default: on a GPU.

    Returns:
        compiled kernels, if torch can compile here and they compute the same; else torch's
        operations, one after the other.
    """
    if compiled is None:
        compiled = weights.is_cuda and os.environ.get("TORCH_COMPILE_DISABLE") != "1"
    if not compiled:
        return OPERATIONS
    return _compiled(dtype, weights.dtype, direction_in, weights.device)


@functools.lru_cache(maxsize=None)
def _compiled(
    dtype: torch.dtype, kept_in: torch.dtype, direction_in: torch.dtype, device: torch.device
) -> Kernels:
    try:
        from torch._inductor import config

        config.compile_threads = 1  # in this process: workers would be forked off beside a GPU
        compiled: Any = [torch.compile(kernel, dynamic=True) for kernel in OPERATIONS]
        same = _compute_the_same(Kernels(*compiled), dtype, kept_in, direction_in, device)
    except Exception as e:  # no compiler, no torch.compile: whatever is amiss on this machine
        logger.warning(f"stochastic rounding is not compiled ({_reason(e)}): {_REMEDY}")
        return OPERATIONS
    if not same:
        logger.warning(f"stochastic rounding, compiled, differs and is not used: {_REMEDY}")
        return OPERATIONS
    logger.info(f"stochastic rounding to {dtype} is compiled")
    return Kernels(*map(_until_it_fails, compiled, OPERATIONS))


def _until_it_fails(compiled: Callable[..., Any], operations: Callable[..., Any]) -> Any:
    """The compiled kernel, until it cannot be compiled for something that the check did not see."""
    failed = False

    def kernel(*args: Any) -> Any:
        nonlocal failed
        # For one number, and for none, torch would compile anew.
        if not failed and args[0].numel() >= _WORTH_IT:
            try:
                return compiled(*args)
            except Exception as e:
                if "out of memory" in str(e):
                    raise
                logger.warning(f"stochastic rounding is compiled no longer ({_reason(e)})")
                failed = True
        return operations(*args)

    return kernel


def _reason(error: Exception) -> str:
    """The first line of what the compiler met, out of its own wrapping."""
    error = getattr(error, "inner_exception", error)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@torch.no_grad()
def _compute_the_same(
    kernels: Kernels,
    dtype: torch.dtype,
    kept_in: torch.dtype,
    direction_in: torch.dtype,
    device: torch.device,
) -> bool:
    """Compare with torch's operations on weights of all sizes, and on a NaN.

    A fused multiplication and addition rounds once less, by which one weight in 10^4 may fall to
    the other side.
    """
    n = 100_003
    generator = torch.Generator(device).manual_seed(0)
    weights = torch.randn(n, device=device, generator=generator)
    weights = (weights * torch.logspace(-8, 1, n, device=device)).to(kept_in)
    direction = torch.randn(n, device=device, generator=generator).to(direction_in)
    direction[: n // 3] = 0
    bits = random_bits(n, generator)
    scale = torch.full((1,), 1e-5, device=device)
    results, sums = [], []
    for each in (OPERATIONS, kernels):
        results.append(each.round_moved(weights, direction, scale, bits, dtype))
        along = each.realised_along(results[-1], weights, direction, scale)
        sums.append(torch.stack(along))
    differ = (results[0] != results[1]).double().mean()
    lost = kernels.round_moved(weights, direction, scale * float("nan"), bits, dtype)
    close = torch.allclose(sums[1], sums[0], rtol=1e-2)
    return bool(differ < 1e-3) and close and bool(lost.isnan().all())
