"""The ascent of SAM and ASAM over lists of tensors.

Foret et al. 2020, "Sharpness-Aware Minimization for Efficiently Improving Generalization";
Kwon et al. 2021, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning".
"""

from typing import List, Sequence

import torch
from torch import Tensor


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm over all elements of a list of tensors.

    ``||t||_2 = sqrt(sum_i ||t_i||_2^2)``

    Args:
        tensors: any shapes, any floating dtype (half precision is accumulated in float32),
            on one device.

    Returns:
        0-dim float64 tensor on that device; 0 for an empty list. Not read back to the host.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = [
        torch.linalg.vector_norm(t, dtype=torch.float32 if t.element_size() < 4 else None)
        for t in tensors
    ]
    return torch.stack(norms).double().square().sum().sqrt()


def _radius_over_norm(rho: float, norm: Tensor) -> Tensor:
    """``rho / norm``; 0 where the norm is 0 (nothing to climb), NaN where it is not finite.

    The NaN is on purpose: it reaches the loss at the perturbed weights and with it the
    non-finite handling of the training loop, without a read of the device.
    """
    scale = rho / norm
    scale = torch.where(norm > 0, scale, torch.zeros_like(scale))
    return torch.where(torch.isfinite(norm), scale, torch.full_like(scale, float("nan")))


def move_along_(
    out: List[Tensor], weights: Sequence[Tensor], direction: Sequence[Tensor], scale: Tensor
) -> None:
    """``out_i = w_i + scale * d_i``, elementwise in one pass.

    Args:
        out: receives the result; may be ``direction`` itself.
        weights: ``w``, left as they are.
        direction: ``d``, same shapes.
        scale: 0-dim tensor.
    """
    for v, w, d in zip(out, weights, direction):
        if w.element_size() < 4:  # a scale of 1e-6 is a subnormal in fp16
            v.copy_(torch.addcmul(w.float(), d.float(), scale.to(w.device, torch.float32)))
        else:
            torch.addcmul(w, d, scale.to(w.device, w.dtype), out=v)


def sam_ascent_(
    out: List[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor], rho: float
) -> Tensor:
    """Weights at the SAM perturbation.

    ``out = w + eps*``,  ``eps* = rho g / ||g||_2``

    Args:
        out: receives the perturbed weights, same shapes as ``weights``.
        weights: ``w``, left as they are.
        grads: ascent gradient ``g``; its scale cancels. Under data parallelism already reduced,
            so that every process computes the same ``eps*``.
        rho: radius of the ball in weight space, at least 0.

    Returns:
        ``||g||_2``, 0-dim float64. A zero gradient perturbs nothing; a gradient that is not
        finite makes all of ``out`` NaN.
    """
    norm = global_norm(grads)
    move_along_(out, weights, grads, _radius_over_norm(rho, norm))
    return norm


def asam_ascent_(
    out: List[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: float,
    eta: float,
) -> Tensor:
    """Weights at the adaptive (elementwise, scale-invariant) SAM perturbation.

    ``out = w + rho T^2 g / ||T g||_2``,  ``T = diag(|w| + eta)``

    The paper's T over all weights; the authors' code leaves T = 1 for parameters whose name
    does not contain "weight". With ``|w| + eta = 1`` everywhere this is `sam_ascent_`.

    Args:
        out: receives the perturbed weights, same shapes as ``weights``.
        weights: ``w``, left as they are.
        grads: ascent gradient, as in `sam_ascent_`.
        rho: radius in units of the weights' own size; the paper uses 0.5 to 2.
        eta: added to ``|w|`` so that weights at zero can move; the paper uses 0.01.

    Returns:
        ``||T g||_2``, 0-dim float64; degenerate gradients as in `sam_ascent_`.
    """
    norm = global_norm([(w.abs() + eta) * g for w, g in zip(weights, grads)])
    for v, w, g in zip(out, weights, grads):
        torch.mul((w.abs() + eta).square_(), g, out=v)
    move_along_(out, weights, out, _radius_over_norm(rho, norm))
    return norm
