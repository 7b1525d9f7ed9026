"""Perturbations of word embeddings: draw, take an ascent step, project, each a sentence at a time.

A perturbation ``delta`` has shape (B, T, C), one (T, C) block a sentence. A norm takes a
sentence's block as one vector of T x C numbers: ``2`` is L2 (Frobenius), ``inf`` the largest
absolute value. Padding is zero in ``delta`` and in its gradient and adds nothing.
"""

import math

import torch
from torch import Tensor


def sentence_norm(delta: Tensor, norm: float) -> Tensor:
    """Return the norm of each sentence's block.

    Args:
        delta: shape (B, T, C).
        norm: 2 or ``math.inf``.

    Returns:
        shape (B, 1, 1).
    """
    flat = delta.flatten(start_dim=1)
    sizes = flat.abs().amax(dim=1) if math.isinf(norm) else flat.norm(p=norm, dim=1)
    return sizes.view(-1, 1, 1)


def normalised(gradient: Tensor, norm: float) -> Tensor:
    """Return ``g / ||g||`` for each sentence; zero where g is zero or not finite.

    It scales by the largest absolute value first, so that squares of small numbers do not
    underflow.

    Args:
        gradient: shape (B, T, C).
        norm: 2 or ``math.inf``.

    Returns:
        shape (B, T, C), of norm 1 or 0.
    """
    largest = sentence_norm(gradient, math.inf)
    unusable = ~torch.isfinite(largest) | (largest == 0)
    unit = (gradient / largest).masked_fill(unusable, 0.0)
    if math.isinf(norm):
        return unit
    return unit / sentence_norm(unit, norm).masked_fill(unusable, 1.0)


def project(delta: Tensor, radius: float, norm: float) -> Tensor:
    """Return the nearest point of the ball ``||delta|| <= radius`` for each sentence.

    Args:
        delta: shape (B, T, C).
        radius: of the ball, above 0.
        norm: 2 or ``math.inf``.

    Returns:
        shape (B, T, C).
    """
    if math.isinf(norm):
        return delta.clamp(-radius, radius)
    size = sentence_norm(delta, norm)
    return torch.where(size > radius, delta * (radius / size), delta)


def freelb_start(
    mask: Tensor, dim: int, magnitude: float, norm: float, dtype: torch.dtype
) -> Tensor:
    """Draw FreeLB's first perturbation, uniformly.

    ``U(-1, 1) magnitude / sqrt(n_j C)`` for L2, with n_j the sentence's number of tokens, so that
    the norm does not depend on its length (about 0.58 magnitude); ``U(-1, 1) magnitude`` for Linf.

    Args:
        mask: shape (B, T), True where there is a token.
        dim: C, size of an embedding.
        magnitude: at least 0.
        norm: 2 or ``math.inf``.
        dtype: of the result.

    Returns:
        shape (B, T, C), zero at padding.

    Source: Zhu et al. 2020, "FreeLB: Enhanced Adversarial Training for Natural Language
    Understanding", Algorithm 1 and the authors' code.
    """
    delta = torch.empty(*mask.shape, dim, dtype=dtype, device=mask.device).uniform_(-1, 1)
    delta = delta * mask.unsqueeze(-1)
    if math.isinf(norm):
        return delta * magnitude
    entries = (mask.sum(dim=1).clamp(min=1) * dim).to(dtype)
    return delta * (magnitude / entries.sqrt()).view(-1, 1, 1)
