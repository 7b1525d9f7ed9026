"""The package where fairseq is not installed."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys

HIDDEN = ("fairseq", "fairseq_cli", "omegaconf", "hydra")

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, *args)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
import torch
import deltasam_fairseq
from deltasam_fairseq.pytorch import SharpnessAware

model = torch.nn.Linear(3, 1)
SharpnessAware(model).backward(lambda: model(torch.eye(3)).squeeze(1))
assert model.weight.grad is not None
assert not hasattr(deltasam_fairseq, "SharpnessAwareTrainer")
"""


def test_trains():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, universal_newlines=True
    )
    assert done.returncode == 0, done.stderr
