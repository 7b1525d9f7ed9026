"""Descend along fixed output gradients at the perturbed weights: functional SAM.

Singh et al. 2025, "Avoiding spurious sharpness minimization broadens applicability of SAM"; the
same intervention is J-SAM in Baek et al. 2024, "Why is SAM Robust to Label Noise?".

SAM's gradient at w + eps is ``J_z(w + eps)^T dL/dz(w + eps)``, z the model's outputs. Here the
second factor stays that at w, so that the perturbation acts on the function's Jacobian alone.
"""

from typing import Sequence

import torch
from torch import Tensor

from deltasam_fairseq.algorithms.rounding import at_least_float32


def functional_loss(loss: Tensor, outputs: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    """Return ``loss``, whose gradient is the vector-Jacobian product ``J_z(w + eps)^T delta``.

    ``loss.detach() + s - s.detach()``,  ``s = sum z . delta``

    Args:
        loss: at ``w + eps``, 0-dim; its own graph is not used.
        outputs: ``z`` at ``w + eps``, with graph; logits of any shapes.
        deltas: ``dL/dz`` at ``w``, same shapes, of the same sum of losses.

    Returns:
        0-dim, in the dtype of ``loss``. Gradients add up over micro-batches and ranks as those of
        the loss do. At eps = 0 the gradient is that of the loss.
    """
    s = torch.stack([(at_least_float32(z) * d).sum() for z, d in zip(outputs, deltas)]).sum()
    return loss.detach() + (s - s.detach()).to(loss.dtype)
