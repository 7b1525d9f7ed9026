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
    return sharpness_aware(trainer.optimizer).core, trainer._trainable()


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

    module = sys.modules["deltasam_fairseq.core.perturber"]
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


MODES = {
    "bf16": ["--bf16"],
    "flat-fp16": ["--fp16"],
    "memory-efficient-bf16": ["--memory-efficient-bf16"],
}


def both_sides(sam, params, seed, update):
    """The weights ahead and behind, and how many directions were drawn."""
    module, drawn = sys.modules["deltasam_fairseq.core.perturber"], []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fill_direction_", "directions"):
            real = getattr(module, name)
            patch.setattr(module, name, lambda *a, real=real: drawn.append(1) or real(*a))
        found = []
        for sign in (1.0, -1.0):
            sam.probe(params, seed, update, sign)
            found.append([p.data.clone() for p in params])
            sam.restore()
    return found, len(drawn)


@pytest.mark.parametrize("mode", list(MODES))
def test_both_sides_of_one_drawing_in_half_precision(classification, tmp_path, mode):
    """Bit for bit the sides of two drawings, which is how it is without room for the direction."""
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "delta_sam_adam", *MODES[mode])
    trainer = tiny.build_trainer(argv)
    sam, params = sharpness_aware(trainer.optimizer).core, trainer._trainable()
    before = [p.data.clone() for p in params]
    expected = [probed(sam, params, 1, 7)]
    sam.probe(params, 1, 7, -1.0)
    expected.append([p.data.clone() for p in params])
    sam.restore()
    found, drawn = both_sides(sam, params, 1, 7)
    assert drawn == (2 if "memory" in mode else 1)
    for sides in zip(found, expected):
        assert all(map(torch.equal, *sides))
    if "memory" not in mode:
        sam.draw_ahead(params, 1, 7)
        assert sam._drawing is not None
        found, drawn = both_sides(sam, params, 1, 7)
        assert drawn == 0 and all(map(torch.equal, found[1], expected[1]))
        trainer.zero_grad()  # as fairseq does before the descent: nothing is left of u
        assert all((g == 0).all() for g in sam.weights.room(params))
    assert all(map(torch.equal, [p.data for p in params], before))


def test_other_side_of_another_update_is_drawn(classification, tmp_path):
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "delta_sam_adam", "--bf16")
    trainer = tiny.build_trainer(argv)
    sam, params = sharpness_aware(trainer.optimizer).core, trainer._trainable()
    sam.probe(params, 1, 8, -1.0)
    expected = [p.data.clone() for p in params]
    sam.restore()
    sam.probe(params, 1, 7)
    sam.restore()
    sam.probe(params, 1, 8, -1.0)
    assert all(map(torch.equal, [p.data for p in params], expected))
    sam.restore()


def test_other_side_in_float32_is_a_reflection(sam):
    """2 w - (w + R u): to 2^-23 of the weight what is drawn again."""
    optimizer, params = sam
    optimizer.compute_in(torch.float32, tf32=True)
    optimizer.probe(params, 1, 7, -1.0)
    expected = [p.data.clone() for p in params]
    optimizer.restore()
    (_, found), drawn = both_sides(optimizer, params, 1, 7)
    assert drawn == 1
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("micro_batches, ahead", [(1, 1), (2, 0)])
def test_drawn_ahead_only_where_a_forward_comes_first(
    classification, tmp_path, monkeypatch, micro_batches, ahead
):
    """With several micro-batches the central difference makes no clean forward."""
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "delta_sam_adam", "--bf16")
    trainer = tiny.build_trainer(argv)
    sam, calls = sharpness_aware(trainer.optimizer).core, []
    monkeypatch.setattr(sam, "draw_ahead", lambda *args: calls.append(args))
    trainer.train_step(tiny.batches(trainer)[:micro_batches])
    assert len(calls) == ahead
