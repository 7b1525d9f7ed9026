"""Methods beside SAM with numbers worked by hand, limiting cases, and against plain twins."""

import pytest
import torch

from deltasam_fairseq.algorithms import (
    asam_ascent_,
    functional_loss,
    gsam_correct_,
    largest_mask,
    masked,
    rho_along_lr,
    rho_in_warmup,
    trust_region_sums,
)
from deltasam_fairseq.algorithms.reference import fisher_reference, gradient, gsam_reference


def lists(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


class TestRho:
    @pytest.mark.parametrize(
        "lr, rho", [(1.0, 0.5), (0.2, 0.1), (0.6, 0.3), (0.0, 0.1), (2.0, 0.5)]
    )
    def test_along_lr_by_hand(self, lr, rho):
        """From 0.1 at 0.2 to 0.5 at 1: 0.3 in the middle; outside, the nearer end."""
        assert rho_along_lr(0.5, 0.1, lr, lr_max=1.0, lr_min=0.2) == pytest.approx(rho)

    def test_constant_lr_is_constant_rho(self):
        assert rho_along_lr(0.5, 0.1, 0.2, 0.2, 0.2) == 0.5

    @pytest.mark.parametrize("update, rho", [(0, 0.1), (1, 0.2), (3, 0.4), (4, 0.5), (9, 0.5)])
    def test_warmup_by_hand(self, update, rho):
        assert rho_in_warmup(0.5, 0.1, update, 4) == pytest.approx(rho)

    def test_no_warmup(self):
        assert rho_in_warmup(0.5, 0.1, 0, 0) == 0.5


class TestGSAM:
    def test_by_hand(self):
        """g_p = (2, 0), g = (3, 4): g_perp = (0, 4); alpha 0.5 gives (2, -2), in two tensors."""
        grads = lists([2.0], [0.0])
        gsam_correct_(grads, lists([3.0], [4.0]), 0.5)
        assert [g.tolist() for g in grads] == [[2.0], [-2.0]]

    def test_alpha_zero_and_parallel_gradients_change_nothing(self):
        for clean, alpha in (([1.0, 5.0], 0.0), ([-4.0, 8.0], 0.7)):
            grads = lists([-1.0, 2.0])
            gsam_correct_(grads, lists(clean), alpha)
            assert grads[0].tolist() == [-1.0, 2.0]

    def test_zero_gradients(self):
        grads = lists([0.0, 0.0])
        gsam_correct_(grads, lists([1.0, 2.0]), 0.5)
        assert grads[0].tolist() == [0.0, 0.0]
        grads = lists([1.0, 2.0])
        gsam_correct_(grads, lists([0.0, 0.0]), 0.5)
        assert grads[0].tolist() == [1.0, 2.0]
        gsam_correct_([], [], 0.5)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_stays_so(self, bad):
        for grads, clean in ((lists([bad, 1.0]), lists([1.0, 1.0])), (lists([1.0]), lists([bad]))):
            gsam_correct_(grads, clean, 0.5)
            assert not torch.isfinite(grads[0]).all()

    def test_half_precision_rounds_once(self):
        g_p, g = torch.randn(2, 100, dtype=torch.float64)
        half = [g_p.half()]
        exact = [half[0].double()]
        gsam_correct_(half, [g.half()], 0.5)
        gsam_correct_(exact, [g.half().double()], 0.5)
        torch.testing.assert_close(half[0], exact[0].half(), rtol=1e-3, atol=1e-6)


def losses(w):
    """Three sentences, curved."""
    x = torch.tensor([[1.0, 2.0, 0.0], [0.5, -1.0, 0.0], [2.0, 1.0, 0.0]], dtype=w.dtype)
    return torch.tanh(x @ w) ** 2 + (x @ w).exp()


W = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64)


def test_gsam_equals_the_twin():
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    g = gradient(losses, W, uniform)
    g_p = gradient(losses, W + 0.1 * g / g.norm(), uniform)
    gsam_correct_([g_p], [g], 0.3)
    torch.testing.assert_close(g_p, gsam_reference(losses, W, 0.1, 0.3))


class TestFunctional:
    def test_by_hand(self):
        """z = w^2 at w = 3, delta 5: the gradient is 6 * 5; the value is the loss."""
        w = torch.tensor(3.0, requires_grad=True)
        loss = functional_loss(torch.tensor(0.7), [w**2], [torch.tensor(5.0)])
        loss.backward()
        assert loss.item() == pytest.approx(0.7) and w.grad == 30

    def test_at_its_own_deltas_it_is_the_loss(self):
        w = torch.randn(4, dtype=torch.float64, requires_grad=True)
        z = torch.tanh(w).outer(w)
        loss = torch.logsumexp(z, dim=1).sum()
        (delta,) = torch.autograd.grad(loss, z, retain_graph=True)
        expected = torch.autograd.grad(loss, w, retain_graph=True)
        found = functional_loss(loss, [z], [delta])
        assert found == loss
        torch.testing.assert_close(torch.autograd.grad(found, w), expected)


class TestFisher:
    def test_by_hand(self):
        """A quarter of 5 weights is two, rounded up; a score of 0 is never chosen."""
        (a, b) = largest_mask(lists([3.0, 0.0, 1.0], [2.0, 0.0]), 0.25)
        assert (a.tolist(), b.tolist()) == ([True, False, False], [True, False])
        (a, b) = largest_mask(lists([3.0, 0.0, 1.0], [2.0, 0.0]), 1.0)
        assert (a.tolist(), b.tolist()) == ([True, False, True], [True, False])

    def test_not_finite(self):
        assert largest_mask(lists([3.0, float("nan")]), 0.5) is None

    def test_equals_the_twin(self):
        one_hot = torch.eye(3, dtype=torch.float64)
        scores = sum(gradient(losses, W, e) ** 2 for e in one_hot)
        for share in (0.1, 0.5, 0.7, 1.0):
            (found,) = largest_mask([scores], share)
            assert torch.equal(found, fisher_reference(losses, W, share))

    def test_masked(self):
        (found,) = masked(lists([1.0, float("nan")]), [torch.tensor([True, False])])
        assert found.tolist() == [1.0, 0.0]


class TestTrustRegion:
    def test_divergence_by_hand(self):
        """p = (1/2, 1/2), q = (1/4, 3/4): KL = log(2) / 2 + log(2/3) / 2; twice the same: 0."""
        p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.25, 0.75]]).log()
        expected = 0.5 * (torch.tensor(2.0).log() + torch.tensor(2 / 3).log())
        sums = trust_region_sums(torch.cat([p, p]), torch.cat([q, p]))
        assert sums.tolist() == pytest.approx([expected.item(), 2.0])
        only = trust_region_sums(torch.cat([p, p]), torch.cat([q, p]), torch.tensor([False, True]))
        assert only.tolist() == pytest.approx([0.0, 1.0], abs=1e-7)

    def test_regression_by_hand(self):
        sums = trust_region_sums(*lists([[1.0], [2.0]], [[3.0], [2.0]]), regression=True)
        assert sums.tolist() == [4.0, 2.0]

    def test_eps_by_hand(self):
        """w = (2, -1), g = (1, 2): w g = (2, -2); d 2: eps = 2 (4, 2) / sqrt(8)."""
        w, g, out = lists([2.0, -1.0]), lists([1.0, 2.0]), lists([0.0, 0.0])
        asam_ascent_(out, w, g, torch.tensor(2.0, dtype=torch.float64), eta=0.0)
        eps = torch.tensor([8.0, 4.0], dtype=torch.float64) / 8**0.5
        torch.testing.assert_close(out[0], w[0] + eps)
