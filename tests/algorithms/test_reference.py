"""The plain twins against numbers worked by hand, and the fast functions against the twins."""

import torch

from deltasam_fairseq.algorithms import (
    asam_ascent_,
    guardedness,
    guardedness_sums,
    reweight,
    sam_ascent_,
)
from deltasam_fairseq.algorithms.reference import (
    asam_reference,
    delta_sam_reference,
    gradient,
    m_sharpness_reference,
    per_instance_reference,
    sam_reference,
)


def linear(x):
    """l_j(w) = x_j . w"""
    return lambda w: x @ w


def curved(n=6, d=5):
    x = torch.randn(n, d, dtype=torch.float64)
    y = torch.randn(n, dtype=torch.float64)
    return lambda w: ((x @ w).tanh() - y).square()


def test_sam_and_per_instance_of_linear_losses_by_hand():
    """Losses 3 w_1 and 4 w_2: gradients (3, 0) and (0, 4), their mean (1.5, 2) of norm 2.5."""
    losses, w = linear(torch.tensor([[3.0, 0.0], [0.0, 4.0]]).double()), torch.ones(2).double()
    assert sam_reference(losses, w, rho=5.0).tolist() == [3.0, 4.0]
    assert per_instance_reference(losses, w, rho=5.0).tolist() == [[5.0, 0.0], [0.0, 5.0]]


def test_delta_sam_of_linear_losses_by_hand():
    """Same losses, u = (1, 0): a = (3 rho, 0), g = (1, 0), r = beta (3/2) / 3 = beta / 2.

    beta 2: g' = ((1 - 1/2) 1 + 1/2, (0 - 1/2) 1 + 1/2) = (1, 0): only the first moves.
    """
    losses, w = linear(torch.tensor([[3.0, 0.0], [0.0, 4.0]]).double()), torch.ones(2).double()
    found = delta_sam_reference(losses, w, torch.tensor([2.0, 0.0]).double(), 0.5, 2.0)
    torch.testing.assert_close(found.a, torch.tensor([1.5, 0.0]).double())
    torch.testing.assert_close(found.weights, torch.tensor([1.0, 0.0]).double())
    torch.testing.assert_close(found.eps, torch.tensor([0.5, 0.0]).double())


def test_fast_delta_sam_equals_its_twin():
    for beta in (0.0, 1.0, 3.0, 50.0):
        losses, w = curved(), torch.randn(5, dtype=torch.float64)
        u = torch.randn(5, dtype=torch.float64)
        twin = delta_sam_reference(losses, w, u, 0.05, beta)
        a = guardedness(losses(w), losses(w + 0.05 * u / u.norm()))
        found = reweight(a, guardedness_sums(a), beta)
        torch.testing.assert_close(found.weights / 6, twin.weights)
        out = [torch.empty_like(w)]
        sam_ascent_(out, [w], [gradient(losses, w, found.weights)], 0.05)
        torch.testing.assert_close(out[0], w + twin.eps)


def test_fast_asam_equals_its_twin():
    losses, w = curved(), torch.randn(5, dtype=torch.float64)
    out = [torch.empty_like(w)]
    grad = gradient(losses, w, torch.ones(6, dtype=torch.float64))
    asam_ascent_(out, [w], [grad], 0.5, 0.01)
    torch.testing.assert_close(out[0], w + asam_reference(losses, w, 0.5, 0.01))


def test_twin_is_uniform_where_the_equations_say_nothing():
    flat, w = linear(torch.zeros(3, 2).double()), torch.ones(2).double()
    found = delta_sam_reference(flat, w, torch.ones(2).double(), 0.05, 3.0)
    assert found.weights.tolist() == [1 / 3] * 3 and found.eps.tolist() == [0.0, 0.0]


def test_m_sharpness_of_quadratic_losses_by_hand():
    """Losses w_1^2 / 2 and 2 w_2^2 at (1, 1): gradients (1, 0) and (0, 4).

    M = 1, rho 1: perturbed at (2, 1) and (1, 2), gradients (2, 0) and (0, 8), mean (1, 4).
    M = 2: their mean (1/2, 2) has norm sqrt(17) / 2; the gradient of the mean loss at w + eps is
    ((1 + 1 / sqrt(17)) / 2, 2 (1 + 4 / sqrt(17))).
    """
    w, scale = torch.ones(2).double(), torch.tensor([0.5, 2.0]).double()
    found = m_sharpness_reference(lambda w: scale * w.square(), w, rho=1.0, m=1)
    assert found.tolist() == [1.0, 4.0]
    found = m_sharpness_reference(lambda w: scale * w.square(), w, rho=1.0, m=2)
    root = 17**0.5
    expected = torch.tensor([(1 + 1 / root) / 2, 2 * (1 + 4 / root)]).double()
    torch.testing.assert_close(found, expected)


def test_m_sharpness_of_one_sentence_is_per_instance_and_of_all_is_sam():
    losses, w = curved(), torch.randn(5, dtype=torch.float64)
    each = torch.eye(6, dtype=torch.float64) / 6
    eps = per_instance_reference(losses, w, 0.05)
    expected = sum(gradient(losses, w + e, share) for e, share in zip(eps, each))
    torch.testing.assert_close(m_sharpness_reference(losses, w, 0.05, 1), expected)
    at = w + sam_reference(losses, w, 0.05)
    expected = gradient(losses, at, torch.full((6,), 1 / 6, dtype=torch.float64))
    for m in (6, 7):
        torch.testing.assert_close(m_sharpness_reference(losses, w, 0.05, m), expected)
