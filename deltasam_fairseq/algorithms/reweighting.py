"""Compute delta-SAM's ascent weights from the guardedness of the sentences.

Zhou et al., "Sharpness-Aware Minimization with Dynamic Reweighting", Eq. 3 to 6.
Symbols are the paper's: N sentences of one global batch, ``a`` guardedness, ``g`` its
normalised size, ``r`` the ratio that ``beta`` scales, ``g'`` the ascent weights.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class Reweighting(NamedTuple):
    """Ascent weights of one process's sentences, and the quantities behind them.

    Attributes:
        weights: ``N g'_j``, shape (B,), float64. 1.0 means "as in plain SAM", exactly so where
            the weights are uniform; the sum over the global batch is N; negative where ``r`` is
            large, as in the paper.
        r: the ratio of Eq. 5, 0-dim float64; 0 where the weights are uniform; None for weights
            that are not of Eq. 6.
        squares: ``sum_j g_j^2`` over this process's sentences, 0-dim float64. Added up over all
            processes, ``1 / (N squares)`` is the effective share of instances, 1/N to 1.
        n: N, sentences of the global batch, 0-dim float64.
        uniform: 0-dim bool, whether the weights are uniform because of a degenerate case.
        finite: 0-dim bool, whether all guardedness of the global batch is finite.
        divisor: 0-dim float64, at least 1, of the size of the largest weights: gradients of the
            weighted loss over it do not overflow in half precision where the batch loss's do not.
    """

    weights: Tensor
    r: Optional[Tensor]
    squares: Tensor
    n: Tensor
    uniform: Tensor
    finite: Tensor
    divisor: Tensor


def guardedness(clean: Tensor, probed: Tensor) -> Tensor:
    """Return the rise of each sentence's loss at the probed weights (Eq. 3).

    ``a_j = l_j(w + rho u / ||u||) - l_j(w)``

    Args:
        clean: ``l_j(w)``, shape (B,).
        probed: ``l_j(w + rho u / ||u||)``, shape (B,), under the same dropout masks.

    Returns:
        ``a``, shape (B,), float64: the difference is many orders below the losses.
    """
    return probed.detach().double() - clean.detach().double()


def sum_tokens(losses: Tensor) -> Tensor:
    """Sum the losses of each sentence's tokens in float64.

    The loss of a long target is in the thousands, where float32 has a spacing of 1e-4; its rise
    at the probe (Eq. 3) is about 1e-3.

    Args:
        losses: shape (B, T), 0 at padding.

    Returns:
        shape (B,), float64; on MPS, which has no float64, of the precision of ``losses``.
    """
    return losses.sum(dim=1, dtype=None if losses.device.type == "mps" else torch.float64)


def guardedness_sums(a: Tensor) -> Tensor:
    """Return the four sums that Eq. 4 to 6 need from the whole batch.

    ``(sum|a|, sum a, sum |a| a, N)``

    Args:
        a: guardedness of this process's sentences, shape (B,), float64; B may be 0.

    Returns:
        shape (4,), float64. Under data parallelism the caller sums it over all processes (one
        all-reduce) before `reweight`.
    """
    count = a.new_full((), a.numel())  # a copy from the host would wait for the device
    return torch.stack((a.abs().sum(), a.sum(), (a.abs() * a).sum(), count))


def reweight(a: Tensor, sums: Tensor, beta: float) -> Reweighting:
    """Compute the ascent weights ``g'`` (Eq. 4 to 6), multiplied by N.

    ``g_j = |a_j| / sum|a|``,  ``r = beta |mean a| / |sum g a|``,
    ``N g'_j = (N g_j - 1) r + 1``

    Weights are uniform (plain SAM) if the equations are undefined: one sentence, all ``a`` zero, a
    zero denominator in Eq. 5, an ``a`` that is not finite. ``beta = 0`` is plain SAM. The host
    reads no value from the device.

    Args:
        a: guardedness of this process's sentences, shape (B,), float64.
        sums: `guardedness_sums` of the *global* batch, shape (4,), float64.
        beta: scale of the reweighting, at least 0.

    Returns:
        a `Reweighting`; ``weights`` has shape (B,).
    """
    abs_sum, sum_, signed_square_sum, n = sums.unbind()
    finite = torch.isfinite(sums).all()
    r = beta * (sum_ / n).abs() * abs_sum / signed_square_sum.abs()
    uniform = ~(finite & torch.isfinite(r) & (abs_sum > 0) & (n > 1))
    r = torch.where(uniform, torch.zeros_like(r), r)
    n_g = torch.where(uniform, torch.ones_like(a), n * a.abs() / abs_sum)
    weights = (n_g - 1) * r + 1
    squares = (n_g / n).square().sum()
    return Reweighting(weights, r, squares, n, uniform, finite, r.clamp(min=1))
