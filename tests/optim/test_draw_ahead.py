"""The direction that is drawn beside the clean forward is the one that the probe would draw."""

import sys

import pytest
import torch

from deltasam_fairseq.optim import sharpness_aware
from tests.helpers import tiny


@pytest.fixture
def sam(classification, tmp_path):
    trainer = tiny.build_trainer(
        tiny.arguments(classification, tmp_path, "--optimizer", "delta_sam_adam")
    )
    return sharpness_aware(trainer.optimizer), trainer._trainable()


def probed(sam, params, seed, update):
    sam.probe(params, seed, update)
    found = [p.data.clone() for p in params]
    sam.restore()
    return found


def test_same_numbers(sam):
    optimizer, params = sam
    expected = probed(optimizer, params, 1, 7)
    optimizer.draw_ahead(params, 1, 7)
    assert optimizer._drawing is not None
    assert all(map(torch.equal, probed(optimizer, params, 1, 7), expected))


def test_of_an_update_that_broke_off(sam):
    """What was begun for another update, or twice, is not used."""
    optimizer, params = sam
    expected = probed(optimizer, params, 1, 8)
    optimizer.draw_ahead(params, 1, 7)
    assert all(map(torch.equal, probed(optimizer, params, 1, 8), expected))
    optimizer.draw_ahead(params, 1, 7)
    optimizer.draw_ahead(params, 1, 8)
    assert all(map(torch.equal, probed(optimizer, params, 1, 8), expected))


def test_an_error_of_the_thread_is_not_lost(sam, monkeypatch):
    optimizer, params = sam

    def fail(*_):
        raise MemoryError("no room for the direction")

    module = sys.modules["deltasam_fairseq.optim.sharpness_aware"]
    monkeypatch.setattr(module, "fill_direction_", fail)
    optimizer.draw_ahead(params, 1, 7)
    with pytest.raises(MemoryError, match="no room"):
        optimizer.probe(params, 1, 7)
    assert not optimizer.weights.moved


def test_a_parameter_that_is_not_contiguous(sam):
    """It gets the numbers of a contiguous one of its shape."""
    optimizer, params = sam
    index = next(i for i, p in enumerate(params) if p.dim() == 2 and min(p.shape) > 1)
    expected = probed(optimizer, params, 1, 7)
    params[index].data = params[index].data.t().contiguous().t()
    optimizer.weights._buffers.clear()
    assert not params[index].is_contiguous()
    found = probed(optimizer, params, 1, 7)
    torch.testing.assert_close(found, expected)
