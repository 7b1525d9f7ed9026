"""RW-SAM's weights with numbers worked by hand, and the degenerate cases."""

import math

import pytest
import torch

from deltasam_fairseq.algorithms import gibbs_factors, gibbs_reweight, largest_size, sam_ascent_
from deltasam_fairseq.algorithms.reference import gradient, rw_sam_reference
from tests.algorithms.test_reference import curved


def weigh(a, lambda_):
    a = torch.tensor(a, dtype=torch.float64)
    return gibbs_reweight(*gibbs_factors(a, largest_size(a), lambda_))


def test_worked_by_hand():
    """s = (2, 1, 0), lambda log 4: factors (1, 1/2, 1/4), p = (4, 2, 1) / 7, N p = 3 p.

    The effective share is 1 / (3 sum p^2) = 49 / 63.
    """
    found = weigh([-2.0, 1.0, 0.0], math.log(4))
    expected = torch.tensor([12 / 7, 6 / 7, 3 / 7], dtype=torch.float64)
    torch.testing.assert_close(found.weights, expected)
    torch.testing.assert_close(1 / (3 * found.squares), torch.tensor(49 / 63).double())
    torch.testing.assert_close(found.divisor, found.weights.max())
    assert found.n == 3 and found.finite and not found.uniform and found.r is None


def test_scale_of_the_probe_cancels():
    small, large = weigh([3e-6, 1e-6, -2e-6], 3.0), weigh([3.0, 1.0, -2.0], 3.0)
    torch.testing.assert_close(small.weights, large.weights)


def test_large_lambda_takes_the_most_sensitive_sentence():
    """No overflow: exponents are at most 0."""
    assert weigh([1.0, -3.0, 2.9], 1e6).weights.tolist() == [0.0, 3.0, 0.0]


@pytest.mark.parametrize(
    "a, lambda_",
    [
        ([1.0, -5.0, 2.0], 0.0),
        ([2.0], 3.0),  # one sentence
        ([0.0, 0.0, 0.0], 3.0),  # nothing moved
        ([1.0, -1.0, 1.0], 3.0),
        ([1.0, float("nan"), 2.0], 3.0),
        ([1.0, float("inf"), 2.0], 3.0),
        ([float("-inf")], 3.0),
    ],
)
def test_uniform_exactly(a, lambda_):
    found = weigh(a, lambda_)
    assert found.weights.tolist() == [1.0] * len(a)
    assert found.uniform and found.divisor == 1
    assert bool(found.finite) == bool(torch.isfinite(torch.tensor(a)).all())


def test_pieces_of_a_batch_give_the_weights_of_the_whole():
    """What three ranks do, one of them with a single sentence and one with none."""
    a = torch.randn(6, dtype=torch.float64)
    pieces = (a[:5], a[5:], a[:0])
    largest = torch.stack([largest_size(piece) for piece in pieces]).max()
    found = [gibbs_factors(piece, largest, 2.0) for piece in pieces]
    sums = sum(own for _, own in found)
    together = torch.cat([gibbs_reweight(factors, sums).weights for factors, _ in found])
    torch.testing.assert_close(together, weigh(a.tolist(), 2.0).weights)
    torch.testing.assert_close(together.sum(), torch.tensor(6.0).double())


def test_fast_equals_its_twin():
    losses, w = curved(), torch.randn(5, dtype=torch.float64)
    z = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0]).double()
    a = losses(w + 0.05 * z / 5**0.5) - losses(w)
    found = gibbs_reweight(*gibbs_factors(a, largest_size(a), 2.0))
    out = [torch.empty_like(w)]
    sam_ascent_(out, [w], [gradient(losses, w, found.weights)], 0.05)
    torch.testing.assert_close(out[0], w + rw_sam_reference(losses, w, z, 0.05, 2.0))
