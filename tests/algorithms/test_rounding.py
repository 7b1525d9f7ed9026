"""Stochastic rounding: to neighbours only, exact in the mean, the same for the same generator."""

import pytest
import torch

from deltasam_fairseq.algorithms import move_along_, resolvable_radius, round_stochastically

HALF = [torch.float16, torch.bfloat16]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", HALF)
def test_by_hand(dtype):
    """1 + eps/4 lies a quarter of the way from 1 to 1 + eps: it goes up once in four times."""
    eps = torch.finfo(dtype).eps
    x = torch.full((100_000,), 1 + eps / 4)
    rounded = round_stochastically(x, dtype, generator())
    assert set(rounded.tolist()) == {1.0, 1 + eps}
    share = (rounded > 1).float().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 1e5) ** 0.5


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e-5, 1e-6, 3e-8, 1e4])
def test_neighbours_and_mean(dtype, scale):
    """Normal and subnormal numbers of both signs; the mean within five standard errors.

    A number between neighbours that are s apart has a standard error of at most s / 2 sqrt(n).
    """
    x = torch.randn(500, generator=generator(1)) * scale
    x = x.clamp(-6e4, 6e4)
    draws = torch.stack([round_stochastically(x, dtype, generator(i)) for i in range(2000)])
    assert torch.equal(draws, draws.to(dtype).float())  # dtype holds them all
    below, above = draws.min(0).values, draws.max(0).values
    assert ((below <= x) & (x <= above)).float().mean() > 0.99
    spread = (draws - x).abs().max(0).values
    spacing = torch.finfo(dtype).eps * x.abs()
    if dtype == torch.float16:
        spacing = spacing.clamp(min=2.0**-24)
    assert (spread <= spacing * 1.0001).all()
    error = (draws.double().mean(0) - x.double()).abs()
    assert (error <= 5 * spacing.double() / 2 / 2000**0.5).all()


@pytest.mark.parametrize("dtype", HALF)
def test_numbers_that_the_format_holds_stay(dtype):
    x = torch.randn(1000).to(dtype).float()
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), float("-inf")])])
    assert torch.equal(round_stochastically(x, dtype, generator()), x)
    assert round_stochastically(torch.tensor([float("nan")]), dtype, generator()).isnan().all()


def test_same_generator_same_result_and_input_is_left_alone():
    x = torch.randn(7, 3).t()  # not contiguous
    before = x.clone()
    first = round_stochastically(x, torch.bfloat16, generator(4))
    assert torch.equal(first, round_stochastically(x, torch.bfloat16, generator(4)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", HALF)
def test_ascent_below_half_a_unit_survives(dtype):
    """Steps of 1/20 of the spacing: rounded to nearest nothing is left, stochastically all is."""
    w = torch.ones(200_000, dtype=dtype)
    step = torch.full(w.shape, torch.finfo(dtype).eps / 20)
    one, out = torch.ones((), dtype=torch.float64), torch.empty_like(w)
    nearest = move_along_([out], [w], [step], one, lambda x: x.to(dtype).float())
    assert abs(nearest) < 2e-3 and torch.equal(out, w)  # 1 + eps / 20 is itself rounded

    def stochastically(x):
        return round_stochastically(x, dtype, generator())

    realised = move_along_([out], [w], [step], one, stochastically)
    assert abs(realised - 1) < 5 * (19 / 200_000) ** 0.5
    moved = (out.double() - 1).mean() / step[0].double()
    torch.testing.assert_close(moved, realised, rtol=2e-3, atol=0)


def test_radius_by_hand():
    """||(3, 4)|| = 5; bfloat16 rounds to 2^-8, float16 to 2^-11."""
    w = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert resolvable_radius(w, torch.bfloat16) == pytest.approx(0.5 * 5 / 16)
    assert resolvable_radius(w, torch.float16) == pytest.approx(0.5 * 5 * 2**-5.5)
