"""Take the radius of the ascent from how far the model's output moves: TRAM.

Sherborne et al. 2024, "TRAM: Bridging Trust Regions and Sharpness Aware Minimization". ASAM's
perturbation, its rho replaced by the mean divergence of the outputs of noised inputs (TRAM-x),
or of those of the weights before the last update (TRAM-theta), from the outputs at w:

    eps = d T_w^2 g / ||T_w g||_2,   T_w = diag(|w|)
    d = mean KL(p(. | x + z; w) || p(. | x; w)),   z ~ N(0, sigma^2) on the word embeddings
    d = mean KL(p(. | x; w_{t-1}) || p(. | x; w)),   w = w_t

`asam_ascent_` with eta 0 and rho d writes eps. This module has d.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from deltasam_fairseq.algorithms.divergence import kl, squared_difference
from deltasam_fairseq.algorithms.rounding import at_least_float32


def trust_region_sums(
    moved: Tensor, clean: Tensor, counted: Optional[Tensor] = None, regression: bool = False
) -> Tensor:
    """Return the terms of d that this process adds: the sum of divergences, and their number.

    Args:
        moved: logits at ``x + z`` or at ``w_{t-1}``, shape (..., C).
        clean: those at x and w, same shape.
        counted: which predictions count, shape (...), such as all tokens but padding; None: all.
        regression: the outputs are numbers; the divergence is ``(moved - clean)^2``, and every
            one of them is a prediction.

    Returns:
        shape (2,), float64; sums over micro-batches and processes add up, and
        ``d = sums[0] / sums[1]``.
    """
    moved, clean = (at_least_float32(x) for x in (moved, clean))
    if regression:
        divergence = squared_difference(moved, clean)
    else:
        divergence = kl(F.log_softmax(moved, dim=-1), F.log_softmax(clean, dim=-1))
        divergence = divergence.clamp(min=0)  # rounding
    if counted is not None:
        divergence = divergence[counted]
    n = torch.tensor(divergence.numel(), dtype=torch.float64, device=divergence.device)
    return torch.stack([divergence.double().sum(), n])


def trust_region_radius(sums: Tensor) -> Tensor:
    """Return d of the sums over all processes, 0-dim float64; 0 where nothing was predicted."""
    return sums[0] / sums[1].clamp(min=1)
