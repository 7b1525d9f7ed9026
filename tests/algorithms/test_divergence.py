"""Divergences, worked by hand."""

import math

import pytest
import torch

from deltasam_fairseq.algorithms import kl, softened_kl, squared_difference, symmetric_kl

# p = (1/2, 1/2), q = (1/4, 3/4)
P, Q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()


def test_kl():
    """1/2 ln 2 + 1/2 ln(2/3); the other way round 1/4 ln(1/2) + 3/4 ln(3/2)."""
    forth = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    back = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert kl(P, Q).item() == pytest.approx(forth)
    assert kl(Q, P).item() == pytest.approx(back)
    assert symmetric_kl(P, Q).item() == pytest.approx(forth + back)


def test_softened_kl():
    """q at T = 2 is (1, sqrt 3) / (1 + sqrt 3), p stays (1/2, 1/2); times T^2 = 4."""
    root = math.sqrt(3)
    soft = [1 / (1 + root), root / (1 + root)]
    expected = 4 * sum(0.5 * math.log(0.5 / q) for q in soft)
    assert softened_kl(P, Q, 2.0).item() == pytest.approx(expected)
    assert softened_kl(P, Q, 1.0).item() == pytest.approx(kl(P, Q).item())
    assert softened_kl(Q, Q, 3.0).item() == 0


def test_softened_kl_at_large_temperatures():
    """Half the squared difference of centred logits over C: (0, 2) and (0, 0) give 0.5 1/2."""
    z = torch.tensor([[0.0, 2.0]])
    log_p, log_q = z.log_softmax(-1), torch.zeros(1, 2).log_softmax(-1)
    for temperature in (300.0, 1000.0):
        assert softened_kl(log_p, log_q, temperature).item() == pytest.approx(0.5, rel=1e-4)


def test_gradient_of_softened_kl():
    """``T (q_T - p_T)`` with respect to the logits of q, here T = 2."""
    logits = Q.clone().requires_grad_()
    softened_kl(P, logits.log_softmax(-1), 2.0).sum().backward()
    expected = 2 * ((Q / 2).softmax(-1) - 0.5)
    torch.testing.assert_close(logits.grad, expected)


def test_symmetric_kl_is_never_negative_and_zero_of_equals():
    torch.manual_seed(1)
    log_p = torch.randn(1000, 5).log_softmax(-1)
    near = (log_p + 1e-7 * torch.randn(1000, 5)).log_softmax(-1)
    assert (symmetric_kl(log_p, near) >= 0).all()
    assert (symmetric_kl(log_p, log_p) == 0).all()


def test_agrees_with_torch():
    torch.manual_seed(1)
    log_p, log_q = torch.randn(2, 6, 4, 5).log_softmax(-1)
    reference = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl(log_p, log_q), reference)


def test_squared_difference():
    found = squared_difference(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.5]))
    assert found.tolist() == [4, 0.25]
