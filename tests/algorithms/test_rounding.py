"""Stochastic rounding: to neighbours only, exact in the mean, the same for the same generator."""

import pytest
import torch

from deltasam_fairseq.algorithms import (
    OPERATIONS,
    StochasticRounding,
    move_along_,
    multiplied_in,
    random_bits,
    resolvable_radius,
    rounding,
)

HALF = [torch.float16, torch.bfloat16]
halves = pytest.mark.parametrize("dtype", HALF)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rounded(x, dtype, seed=0):
    return rounding.round_stochastically(x, dtype, random_bits(len(x), generator(seed)))


@halves
def test_by_hand(dtype):
    """1 + eps/4 lies a quarter of the way from 1 to 1 + eps: it goes up once in four times."""
    eps = torch.finfo(dtype).eps
    x = torch.full((100_000,), 1 + eps / 4)
    result = rounded(x, dtype)
    assert result.dtype == dtype and set(result.tolist()) == {1.0, 1 + eps}
    share = (result > 1).float().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 1e5) ** 0.5


@halves
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-4, 3e-5, 1e-6, 3e-8, 1e4])
def test_neighbours_and_mean(dtype, scale):
    """Normal and subnormal numbers of both signs; the mean within five standard errors.

    A number between neighbours that are s apart has a standard error of at most s / 2 sqrt(n).
    """
    x = torch.randn(501, generator=generator(1)) * scale
    x = x.clamp(-6e4, 6e4)
    draws = torch.stack([rounded(x, dtype, seed).float() for seed in range(2000)])
    below, above = draws.min(0).values, draws.max(0).values
    assert ((below <= x) & (x <= above)).float().mean() > 0.99
    spread = (draws - x).abs().max(0).values
    spacing = torch.finfo(dtype).eps * x.abs()
    if dtype == torch.float16:
        spacing = spacing.clamp(min=2.0**-24)
    assert (spread <= spacing * 1.0001).all()
    error = (draws.double().mean(0) - x.double()).abs()
    assert (error <= 5 * spacing.double() / 2 / 2000**0.5).all()


@halves
def test_numbers_that_the_format_holds_stay(dtype):
    """Those at which the spacing changes too; float16's subnormal ones, and its last."""
    powers = 2.0 ** torch.arange(-24, 16)
    some = [torch.randn(100_000) * scale for scale in (1.0, 1e-4, 1e-6)]
    x = torch.cat([*some, powers, torch.tensor([0.0, float("inf"), 65504.0])]).to(dtype)
    x = torch.cat([x, -x]).float()
    for seed in range(20):
        assert torch.equal(rounded(x, dtype, seed).float(), x)


def test_bits_are_uniform_and_unrelated():
    """Two come from one draw; mean, variance, and correlation of neighbours of 10^5 numbers."""
    bits = random_bits(100_001, generator()).double() / 2**15
    assert len(bits) == 100_001 and bits.min() >= 0 and bits.max() < 1
    for half in (bits, bits[::2], bits[1::2]):
        assert half.mean() == pytest.approx(0.5, abs=5 * (1 / 12 / len(half)) ** 0.5)
        assert half.var() == pytest.approx(1 / 12, rel=0.03)
    neighbours = torch.corrcoef(torch.stack((bits[:-1], bits[1:])))[0, 1]
    assert abs(neighbours) < 5 / len(bits) ** 0.5


def ascent(dtype, masters, seed=0):
    """Weights of several shapes, one of them not contiguous, a gradient that is 0 for some."""
    shapes = ((3,), (40, 50), (7, 600), ())
    weights = [torch.randn(s, generator=generator(i)) for i, s in enumerate(shapes)]
    grads = [torch.randn(s, generator=generator(9 + i)) for i, s in enumerate(shapes)]
    grads = [g.to(dtype).masked_fill_(g > 1, 0) for g in grads]
    weights[1], grads[1] = weights[1].t(), grads[1].t()
    return weights if masters else [w.to(dtype) for w in weights], grads


@halves
@pytest.mark.parametrize("masters", [False, True])
def test_moves_a_list_of_tensors(dtype, masters):
    """In the mean to w + scale d; where d is 0, to w rounded to nearest; weights untouched."""
    weights, grads = ascent(dtype, masters)
    before = [w.clone() for w in weights]
    scale, total = torch.tensor(1e-4, dtype=torch.float64), [torch.zeros(w.shape) for w in weights]
    for seed in range(400):
        out = [w.to(dtype, copy=True) for w in weights]
        move_along_(out, weights, grads, scale, StochasticRounding(dtype, generator(seed)))
        for t, v, w, g in zip(total, out, weights, grads):
            t += v.float() / 400
            assert torch.equal(v[g == 0], w[g == 0].to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(before, weights))
    for t, w, g in zip(total, weights, grads):
        error = (t - (w.double() + 1e-4 * g.double()))[g != 0].abs()
        bound = 5 * torch.finfo(dtype).eps * w[g != 0].abs().double() / 2 / 400**0.5
        assert (error <= bound + 1e-7).all()


@halves
def test_in_bulk_is_tensor_by_tensor_in_distribution(dtype, monkeypatch):
    """Cut into pieces of 1000 where a tensor is larger, else together: none is skipped."""
    monkeypatch.setitem(rounding._AT_A_TIME, "cpu", 1000)
    weights = [torch.ones(n) for n in (5, 2500, 990, 20, 1000)]
    eps = torch.finfo(dtype).eps
    out = [torch.zeros(len(w), dtype=dtype) for w in weights]
    steps = [torch.full_like(w, eps / 2) for w in weights]
    share = move_along_(out, weights, steps, torch.ones(()), StochasticRounding(dtype, generator()))
    up = torch.cat([v > 1 for v in out])
    assert set(torch.cat(out).tolist()) == {1.0, 1 + eps}
    assert up.float().mean() == pytest.approx(0.5, abs=5 * 0.5 / len(up) ** 0.5)
    assert share == pytest.approx(2 * float(up.double().mean()), rel=1e-5)
    for first, second in zip(up.split(500)[:-1], up.split(500)[1:]):
        if len(first) == len(second):
            assert not torch.equal(first, second)


@halves
def test_float32_weights_get_values_that_a_cast_leaves_alone(dtype):
    """As under autocast: where nothing moves they keep all their bits."""
    weights, grads = ascent(dtype, masters=True)
    out = [torch.zeros_like(w) for w in weights]
    scale = torch.tensor(1e-2)
    move_along_(out, weights, grads, scale, StochasticRounding(dtype, generator()))
    for v, w, g in zip(out, weights, grads):
        assert torch.equal(v[g == 0], w[g == 0])
        assert torch.equal(v[g != 0].to(dtype).float(), v[g != 0])


@halves
@pytest.mark.parametrize("scale", [0.0, float("nan")])
def test_zero_and_non_finite_directions(dtype, scale):
    weights, grads = ascent(dtype, masters=True)
    out = [w.to(dtype) for w in weights]
    rounded_to = StochasticRounding(dtype, generator())
    share = move_along_(out, weights, grads, torch.tensor(scale), rounded_to)
    for v, w in zip(out, weights):
        assert v.isnan().all() if scale else torch.equal(v, w.to(dtype))
    assert share == 1


@halves
def test_not_a_number_stays_so(dtype):
    """Whatever its bits: all ones are what a GPU computes, and adding to them would overflow."""
    bits = [0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1, -(1 << 22)]
    w = torch.tensor(bits * 300, dtype=torch.int32).view(torch.float32)
    assert w.isnan().all()
    random = random_bits(len(w), generator())
    scale = torch.full((1,), 1e-3)
    assert OPERATIONS.round_moved(w, torch.ones_like(w), scale, random, dtype).isnan().all()
    assert OPERATIONS.round_moved(torch.ones_like(w), w, scale, random, dtype).isnan().all()


def test_same_generator_same_result():
    weights, grads = ascent(torch.bfloat16, masters=True)
    results = []
    for seed in (4, 4, 5):
        out = [w.bfloat16() for w in weights]
        to = StochasticRounding(torch.bfloat16, generator(seed))
        move_along_(out, weights, grads, torch.tensor(1e-3), to)
        results.append(torch.cat([v.flatten() for v in out]))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@halves
def test_ascent_below_half_a_unit_survives(dtype):
    """Steps of 1/20 of the spacing: rounded to nearest nothing is left, stochastically all is."""
    w = torch.ones(200_000, dtype=dtype)
    step = torch.full(w.shape, torch.finfo(dtype).eps / 20)
    one, out = torch.ones((), dtype=torch.float64), torch.empty_like(w)
    move_along_([out], [w], [step], one)
    assert torch.equal(out, w)
    realised = move_along_([out], [w], [step], one, StochasticRounding(dtype, generator()))
    assert abs(realised - 1) < 5 * (19 / 200_000) ** 0.5
    moved = (out.double() - 1).mean() / step[0].double()
    torch.testing.assert_close(moved, realised, rtol=2e-3, atol=0)


def test_share_that_nearest_rounding_leaves():
    """What the log would say of it: nothing."""
    w, d = torch.ones(1000), torch.full((1000,), 1e-4)
    along, whole = OPERATIONS.realised_along(w.bfloat16(), w, d, torch.ones(1))
    assert along == 0 and whole == pytest.approx(1e-5)


def test_autocast_decides_what_is_multiplied_in():
    x = torch.zeros(1)
    assert multiplied_in(x) == torch.float32 and multiplied_in(x.double()) == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for other in (torch.float32, torch.float64, torch.float16):
            y = x.to(other)
            product = torch.mm(y.view(1, 1), y.view(1, 1)).dtype
            assert multiplied_in(y) == product


def test_radius_by_hand():
    """||(3, 4)|| = 5; bfloat16 rounds to 2^-8, float16 to 2^-11."""
    w = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert resolvable_radius(w, torch.bfloat16) == pytest.approx(0.35 * 5 * 2 ** (-8 / 3))
    assert resolvable_radius(w, torch.float16) == pytest.approx(0.35 * 5 * 2 ** (-11 / 3))
