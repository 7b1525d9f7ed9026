"""Everything is computed on the current stream, and random numbers depend on nothing but it."""

import pytest
import torch

from deltasam_fairseq.algorithms import PROBE, ROUNDING, fill_direction_, update_generator
from deltasam_fairseq.trainer import metrics as step_metrics
from tests.helpers import gpu, tiny

SLEEP = 100_000_000  # clock cycles: about 50 ms


def draw(update=5, use=PROBE):
    out = [torch.empty(n, device=gpu.DEVICE) for n in (3, 70_000)]
    fill_direction_(out, update_generator(3, update, use, gpu.DEVICE), 1)
    return torch.cat(out)


def test_update_generator_draws_the_same():
    """As often as it is made, without a step of the generator that dropout draws from."""
    state = torch.cuda.get_rng_state(gpu.DEVICE)
    u = draw()
    assert torch.equal(draw(), u)
    assert not torch.equal(draw(update=6), u) and not torch.equal(draw(use=ROUNDING), u)
    assert torch.equal(torch.cuda.get_rng_state(gpu.DEVICE), state)
    assert abs(u.mean().item()) < 0.02 and u.std().item() == pytest.approx(1, abs=0.02)


def test_update_generator_draws_on_the_current_stream():
    expected = draw()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        draw()  # to have memory: asking for some may wait
        side.synchronize()
        torch.cuda._sleep(SLEEP)
        drawn = draw()
        assert not side.query()  # nothing waited
    side.synchronize()
    assert torch.equal(drawn, expected)


def test_figures_come_to_the_host_after_they_are_computed():
    """On a stream of the user's, which is behind."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        figure = torch.zeros((), device=gpu.DEVICE)
        torch.cuda._sleep(SLEEP)
        figure.fill_(7)
        ((log,), size) = step_metrics.on_host([[{"loss": figure, "n": 2}], figure * 2])
    assert log["loss"].item() == 7 and log["n"] == 2 and size.item() == 14
    assert log["loss"].device.type == "cpu"


@pytest.mark.parametrize("mode", ["fp32", "fp16", "bf16", "amp"])
@pytest.mark.parametrize("optimizer", gpu.OPTIMIZERS)
def test_updates_on_another_stream_are_the_same(classification, tmp_path, optimizer, mode):
    """Bit for bit: what was computed on a stream of its own, or read too early, would differ."""
    ends = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            more = ["--dropout", "0.1", *gpu.MODES[mode]]
            trainer = gpu.build_trainer(classification, tmp_path, optimizer, *more)
            for sample in tiny.batches(trainer)[:3]:
                trainer.train_step([sample])
            ends.append(tiny.weights(trainer))
        stream.synchronize()
    assert all(map(torch.equal, *ends))
