"""The package where fairseq is not installed, or cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from importlib.machinery import PathFinder

HIDDEN = ("fairseq", "fairseq_cli", "omegaconf", "hydra")

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        if name.split(".")[0] in HIDDEN:
            return PathFinder.find_spec(name, sys.argv[1:])
        return self.finder.find_spec(name, *args)

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


@pytest.mark.parametrize("there", ["nothing", "folder", "broken"])
def test_trains(tmp_path, there):
    """A plain folder named fairseq is none; one that cannot be imported warns."""
    if there != "nothing":
        (tmp_path / "fairseq").mkdir()
    if there == "broken":
        (tmp_path / "fairseq/__init__.py").write_text("raise ValueError('mutable default')")
    done = run(PROGRAM, str(tmp_path))
    assert done.returncode == 0, done.stderr
    warned = "fairseq cannot be imported (ValueError: mutable default)" in done.stderr
    assert warned == (there == "broken"), done.stderr


def test_user_dir_fails_where_the_plugin_cannot_be_imported(tmp_path):
    (tmp_path / "fairseq").mkdir()
    (tmp_path / "fairseq/__init__.py").write_text("")
    done = run("import fairseq, deltasam_fairseq", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "No module named 'fairseq.trainer'" in done.stderr


def run(program, *argv, **environment):
    return subprocess.run(
        [sys.executable, "-c", program, *argv],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        universal_newlines=True,
    )
