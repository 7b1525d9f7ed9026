"""Eq. 3 to 6 with numbers worked by hand, and the degenerate cases."""

import pytest
import torch

from deltasam_fairseq.algorithms import guardedness, guardedness_sums, reweight, sum_tokens


def weigh(a, beta):
    a = torch.tensor(a, dtype=torch.float64)
    return reweight(a, guardedness_sums(a), beta)


def test_worked_by_hand():
    """a = (3, 1, -1, 1): sum|a| = 6, g = (1/2, 1/6, 1/6, 1/6), mean a = 1.

    sum g a = 3/2 + 1/6 - 1/6 + 1/6 = 5/3, so r = 2 * 1 / (5/3) = 6/5 for beta 2;
    N g' = (2 - 1) 6/5 + 1 = 11/5 and three times (2/3 - 1) 6/5 + 1 = 3/5.
    """
    found = weigh([3.0, 1.0, -1.0, 1.0], beta=2.0)
    torch.testing.assert_close(found.r.item(), 6 / 5)
    expected = torch.tensor([11 / 5, 3 / 5, 3 / 5, 3 / 5], dtype=torch.float64)
    torch.testing.assert_close(found.weights, expected)
    torch.testing.assert_close(found.squares.item(), 1 / 4 + 3 / 36)
    assert found.n == 4 and not found.uniform and found.finite


def test_weights_add_up_to_n_and_may_be_negative():
    """beta 20 makes r = 12, and 3 weights (2/3 - 1) 12 + 1 = -3: kept as they are."""
    weights = weigh([3.0, 1.0, -1.0, 1.0], beta=20.0).weights
    torch.testing.assert_close(weights, torch.tensor([13.0, -3, -3, -3], dtype=torch.float64))
    assert weights.sum() == 4


def test_scale_of_the_probe_cancels():
    """g and r do not change when all a_j are multiplied by one number."""
    small, large = weigh([3e-6, 1e-6, -2e-6], 3.0), weigh([3.0, 1.0, -2.0], 3.0)
    torch.testing.assert_close(small.weights, large.weights)


def test_beta_zero_is_exactly_uniform():
    for n in (2, 3, 7, 49):  # 49 * (1 / 49) is not 1
        a = torch.randn(n, dtype=torch.float64).tolist()
        assert weigh(a, 0.0).weights.tolist() == [1.0] * n


@pytest.mark.parametrize(
    "a",
    [
        [2.0],  # one sentence
        [0.0, 0.0, 0.0],  # nothing moved
        [1.0, -1.0],  # denominator of Eq. 5: sum g a = 0
        [1.0, float("nan"), 2.0],
        [1.0, float("inf"), 2.0],
        [1.0, float("-inf"), 2.0],
        [float("inf"), float("-inf"), 2.0],
    ],
)
def test_degenerate_cases_are_uniform(a):
    found = weigh(a, 3.0)
    assert found.weights.tolist() == [1.0] * len(a)
    assert found.uniform and found.r == 0
    assert bool(found.finite) == bool(torch.isfinite(torch.tensor(a)).all())


def test_denominator_so_small_that_r_overflows_is_uniform():
    assert weigh([1e200, 1e200, -(2**0.5) * 1e200], 1e300).uniform


def test_pieces_of_a_batch_give_the_weights_of_the_whole():
    """What two ranks do, one of them with a single sentence and one with none."""
    a = torch.randn(6, dtype=torch.float64)
    pieces = (a[:5], a[5:], a[:0])
    sums = sum(guardedness_sums(piece) for piece in pieces)
    together = torch.cat([reweight(piece, sums, 3.0).weights for piece in pieces])
    torch.testing.assert_close(together, reweight(a, guardedness_sums(a), 3.0).weights)
    squares = sum(reweight(piece, sums, 3.0).squares for piece in pieces)
    torch.testing.assert_close(squares, reweight(a, guardedness_sums(a), 3.0).squares)


def test_one_bad_sentence_makes_all_pieces_uniform():
    pieces = (torch.tensor([1.0, float("nan")]).double(), torch.tensor([1.0, 2.0]).double())
    sums = sum(guardedness_sums(piece) for piece in pieces)
    assert all(reweight(piece, sums, 3.0).weights.tolist() == [1.0, 1.0] for piece in pieces)


def test_guardedness_is_a_float64_difference():
    """1 + 2^-23 is the next float32 after 1; the difference is exact."""
    clean = torch.tensor([1.0, 2.0])
    a = guardedness(clean, torch.tensor([1.0 + 2**-23, 2.0]))
    assert a.dtype == torch.float64 and a.tolist() == [2**-23, 0.0]


def test_token_sums_keep_guardedness():
    """512 tokens of loss 3, each 1e-5 higher at the probe: a is 512e-5, in float32 seen in steps
    of 1.2e-4. What is left of the error is the rounding of the token losses."""
    torch.manual_seed(0)
    clean = 3 + 0.5 * torch.randn(16, 512, dtype=torch.float64)
    rise = 1e-5 * (1 + 0.5 * torch.randn(16, 1, dtype=torch.float64))
    sums = [sum_tokens(x.float()) for x in (clean, clean + rise)]
    coarse = [x.float().sum(dim=1) for x in (clean, clean + rise)]
    exact = guardedness(clean.sum(dim=1), (clean + rise).sum(dim=1))
    errors = [(guardedness(*x) - exact).abs().mean() for x in (sums, coarse)]
    assert sums[0].dtype == torch.float64
    assert errors[0] < errors[1] / 10
