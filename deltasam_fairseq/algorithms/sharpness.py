"""Measure how much the loss rises at distance rho from the weights: three ways, and curves.

    per-batch       l_B(w + eps*) - l_B(w),   eps* = rho grad l_B / ||grad l_B||       (SAM)
    reweighted      l_B(w + eps') - l_B(w),   eps' = rho grad L' / ||grad L'||,
                    L' = sum_j g'_j l_j                                               (delta-SAM)
    per-instance    mean_j [ l_j(w + eps_j) - l_j(w) ],   eps_j = rho grad l_j / ||grad l_j||

with ``l_B = mean_j l_j``. Foret et al. 2020; Zhou et al., "Sharpness-Aware Minimization with
Dynamic Reweighting", Eq. 2 (per-instance) and Eq. 3 to 6 (``g'``). To first order in rho they
are ``rho ||mean_j grad l_j||``, something below it, and ``rho mean_j ||grad l_j||``.
"""

from typing import Any, Callable, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from deltasam_fairseq.algorithms.reweighting import guardedness, guardedness_sums, reweight
from deltasam_fairseq.algorithms.sam import sam_ascent_

# Writes other weights into a list of tensors.
Writer = Callable[[List[Tensor]], Any]


class Landscape(NamedTuple):
    """The losses of the N sentences of one batch as a function of the weights.

    Attributes:
        weights: ``w``, one tensor a weight; no function of this module writes to them.
        losses: ``l_j``, shape (N,), without graph: at ``w`` for None, else at the weights that
            the argument writes into a list of tensors like ``weights``.
        gradient: from ``c``, shape (N,), to ``grad_w sum_j c_j l_j(w)``, a list like
            ``weights``.
    """

    weights: List[Tensor]
    losses: Callable[[Optional[Writer]], Tensor]
    gradient: Callable[[Tensor], List[Tensor]]


def clean_losses(landscape: Landscape) -> Tensor:
    """Return ``l_j(w)``, shape (N,), float64, since differences from them are small."""
    return landscape.losses(None).double()


def losses_at(landscape: Landscape, direction: Sequence[Tensor], radius: float) -> Tensor:
    """Return the losses at a distance along a direction.

    ``l_j(w + radius d / ||d||_2)``

    Args:
        landscape: N sentences.
        direction: ``d``, a list like the weights; its length cancels.
        radius: distance from ``w``, L2 norm over all weights; negative goes against ``d``.

    Returns:
        shape (N,), float64. A zero direction gives the losses at ``w``, one that is not finite
        NaN.
    """

    def write(out: List[Tensor]) -> None:
        sam_ascent_(out, landscape.weights, direction, radius)

    return landscape.losses(write).double()


def mean_rise(
    landscape: Landscape, clean: Tensor, direction: Sequence[Tensor], rho: float
) -> Tensor:
    """Return the sharpness along one direction shared by all sentences.

    ``mean_j [ l_j(w + rho d / ||d||) - l_j(w) ]``

    Along `sam_direction` this is per-batch sharpness, along `delta_sam_direction` reweighted.

    Args:
        landscape: N sentences.
        clean: `clean_losses` of the same landscape, shape (N,).
        direction: ``d``, a list like the weights.
        rho: radius, L2 norm over all weights.

    Returns:
        0-dim float64, in the unit of the losses; 0 for rho 0.
    """
    return (losses_at(landscape, direction, rho) - clean).mean()


def sam_direction(landscape: Landscape, clean: Tensor) -> List[Tensor]:
    """Return ``grad l_B(w)``, the ascent direction of SAM (Foret et al. 2020).

    Args:
        landscape: N sentences.
        clean: `clean_losses` of the same landscape, shape (N,); only its shape matters.

    Returns:
        a list like the weights.
    """
    return landscape.gradient(torch.full_like(clean, 1.0 / len(clean)))


def delta_sam_direction(
    landscape: Landscape, clean: Tensor, u: Sequence[Tensor], rho: float, beta: float
) -> List[Tensor]:
    """Return ``grad sum_j g'_j l_j(w)``, delta-SAM's ascent direction (Zhou et al., Eq. 3 to 6).

    Args:
        landscape: N sentences, the whole batch.
        clean: `clean_losses` of the same landscape, shape (N,).
        u: random direction of Eq. 3, a list like the weights.
        rho: radius of the probe, L2 norm over all weights, above 0.
        beta: scale of the reweighting, at least 0; 0 gives `sam_direction`.

    Returns:
        a list like the weights.
    """
    a = guardedness(clean, losses_at(landscape, u, rho))
    weights = reweight(a, guardedness_sums(a), beta).weights
    return landscape.gradient(weights / len(clean))


def per_instance_rises(sentences: Iterable[Landscape], rhos: Sequence[float]) -> Tensor:
    """Return the rise of every sentence's loss along its own gradient (Zhou et al., Eq. 2).

    ``l_j(w + eps_j) - l_j(w)``,  ``eps_j = rho grad l_j / ||grad l_j||_2``

    The mean over the sentences is per-instance sharpness. Exact and slow: one backward pass and
    ``1 + len(rhos)`` forward passes a sentence.

    Args:
        sentences: N landscapes of one sentence each, taken one after the other.
        rhos: R radii, L2 norm over all weights.

    Returns:
        shape (N, R), float64. A landscape of several sentences counts as one with their mean
        loss: of one batch this is per-batch sharpness.
    """
    rows = []
    for sentence in sentences:
        clean = clean_losses(sentence)
        direction = sam_direction(sentence, clean)
        rows.append(torch.stack([mean_rise(sentence, clean, direction, rho) for rho in rhos]))
    return torch.stack(rows)


def loss_curve(landscape: Landscape, direction: Sequence[Tensor], radii: Sequence[float]) -> Tensor:
    """Return the mean loss along a line through the weights.

    ``l_B(w + t d / ||d||_2)`` for every t in ``radii``

    Args:
        landscape: N sentences.
        direction: ``d``, a list like the weights.
        radii: R distances, L2 norm over all weights, of either sign.

    Returns:
        shape (R,), float64, in the unit of the losses.
    """
    return torch.stack([losses_at(landscape, direction, t).mean() for t in radii])


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the cosine of the angle between two directions.

    ``<a, b> / (||a||_2 ||b||_2)``

    Args:
        a, b: lists of tensors of the same shapes.

    Returns:
        0-dim float64, -1 to 1; 0 where one of them is zero.
    """

    def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.sum(s * t, dtype=torch.float64) for s, t in zip(x, y)]).sum()

    lengths = (dot(a, a) * dot(b, b)).sqrt()
    return torch.where(lengths == 0, torch.zeros_like(lengths), dot(a, b) / lengths)


def mean_over_batches(values: Tensor, counts: Tensor) -> Tuple[Tensor, Tensor]:
    """Return the mean over batches of unequal size, and its standard error.

    ``m = sum_b n_b x_b / sum_b n_b``
    ``se^2 = K / (K - 1) sum_b (n_b / sum n)^2 (x_b - m)^2``

    Args:
        values: ``x_b``, one figure a batch, shape (K, ...).
        counts: ``n_b``, sentences of each batch, shape (K,).

    Returns:
        mean and standard error, each of shape (...), float64. The standard error is NaN for one
        batch. For equal counts it is the standard deviation (with K - 1) over ``sqrt(K)``.
    """
    k = len(values)
    share = (counts.double() / counts.sum()).reshape(-1, *[1] * (values.dim() - 1))
    mean = (share * values).sum(dim=0)
    squares = (share * (values - mean)).square().sum(dim=0)
    correction = k / (k - 1) if k > 1 else float("nan")
    return mean, (correction * squares).sqrt()
