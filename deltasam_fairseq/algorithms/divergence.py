"""How far two outputs of a model are apart: the divergences of R3F, R-Drop, SMART and VAT.

All take log-probabilities, of float32 or better, which the losses need anyway.
"""

import torch
from torch import Tensor


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two categorical distributions, ``KL(p || q)``.

    ``sum_c p_c (log p_c - log q_c)``

    Args:
        log_p, log_q: log-probabilities, shape (..., C).

    Returns:
        shape (...), in nats, at least 0 but for rounding.
    """
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of both directions, ``KL(p || q) + KL(q || p)``.

    ``sum_c (p_c - q_c) (log p_c - log q_c)``

    In this form no term is negative, also after rounding. R3F (Aghajanyan et al. 2020) and SMART
    (Jiang et al. 2020) take the sum, R-Drop (Liang et al. 2021) the mean of both directions.

    Args:
        log_p, log_q: log-probabilities, shape (..., C).

    Returns:
        shape (...), in nats.
    """
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)


def squared_difference(p: Tensor, q: Tensor) -> Tensor:
    """What stands for the divergence of two predictions in regression, ``(p - q)^2``.

    Args:
        p, q: same shape.

    Returns:
        the same shape.
    """
    return torch.square(p - q)
