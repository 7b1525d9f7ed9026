"""Take the part of the gradient at w that the SAM gradient lacks out of the step: GSAM.

Zhuang et al. 2022, "Surrogate Gap Minimization Improves Sharpness-Aware Training", Algorithm 1.
"""

from typing import Sequence

import torch
from torch import Tensor

from deltasam_fairseq.algorithms.rounding import at_least_float32


def gsam_correct_(grads: Sequence[Tensor], clean: Sequence[Tensor], alpha: float) -> None:
    """Replace the gradient at ``w + eps`` by GSAM's, in place.

    ``g_p <- g_p - alpha g_perp``,  ``g_perp = g - (g . g_p / ||g_p||^2) g_p``

    The step along g_p is SAM's. A step against g_perp, which is orthogonal to g_p, lowers the
    surrogate gap ``L(w + eps) - L(w)`` and leaves L(w + eps) as it is to first order.

    Args:
        grads: ``g_p``, of all weights, any shapes and floating dtypes; computed in at least
            float32 and rounded once.
        clean: ``g``, same shapes, in the units of ``grads``.
        alpha: at least 0; 0 is SAM.

    Under data parallelism both are reduced by the caller, so that every process computes the same.
    A zero ``g_p`` stays zero; what is not finite stays not finite.
    """
    dot, square = (
        sum((torch.sum(at_least_float32(a) * b, dtype=torch.float64) for a, b in zip(x, grads)))
        for x in (clean, grads)
    )
    if not torch.is_tensor(square):  # no weights
        return
    zero = torch.zeros_like(square)
    along = torch.where(square == 0, zero, dot / square)
    minus_alpha = torch.where(square == 0, zero, torch.full_like(zero, -alpha))
    for g_p, g in zip(grads, clean):
        wide = at_least_float32(g_p)
        g_p.copy_(wide * (1 + alpha * along).to(wide) + g.to(wide) * minus_alpha.to(wide))
