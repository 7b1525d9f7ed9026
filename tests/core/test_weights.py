"""Perturb and restore, bit for bit, in both ways of doing it."""

import pytest
import torch

from deltasam_fairseq.core.weights import OverwrittenWeights, SwappedWeights


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 4).half()), torch.nn.Parameter(torch.randn(5).half())]


@pytest.fixture(params=["swapped", "overwritten"])
def moved(request, parameters):
    """For `OverwrittenWeights`, float32 copies that round to the weights but are not equal."""
    if request.param == "swapped":
        return SwappedWeights()
    return OverwrittenWeights({p: p.data.float() * (1 + 2**-14) for p in parameters})


def fill(value):
    def write(out):
        for v in out:
            v.fill_(value)

    return write


def test_restore_is_bitwise_and_repeatable(parameters, moved):
    before = [p.data.clone() for p in parameters]
    for _ in range(3):
        moved.move(parameters, fill(1e4))
        assert moved.moved and all((p == 1e4).all() for p in parameters)
        moved.restore()
        moved.restore()
        assert not moved.moved and all(torch.equal(p, b) for p, b in zip(parameters, before))


def test_some_parameters_then_others(parameters, moved):
    """Buffers are kept by parameter, not by position."""
    before = [p.data.clone() for p in parameters]
    for chosen in (parameters, parameters[1:], parameters[:1], parameters):
        moved.move(chosen, fill(7))
        assert all((p == 7).all() for p in chosen)
        moved.restore()
        assert all(torch.equal(p, b) for p, b in zip(parameters, before))


def test_restore_after_an_error_while_writing(parameters, moved):
    before = [p.data.clone() for p in parameters]

    def write(out):
        out[0].fill_(7)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moved.move(parameters, write)
    moved.restore()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before))


def test_suspended_shows_the_own_values_inside_only(parameters, moved):
    before = parameters[0].data.clone()
    with moved.suspended():  # nothing moved: nothing happens
        pass
    moved.move(parameters[:1], fill(0))
    with moved.suspended():
        assert torch.equal(parameters[0], before)
    assert (parameters[0] == 0).all()
    moved.restore()
    assert torch.equal(parameters[0], before)


def test_moving_twice_is_refused(parameters, moved):
    moved.move(parameters, fill(0))
    with pytest.raises(RuntimeError, match="perturbed already"):
        moved.move(parameters, fill(0))


def test_overwritten_weights_are_kept_in_float32(parameters):
    masters = {p: p.data.float() * (1 + 2**-14) for p in parameters}
    assert OverwrittenWeights(masters).values(parameters)[0] is not parameters[0].data
    assert torch.equal(OverwrittenWeights(masters).values(parameters)[0], masters[parameters[0]])


def test_swapped_storage_is_never_written(parameters):
    aliases = [p.data for p in parameters]
    before = [a.clone() for a in aliases]
    SwappedWeights().move(parameters, fill(0))
    assert all(torch.equal(a, b) for a, b in zip(aliases, before))


@pytest.mark.parametrize("way", ["swapped", "overwritten"])
def test_live_graph_is_that_of_the_original_weights(way):
    """d/dw (w^2 x) = 2 w x at the w of the forward, though other values were in force between."""
    w = torch.nn.Parameter(torch.tensor([3.0]))
    loss = (w * w * 5.0).sum()
    moved = SwappedWeights() if way == "swapped" else OverwrittenWeights({w: w.data.clone()})
    moved.move([w], fill(100.0))
    with torch.no_grad():
        assert (w * 2).item() == 200
    moved.restore()
    loss.backward()
    assert w.grad.item() == 30


def test_gradient_accumulates_while_moved():
    """The gradient at the other values lands in the same parameter."""
    w = torch.nn.Parameter(torch.tensor([3.0]))
    moved = SwappedWeights()
    moved.move([w], fill(10.0))
    (w * w).sum().backward()
    moved.restore()
    assert w.grad.item() == 20 and w.item() == 3
