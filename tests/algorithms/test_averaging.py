"""Averages worked by hand, against torch's own, and the rates that go with them."""

import itertools

import pytest
import torch
from torch.optim.swa_utils import SWALR, AveragedModel

from deltasam_fairseq.algorithms import (
    annealed_rate,
    cyclical_rate,
    exponential_mean_,
    running_mean_,
)


def tensors(*numbers, dtype=torch.float32):
    return [torch.tensor(n, dtype=dtype) for n in numbers]


def test_running_mean_by_hand():
    """1, 2, 6 have the means 1, 1.5, 3; and -4, 0, 1 have -4, -2, -1."""
    averages = tensors([0.0, 0.0])
    means = []
    for n, value in enumerate(([1.0, -4.0], [2.0, 0.0], [6.0, 1.0])):
        running_mean_(averages, tensors(value), n)
        means.append(averages[0].tolist())
    assert means == [[1, -4], [1.5, -2], [3, -1]]


def test_the_mean_of_one_is_a_copy():
    value = torch.randn(7, generator=torch.Generator().manual_seed(1)) * 1e3
    averages = [torch.full((7,), float("nan"))]
    running_mean_(averages, [value], 0)
    assert torch.equal(averages[0], value) and averages[0] is not value


def test_the_mean_of_equal_values_is_that_value():
    value = torch.randn(50, generator=torch.Generator().manual_seed(1))
    averages = [value.clone()]
    for n in range(1, 20):
        running_mean_(averages, [value], n)
    assert torch.equal(averages[0], value)


def test_exponential_mean_by_hand():
    """0.75 * 4 + 0.25 * 0 = 3; 0.75 * 3 + 0.25 * 1 = 2.5."""
    averages = tensors([4.0])
    exponential_mean_(averages, tensors([0.0]), 0.75)
    assert averages[0].item() == 3
    exponential_mean_(averages, tensors([1.0]), 0.75)
    assert averages[0].item() == 2.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_are_averaged_in_float32(dtype):
    """The mean of 1 and its successor, which the half-precision dtype cannot hold."""
    successor = 1 + torch.finfo(dtype).eps
    averages = tensors([0.0])
    running_mean_(averages, tensors([1.0], dtype=dtype), 0)
    running_mean_(averages, tensors([successor], dtype=dtype), 1)
    assert averages[0].item() == (1 + successor) / 2
    assert averages[0].to(dtype).item() != averages[0].item()


def test_no_tensors():
    running_mean_([], [], 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_equal_to_torchs_averaged_model(dtype, decay):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2)).to(dtype)
    own = [torch.zeros_like(p) for p in model.parameters()]
    avg_fn = None if decay is None else lambda a, p, n: decay * a + (1 - decay) * p
    torchs = AveragedModel(model, avg_fn=avg_fn)
    for n in range(6):
        values = [p.data for p in model.parameters()]
        if decay is None or n == 0:
            running_mean_(own, values, n)
        else:
            exponential_mean_(own, values, decay)
        torchs.update_parameters(model)
        for p in model.parameters():
            p.data += torch.randn_like(p)
    torch.testing.assert_close(own, [p.data for p in torchs.module.parameters()])


@pytest.mark.parametrize("strategy, steps", itertools.product(["cos", "linear"], [1, 4, 5]))
def test_annealing_is_torchs(strategy, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    torchs = SWALR(optimizer, swa_lr=0.1, anneal_epochs=steps, anneal_strategy=strategy)
    for step in range(8):
        rate = annealed_rate(0.5, 0.1, step, steps, strategy)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()


def test_annealing_by_hand():
    """Halfway, cos and linear are both at the middle; a quarter of the way cos is behind."""
    assert [annealed_rate(1.0, 0.0, s, 4, "linear") for s in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert annealed_rate(1.0, 0.0, 2, 4, "cos") == pytest.approx(0.5)
    assert annealed_rate(1.0, 0.0, 1, 4, "cos") == pytest.approx(0.8535533905932737)
    assert annealed_rate(1.0, 0.2, 0, 0, "cos") == 0.2


def test_cycles_by_hand():
    """(1 - t) 4 + t 1 with t = 1/3, 2/3, 1: 3, 2, 1, and again."""
    rates = [cyclical_rate(4.0, 1.0, step, 3) for step in range(7)]
    assert rates == pytest.approx([3, 2, 1, 3, 2, 1, 3])
    assert cyclical_rate(4.0, 1.0, 5, 1) == 1
