"""Compute the papers' equations one by one: plain references for the fast algorithms.

They share no forwards, write nothing in place and run on one process: slow, in the precision of the
weights (tests use float64). Tests compare the fast implementation with them. The per-instance
perturbation exists here only, to measure what delta-SAM approximates.

``losses`` maps a flat weight vector, shape (d,), to the losses of N sentences, shape (N,).
"""

import math
from typing import Callable, NamedTuple

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]


class DeltaSAMReference(NamedTuple):
    """All quantities of one delta-SAM ascent; shapes (N,), (N,), (), (N,), (d,)."""

    a: Tensor
    g: Tensor
    r: Tensor
    weights: Tensor
    eps: Tensor


def gradient(losses: Losses, w: Tensor, weights: Tensor) -> Tensor:
    """Return ``grad_w sum_j weights_j l_j(w)``, shape (d,)."""
    w = w.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad((weights * losses(w)).sum(), w)
    return grad


def perturbation(grad: Tensor, rho: float) -> Tensor:
    """Return ``rho g / ||g||``, shape (d,); zero for a zero gradient."""
    norm = grad.norm()
    return rho * grad / norm if norm > 0 else torch.zeros_like(grad)


def sam_reference(losses: Losses, w: Tensor, rho: float) -> Tensor:
    """Return ``eps*`` of SAM (Foret et al. 2020), shape (d,)."""
    n = len(losses(w))
    return perturbation(gradient(losses, w, torch.full((n,), 1.0 / n, dtype=w.dtype)), rho)


def asam_reference(losses: Losses, w: Tensor, rho: float, eta: float) -> Tensor:
    """Return ``eps*`` of ASAM (Kwon et al. 2021), shape (d,)."""
    n = len(losses(w))
    t = w.abs() + eta
    scaled = t * gradient(losses, w, torch.full((n,), 1.0 / n, dtype=w.dtype))
    return rho * t * scaled / scaled.norm()


def delta_sam_reference(
    losses: Losses, w: Tensor, u: Tensor, rho: float, beta: float
) -> DeltaSAMReference:
    """Compute one ascent of delta-SAM (Zhou et al., Eq. 3 to 6).

    Args:
        losses: see the module.
        w: weights, shape (d,).
        u: the random direction of Eq. 3, any length but 0, shape (d,).
        rho, beta: as in the paper.
    """
    with torch.no_grad():
        a = losses(w + rho * u / u.norm()) - losses(w)  # Eq. 3
    n = len(a)
    uniform = torch.full_like(a, 1.0 / n)
    g, r, weights = uniform, torch.zeros_like(a.sum()), uniform
    if n > 1 and torch.isfinite(a).all() and a.abs().sum() > 0:
        g = a.abs() / a.abs().sum()  # Eq. 4
        if (g * a).sum() != 0:
            r = beta * a.mean().abs() / (g * a).sum().abs()  # Eq. 5
            weights = (g - 1.0 / n) * r + 1.0 / n  # Eq. 6
    return DeltaSAMReference(a, g, r, weights, perturbation(gradient(losses, w, weights), rho))


def rw_sam_reference(losses: Losses, w: Tensor, z: Tensor, rho: float, lambda_: float) -> Tensor:
    """Return ``eps*`` of RW-SAM (Luo et al. 2025), shape (d,).

    Args:
        losses: see the module.
        w: weights, shape (d,).
        z: the probe's direction, each element +1 or -1, shape (d,).
        rho, lambda_: see `deltasam_fairseq.algorithms.gibbs`.
    """
    with torch.no_grad():
        s = (losses(w + rho * z / z.norm()) - losses(w)).abs()
    return perturbation(gradient(losses, w, torch.softmax(lambda_ * s / s.max(), dim=0)), rho)


def per_instance_reference(losses: Losses, w: Tensor, rho: float) -> Tensor:
    """Return ``eps_j = rho grad l_j / ||grad l_j||`` of each sentence (Zhou et al., Eq. 2).

    Returns:
        shape (N, d); N backward passes.
    """
    n = len(losses(w))
    one_hot = torch.eye(n, dtype=w.dtype, device=w.device)
    return torch.stack([perturbation(gradient(losses, w, e), rho) for e in one_hot])


def m_sharpness_reference(losses: Losses, w: Tensor, rho: float, m: int) -> Tensor:
    """Return the descent gradient of m-sharpness (Foret et al. 2020, section 4.1).

    ``(1/N) sum_k N_k grad L_k(w + eps_k)``, ``eps_k = rho grad L_k / ||grad L_k||`` of group k of
    at most ``m`` consecutive sentences.

    Returns:
        shape (d,).
    """
    n = len(losses(w))
    descent = torch.zeros_like(w)
    for begin in range(0, n, m):
        group = torch.zeros(n, dtype=w.dtype, device=w.device)
        group[begin : begin + m] = 1.0
        eps = perturbation(gradient(losses, w, group), rho)
        descent += gradient(losses, w + eps, group) / n
    return descent


def gsam_reference(losses: Losses, w: Tensor, rho: float, alpha: float) -> Tensor:
    """Return GSAM's gradient of the mean loss (Zhuang et al. 2022, Algorithm 1), shape (d,)."""
    n = len(losses(w))
    uniform = torch.full((n,), 1.0 / n, dtype=w.dtype)
    g = gradient(losses, w, uniform)
    g_p = gradient(losses, w + perturbation(g, rho), uniform)
    unit = g_p / g_p.norm()
    return g_p - alpha * (g - (g @ unit) * unit)


def functional_reference(
    outputs: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor], w: Tensor, rho: float
) -> Tensor:
    """Return ``J_z(w + eps*)^T dL/dz(w)`` of functional SAM (Singh et al. 2025), shape (d,).

    Args:
        outputs: z, of a flat weight vector.
        loss: L of z, 0-dim.
    """
    z = outputs(w).detach().requires_grad_()
    (delta,) = torch.autograd.grad(loss(z), z)
    at_w = w.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(outputs(at_w)), at_w)
    _, product = torch.autograd.functional.vjp(outputs, w + perturbation(g, rho), delta)
    return product


def fisher_reference(losses: Losses, w: Tensor, share: float) -> Tensor:
    """Return which weights FSAM perturbs (Zhong et al. 2022), by sorting; boolean, shape (d,)."""
    n = len(losses(w))
    one_hot = torch.eye(n, dtype=w.dtype)
    fisher = torch.stack([gradient(losses, w, e) ** 2 for e in one_hot]).mean(0)
    mask = torch.zeros_like(fisher, dtype=torch.bool)
    mask[fisher.argsort(descending=True)[: math.ceil(share * len(w))]] = True
    return mask & (fisher > 0)


def tram_reference(losses: Losses, w: Tensor, d: Tensor) -> Tensor:
    """Return ``d w^2 g / ||w g||`` of TRAM (Sherborne et al. 2024), shape (d,)."""
    n = len(losses(w))
    g = gradient(losses, w, torch.full((n,), 1.0 / n, dtype=w.dtype))
    return d * w**2 * g / (w * g).norm()
