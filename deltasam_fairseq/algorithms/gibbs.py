"""Compute RW-SAM's ascent weights: a Gibbs distribution over the sentences' sensitivities.

Luo et al. 2025, "Unveiling m-Sharpness Through the Structure of Stochastic Gradient Noise"
(arXiv 2509.18001). N sentences of one global batch, z Rademacher (each weight +1 or -1), R the
radius of the probe,

    s_i = |l_i(w + R z / ||z||) - l_i(w)|
    p_i = exp(lambda s_i / max_j s_j) / sum_k exp(lambda s_k / max_j s_j)
    eps* = rho grad(sum_i p_i l_i)(w) / ||.||_2

The paper has s_i over its finite-difference step, an estimate of the norm of the sentence's
gradient, instead of ``s_i / max_j s_j``: the meaning of its lambda changes with the size of
the gradients. Here the most sensitive sentence weighs ``exp(lambda)`` times as much as one that is
not sensitive at all, in every model and at every moment of a run; R cancels.
"""

from typing import Tuple

import torch
from torch import Tensor

from deltasam_fairseq.algorithms.reweighting import Reweighting


def largest_size(a: Tensor) -> Tensor:
    """Return ``max_i |a_i|`` of this process's sentences, 0 for none.

    Args:
        a: rise of the losses at the probe, shape (B,), float64; B may be 0.

    Returns:
        0-dim float64. Under data parallelism the caller takes the maximum over all processes (one
        all-reduce) before `gibbs_factors`.
    """
    return torch.cat((a.abs(), a.new_zeros(1))).max()


def gibbs_factors(a: Tensor, largest: Tensor, lambda_: float) -> Tuple[Tensor, Tensor]:
    """Return ``exp(lambda (s_i / max s - 1))``, and its sum and count.

    Args:
        a: as in `largest_size`; its size is ``s``, its scale cancels.
        largest: `largest_size` of the *global* batch, 0-dim.
        lambda_: at least 0.

    Returns:
        the factors, shape (B,), at most 1, all 1 where all ``s`` are zero; ``(sum_i f_i, N)`` of
        this process, shape (2,). Under data parallelism the caller sums these over all processes
        (one all-reduce) before `gibbs_reweight`.
    """
    factors = (lambda_ * (a.abs() / largest - 1)).exp()
    factors = torch.where(largest == 0, torch.ones_like(a), factors)
    return factors, torch.stack((factors.sum(), a.new_full((), a.numel())))


def gibbs_reweight(factors: Tensor, sums: Tensor) -> Reweighting:
    """Compute the ascent weights ``N p_i``.

    All are positive. They are uniform (plain SAM) for one sentence, for sensitivities that are all
    equal, and if a rise is not finite. ``lambda = 0`` is plain SAM. The host reads no value from
    the device.

    Args:
        factors: from `gibbs_factors`, of this process's sentences, shape (B,).
        sums: from there, of the *global* batch, shape (2,).

    Returns:
        a `Reweighting` without ``r``; its ``squares`` are of ``p``.
    """
    total, n = sums.unbind()
    finite = torch.isfinite(total)
    weights = torch.where(finite, factors * (n / total), torch.ones_like(factors))
    divisor = torch.where(finite, n / total, torch.ones_like(total))  # the largest factor is 1
    uniform = ~finite | (total == n)
    return Reweighting(weights, None, (weights / n).square().sum(), n, uniform, finite, divisor)
