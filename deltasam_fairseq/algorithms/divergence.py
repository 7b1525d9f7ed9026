"""Measure how far apart two outputs are: divergences of R3F, R-Drop, SMART, VAT, distillation.

The categorical ones take log-probabilities, float32 or better, which the losses need anyway.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Temperature above which `softened_kl` computes in float64.
_WARM = 10.0


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence ``KL(p || q)`` of categorical distributions.

    ``sum_c p_c (log p_c - log q_c)``

    Args:
        log_p, log_q: log-probabilities, shape (..., C).

    Returns:
        shape (...), in nats, at least 0 but for rounding.
    """
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute the sum of both directions, ``KL(p || q) + KL(q || p)``.

    ``sum_c (p_c - q_c) (log p_c - log q_c)``

    In this form no term is negative, even after rounding. R3F (Aghajanyan et al. 2020) and SMART
    (Jiang et al. 2020) take the sum, R-Drop (Liang et al. 2021) the mean of both directions.

    Args:
        log_p, log_q: log-probabilities, shape (..., C).

    Returns:
        shape (...), in nats.
    """
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)


def softened_kl(log_p: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    """Compute ``T^2 KL(p_T || q_T)`` of distributions softened by a temperature.

    ``p_T = softmax(z / T)`` for logits z, or ``z = log p``, which differs by a constant.
    Its gradient with respect to the logits of q is ``T (q_T - p_T)``: the factor T^2 keeps it as
    large as that of a cross-entropy while T changes (Hinton et al. 2015, section 2.1). At T = 1
    this is `kl`; for large T it tends to half the squared difference of the centred logits,
    divided by C.

    Args:
        log_p, log_q: log-probabilities, shape (..., C).
        temperature: T, above 0.

    Returns:
        shape (...), in nats, at least 0 but for rounding.
    """
    # The divergence of nearly uniform distributions is below the rounding of float32.
    dtype = torch.float64 if temperature > _WARM else log_q.dtype
    p, q = (F.log_softmax(x.to(dtype) / temperature, dim=-1) for x in (log_p, log_q))
    return (temperature**2 * kl(p, q)).to(log_q.dtype)


def squared_difference(p: Tensor, q: Tensor) -> Tensor:
    """Compute ``(p - q)^2``, which replaces the divergence in regression.

    Args:
        p, q: same shape.

    Returns:
        the same shape.
    """
    return torch.square(p - q)
