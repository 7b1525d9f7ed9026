"""Stochastic rounding in one kernel, compiled by torch.

Rounding takes some fifteen operations a weight, each of which reads and writes memory. On a GPU
that is more than the update of a small batch can hide. A compiled kernel reads and writes a weight
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

_MIN_COMPILED = 1024  # weights of a piece, below which the plain operations are as fast


def rounding_kernels(
    dtype: torch.dtype,
    weights: Tensor,
    direction_in: torch.dtype,
    compiled: Optional[bool] = None,
) -> Kernels:
    """Choose what `StochasticRounding` computes with, and log it.

    Args:
        dtype: that is rounded to.
        weights: some of the weights, in the precision that they are kept in.
        direction_in: precision of what they move along.
        compiled: whether to compile; default: on a GPU, unless TORCH_COMPILE_DISABLE=1.

    Returns:
        compiled kernels, if torch can compile here and they compute the same; else `OPERATIONS`.
    """
    if compiled is None:
        compiled = weights.is_cuda and os.environ.get("TORCH_COMPILE_DISABLE") != "1"
    if not compiled:
        return OPERATIONS
    return _compile_and_check(dtype, weights.dtype, direction_in, weights.device)


def _fall_back_to_operations(why: str) -> Kernels:
    """The one place where a run goes over to the plain operations."""
    logger.warning(
        f"stochastic rounding {why}: plain operations take over, with the same result but slower; "
        "TORCH_COMPILE_DISABLE=1 skips the attempt"
    )
    return OPERATIONS


@functools.lru_cache(maxsize=None)
def _compile_and_check(
    dtype: torch.dtype, kept_in: torch.dtype, direction_in: torch.dtype, device: torch.device
) -> Kernels:
    try:
        kernels = Kernels(*map(_compile, OPERATIONS))
        same = _compute_the_same(kernels, dtype, kept_in, direction_in, device)
    except Exception as e:  # no compiler, no torch.compile, whatever is wrong on this machine
        return _fall_back_to_operations(f"is not compiled ({_reason(e)})")
    if not same:
        return _fall_back_to_operations("differs when compiled")
    logger.info(f"stochastic rounding to {dtype} is compiled")
    return Kernels(*map(_call_until_it_fails, kernels, OPERATIONS))


def _compile(kernel: Callable[..., Any]) -> Callable[..., Any]:
    from torch._inductor import config

    compiled = torch.compile(kernel, dynamic=True)

    def call(*args: Any) -> Any:
        # Compile in this process: the compiler's workers would be forked beside a GPU.
        with config.patch(compile_threads=1):
            return compiled(*args)

    return call


def _call_until_it_fails(compiled: Callable[..., Any], operations: Callable[..., Any]) -> Any:
    """The compiled kernel, until it cannot be compiled for a shape that the check did not see."""
    failed = False

    def kernel(*args: Any) -> Any:
        nonlocal failed
        # torch would compile again for one number, and for none.
        if failed or args[0].numel() < _MIN_COMPILED:
            return operations(*args)
        try:
            return compiled(*args)
        except Exception as e:
            if "out of memory" in str(e):
                raise
            failed = True
            _fall_back_to_operations(f"is compiled no longer ({_reason(e)})")
            return operations(*args)

    return kernel


def _reason(error: Exception) -> str:
    """The first line of the compiler's own error, out of torch's wrapping."""
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
    """Compare with the plain operations on weights of all sizes, and on a NaN.

    A fused multiplication and addition rounds once less, so that one weight in 10^4 may fall to
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
