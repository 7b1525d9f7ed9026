"""The ascent with numbers worked by hand, its limiting cases, its degenerate cases."""

import importlib

import pytest
import torch

from deltasam_fairseq.algorithms import (
    asam_ascent_,
    draw_direction_,
    global_norm,
    move_along_,
    probe,
    probe_generator,
    sam_ascent_,
)

sam = importlib.import_module("deltasam_fairseq.algorithms.sam")


def lists(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def test_sam_by_hand():
    """g = ((3, 0), (4)) has norm 5; rho 10 gives eps* = 2 g."""
    w, g = lists([1.0, 1.0], [1.0]), lists([3.0, 0.0], [4.0])
    out = lists([0.0, 0.0], [0.0])
    assert sam_ascent_(out, w, g, rho=10.0) == (5, 1)
    assert [o.tolist() for o in out] == [[7.0, 1.0], [9.0]]
    assert [x.tolist() for x in w] == [[1.0, 1.0], [1.0]]


def test_asam_by_hand():
    """w = (2, 0), eta 1: T = (3, 1); g = (1, 4): T g = (3, 4), norm 5; T^2 g = (9, 4)."""
    w, g, out = lists([2.0, 0.0]), lists([1.0, 4.0]), lists([0.0, 0.0])
    assert asam_ascent_(out, w, g, rho=5.0, eta=1.0) == (5, 1)
    assert out[0].tolist() == [11.0, 4.0]


def test_asam_with_unit_scales_is_sam():
    w, g = [torch.zeros(4, dtype=torch.float64)], [torch.randn(4, dtype=torch.float64)]
    adaptive, plain = [torch.empty_like(w[0])], [torch.empty_like(w[0])]
    norms = asam_ascent_(adaptive, w, g, 0.05, eta=1.0), sam_ascent_(plain, w, g, 0.05)
    torch.testing.assert_close(norms[0].norm, norms[1].norm)
    torch.testing.assert_close(adaptive, plain)


@pytest.mark.parametrize("ascent", [sam_ascent_, lambda *a: asam_ascent_(*a, 0.01)])
def test_zero_gradient_moves_nothing(ascent):
    w, out = lists([1.0, 2.0]), lists([5.0, 5.0])
    assert ascent(out, w, lists([0.0, 0.0]), 0.05).norm == 0
    assert out[0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_makes_all_weights_nan(bad):
    """So that the descent's loss is NaN and fairseq's own handling of it takes over."""
    w, out = lists([1.0, 2.0], [3.0]), lists([5.0, 5.0], [5.0])
    norm = sam_ascent_(out, w, lists([bad, 1.0], [1.0]), 0.05).norm
    assert not torch.isfinite(norm)
    assert all(torch.isnan(o).all() for o in out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norm_does_not_overflow_in_half_precision(dtype):
    """300 * 300 is beyond float16; the norm of four times 300 is 600."""
    assert global_norm([torch.full((2,), 300.0, dtype=dtype)] * 2) == pytest.approx(600, rel=1e-2)


def test_tiny_scale_survives_in_half_precision():
    """eps = 1e-6 * 2048 = 0.002, though 1e-6 itself is a subnormal of float16."""
    w, d = torch.ones(1, dtype=torch.float16), torch.full((1,), 2048.0, dtype=torch.float16)
    out = torch.empty_like(w)
    move_along_([out], [w], [d], torch.tensor(1e-6, dtype=torch.float64))
    assert out.item() == pytest.approx(1.002, abs=5e-4)


def test_direction_depends_on_seed_and_update_only():
    def draw(seed, update):
        out = [torch.empty(3, 5), torch.empty(40)]
        draw_direction_(out, probe_generator(seed, update, torch.device("cpu")))
        return torch.cat([o.flatten() for o in out])

    before = torch.random.get_rng_state()
    assert torch.equal(draw(1, 7), draw(1, 7))
    assert torch.equal(before, torch.random.get_rng_state())
    for other in (draw(1, 8), draw(2, 7), draw(7, 1), draw(2, 6)):
        assert abs(torch.corrcoef(torch.stack((draw(1, 7), other)))[0, 1]) < 0.5


def test_direction_does_not_depend_on_the_number_of_threads(monkeypatch):
    """Also where a tensor is drawn in pieces, which differ from each other."""
    monkeypatch.setattr(probe, "PIECE", 64)

    def draw(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        out = [torch.empty(300), torch.empty(5, 16), torch.empty(())]
        draw_direction_(out, probe_generator(1, 0, torch.device("cpu")))
        return out

    first = draw(1)
    for threads in (2, 7):
        assert all(map(torch.equal, first, draw(threads)))
    assert len(torch.cat([o.flatten() for o in first]).unique()) == 381


def test_direction_is_the_same_a_tensor_at_a_time(monkeypatch):
    """As half precision draws it."""
    monkeypatch.setattr(probe, "PIECE", 64)
    out = [torch.empty(300), torch.empty(5, 16), torch.empty(())]
    draw_direction_(out, probe_generator(1, 0, torch.device("cpu")))
    halves = [u.half() for u in out]
    for u, v in zip(out, probe.directions(halves, probe_generator(1, 0, torch.device("cpu")))):
        assert v.dtype == torch.float32 and torch.equal(u, v)


def test_direction_is_not_that_of_the_dropout_seed():
    """fairseq seeds dropout with seed + update: the same integer must not seed the probe."""
    out = [torch.empty(100)]
    draw_direction_(out, probe_generator(1, 0, torch.device("cpu")))
    for seed in range(4):
        torch.manual_seed(seed)
        assert not torch.equal(out[0], torch.randn(100))


def test_direction_is_standard_normal():
    """Mean, variance and fourth moment within five standard errors for 10^5 draws."""
    out = [torch.empty(100_000, dtype=torch.float64)]
    norm = draw_direction_(out, probe_generator(1, 0, torch.device("cpu")))
    torch.testing.assert_close(norm, out[0].norm())
    assert abs(out[0].mean()) < 5 * 0.0032
    assert abs(out[0].var() - 1) < 5 * 0.0045
    assert abs(out[0].pow(4).mean() - 3) < 5 * 0.031


@pytest.mark.parametrize(
    "into, along, same",
    [
        (torch.float32, torch.float32, False),
        (torch.float32, torch.float32, True),
        (torch.float16, torch.float32, False),
        (torch.float32, torch.float16, False),
        (torch.float16, torch.float16, True),
    ],
)
def test_lists_move_as_one_tensor_after_another(monkeypatch, into, along, same):
    """What a GPU does in few kernels for all; `same`: the direction becomes the result."""
    monkeypatch.setattr(sam, "_PIECE", {"cuda": 10, "cpu": 1 << 20})
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4), (), (0,), (7,)]
    weights, direction = ([torch.randn(s, generator=generator) for s in shapes] for _ in "wd")
    direction = [t.to(along) for t in direction]
    scale = torch.tensor(0.3, dtype=torch.float64)

    def moved():
        d = [t.clone() for t in direction]
        out = d if same else [torch.full_like(t, 9.0, dtype=into) for t in d]
        move_along_(out, weights, d, scale)
        return out, global_norm(direction)

    one_by_one, norm = moved()
    monkeypatch.setattr(sam, "_in_few_kernels", lambda *lists: True)
    monkeypatch.setattr(torch, "addcmul", None)  # of one tensor
    together, norm_together = moved()
    for a, b in zip(one_by_one, together):
        exact = into == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6 if exact else 1e-3, atol=1e-7)
        assert a.dtype == b.dtype == into
    torch.testing.assert_close(norm, norm_together)


def test_lists_that_share_memory_with_the_weights_are_moved_one_by_one(monkeypatch):
    monkeypatch.setattr(sam, "_in_few_kernels", lambda *lists: True)
    weights = lists([1.0, 2.0], [3.0])
    move_along_(weights, weights, lists([1.0, 0.0], [2.0]), torch.tensor(2.0))
    assert [w.tolist() for w in weights] == [[3.0, 2.0], [7.0]]
