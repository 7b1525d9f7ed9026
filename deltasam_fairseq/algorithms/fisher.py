"""Choose the weights with the largest squared gradients: the Fisher mask of FSAM.

Zhong et al. 2022, "Improving Sharpness-Aware Minimization with Fisher Mask for Better
Generalization on Language Models" (FSAM): the ascent moves only the share of the weights whose
diagonal of the empirical Fisher information, ``F_k = mean_j (d l_j / d w_k)^2``, is largest.
"""

import math
from typing import List, Optional, Sequence

import torch
from torch import Tensor


def largest_mask(scores: Sequence[Tensor], share: float) -> Optional[List[Tensor]]:
    """Return which weights have the largest scores, over all tensors together.

    Args:
        scores: ``F_k`` up to a factor, any shapes, at least 0; the same on every process.
        share: of the weights to choose, above 0, at most 1; rounded up to a whole weight.

    Returns:
        a boolean tensor each, on the devices of ``scores``: True at the ``ceil(share d)`` largest
        of d weights and at what equals the smallest of them; never at a score of 0. None if a
        score is not finite. Waits for the device.
    """
    flat = torch.cat([s.flatten() for s in scores])
    if not torch.isfinite(flat).all():
        return None
    chosen = max(1, math.ceil(share * len(flat) - 1e-9))  # 0.1 * 30 is 3.0000000000000004
    least = torch.topk(flat, chosen, sorted=False).values.min()
    return [(s >= least) & (s > 0) for s in scores]


def masked(grads: Sequence[Tensor], mask: Sequence[Tensor]) -> List[Tensor]:
    """Return the gradients with zeros outside of the mask; the norm is then that of the rest.

    Args:
        grads: any shapes.
        mask: booleans of the same shapes; all True is SAM.
    """
    return [g.masked_fill(~m, 0.0) for g, m in zip(grads, mask)]
