"""A small classifier, its sentences, and their losses as closures."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from deltasam_fairseq.pytorch import METHODS

N, WIDTH = 6, 4
# Methods that need no outputs beside the losses.
PLAIN = sorted(set(METHODS) - {"functional", "tram", "tram_theta"})


def model(dropout=0.3, dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Linear(WIDTH, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 2)
    return nn.Sequential(*layers).to(dtype)


def sentences(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, WIDTH, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.tensor([0, 1, 0, 1, 1, 0])


def closures(module, *sizes, dtype=torch.float32, outputs=False):
    """One closure a micro-batch of these sizes; default: one of all. With ``outputs`` also z."""
    x, y = sentences(dtype)
    parts = zip(x.split(list(sizes or [N])), y.split(list(sizes or [N])))

    def losses(a, b):
        z = at_least_float32(module(a))
        found = F.cross_entropy(z, b, reduction="none")
        return (found, z) if outputs else found

    return [functools.partial(losses, *part) for part in parts]


def at_least_float32(x):
    return x.float() if x.element_size() < 4 else x


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def weights(module):
    return [p.detach().clone() for p in module.parameters()]
