"""Perturb and restore, bit for bit."""

import pytest
import torch

from deltasam_fairseq.optim.weights import MovedWeights


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5).bfloat16())]


def test_restore_is_bitwise_and_repeatable(parameters):
    before = [p.data.clone() for p in parameters]
    moved = MovedWeights()
    for _ in range(3):
        values = moved.buffers(parameters)
        for v in values:
            v.fill_(1e30)
        moved.move(parameters, values)
        assert all((p == 1e30).all() for p in parameters if p.dtype == torch.float32)
        moved.restore()
        moved.restore()
        assert all(torch.equal(p, b) for p, b in zip(parameters, before))


def test_original_storage_is_never_written(parameters):
    aliases = [p.data for p in parameters]
    before = [a.clone() for a in aliases]
    moved = MovedWeights()
    moved.move(parameters, [torch.zeros_like(p) for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(aliases, before))


def test_live_graph_is_that_of_the_original_weights():
    """d/dw (w^2 x) = 2 w x at the w of the forward, though other values were in force between."""
    w = torch.nn.Parameter(torch.tensor([3.0]))
    loss = (w * w * 5.0).sum()
    moved = MovedWeights()
    moved.move([w], [torch.tensor([100.0])])
    with torch.no_grad():
        assert (w * 2).item() == 200
    moved.restore()
    loss.backward()
    assert w.grad.item() == 30


def test_suspended_shows_the_own_values_inside_only(parameters):
    before, moved = parameters[0].data.clone(), MovedWeights()
    with moved.suspended():  # nothing moved: nothing happens
        pass
    moved.move(parameters[:1], [torch.zeros(3, 4)])
    with moved.suspended():
        assert torch.equal(parameters[0], before)
    assert (parameters[0] == 0).all()
    moved.restore()
    assert torch.equal(parameters[0], before)


def test_moving_twice_is_refused(parameters):
    moved = MovedWeights()
    moved.move(parameters, [torch.zeros_like(p) for p in parameters])
    with pytest.raises(RuntimeError, match="perturbed already"):
        moved.move(parameters, [torch.zeros_like(p) for p in parameters])


def test_gradient_accumulates_while_moved():
    """The gradient at the other values lands in the same parameter."""
    w = torch.nn.Parameter(torch.tensor([3.0]))
    moved = MovedWeights()
    moved.move([w], [torch.tensor([10.0])])
    (w * w).sum().backward()
    moved.restore()
    assert w.grad.item() == 20 and w.item() == 3
