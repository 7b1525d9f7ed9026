"""The generators in an update: put back for every pass, untouched where they are shared."""

import random

import numpy as np
import pytest
import torch

from deltasam_fairseq.trainer.rng_replay import RngReplay
from tests.helpers import tiny


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_every_pass_draws_the_same_numbers():
    replay = RngReplay(lambda: torch.manual_seed(5), host=True)
    passes = []
    for _ in range(3):
        replay()
        passes.append(draw())
    assert passes[0] == passes[1] == passes[2]


def test_generators_are_afterwards_where_one_pass_leaves_them():
    random.seed(1), np.random.seed(1), torch.manual_seed(5)
    draw()
    expected = draw()
    random.seed(1), np.random.seed(1)
    replay = RngReplay(lambda: torch.manual_seed(5), host=True)
    for _ in range(3):
        replay()
        draw()
    assert draw() == expected


def test_host_generators_are_left_alone_where_a_thread_loads_data():
    replay = RngReplay(lambda: torch.manual_seed(5), host=False)
    np.random.seed(1), random.seed(1)
    replay()
    first = draw()
    replay()
    second = draw()
    assert first[2] == second[2] and first[:2] != second[:2]


def test_a_model_whose_masks_no_seed_replays_is_refused(classification, tmp_path):
    """As nn.LSTM drops out between its layers on a GPU; a_j would be noise."""
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "delta_sam_adam")
    trainer = tiny.build_trainer(argv)
    generator = torch.Generator().manual_seed(1)
    layer = trainer.get_model().encoder.sentence_encoder.layers[0].fc1
    layer.register_forward_hook(
        lambda *args: args[-1] + torch.randn(args[-1].shape, generator=generator)
    )
    with pytest.raises(ValueError, match="dropout is not replayed.*--encoder-dropout-out 0"):
        trainer.train_step(tiny.batches(trainer)[:1])
