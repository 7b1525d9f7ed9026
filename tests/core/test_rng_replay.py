"""The generators in an update: put back for every pass, untouched where they are shared."""

import random

import numpy as np
import torch

from deltasam_fairseq.core.rng_replay import RngReplay


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
