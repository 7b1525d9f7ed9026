"""Products of float32 in TF32: the probe follows float16's rule, the ascent stays as it is.

TF32 is simulated: the operands of every linear layer are rounded to 10 bits of mantissa, as the
tensor cores of a GPU do it.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils

from deltasam_fairseq.algorithms import multiplies_in_tf32
from deltasam_fairseq.core import parts
from deltasam_fairseq.optim import sharpness_aware
from deltasam_fairseq.trainer import sharpness_aware as trainer_module
from tests.helpers import tiny

REGRESSION = Path(__file__).parents[1] / "regression"


def round_to_tf32(x):
    """Keep 10 of 23 bits of mantissa, to nearest; the gradient passes."""
    bits = x.detach().contiguous().view(torch.int32)
    rounded = ((bits + (1 << 12)) >> 13 << 13).view(torch.float32)
    return x + (rounded - x.detach())


def test_rounding_by_hand():
    """Between 1 and 2 the spacing of 10 bits is 2^-10; half of it is rounded away."""
    x = torch.tensor([1 + 2**-10, 1 + 2**-12, 1 + 0.75 * 2**-10, -3.0])
    assert round_to_tf32(x).tolist() == [1 + 2**-10, 1.0, 1 + 2**-10, -3.0]


@pytest.fixture
def guardedness_of(tmp_path, monkeypatch):
    """Returns the shares |a_j| / sum |a| that an update finds; all on the same batch and probe."""
    linear = F.linear

    def rounding_linear(x, w, b=None):
        return linear(round_to_tf32(x), round_to_tf32(w), b)

    def found(simulated, known):
        argv = tiny.arguments(
            REGRESSION / "data",
            tmp_path,
            *json.loads((REGRESSION / "architecture.json").read_text()),
            *("--finetune-from-model", str(REGRESSION / "small_roberta.pt"), "--lr", "1e-3"),
            *("--optimizer", "delta_sam_adam", "--sam-rho", "0.02", "--batch-size", "32"),
        )
        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "multiplies_in_tf32", lambda device: known)
            trainer = tiny.build_trainer(argv)
            checkpoint_utils.load_checkpoint(trainer.cfg.checkpoint, trainer)
            sample, seen = tiny.batches(trainer)[0], []
            if simulated:
                patch.setattr(F, "linear", rounding_linear)
            original = parts.reweight
            patch.setattr(parts, "reweight", lambda a, *more: seen.append(a) or original(a, *more))
            trainer.train_step([sample])
        return seen[0].abs() / seen[0].abs().sum(), sharpness_aware(trainer.optimizer)

    return found


def test_weights_of_sentences_are_those_of_float32(guardedness_of):
    """Total variation to float32: the literal probe drowns in the rounding, the rule's does not."""
    exact, sam = guardedness_of(simulated=False, known=False)
    assert sam.core.probe_signs == (1.0,)
    literal, _ = guardedness_of(simulated=True, known=False)
    ruled, sam = guardedness_of(simulated=True, known=True)
    assert sam.core.probe_signs == (1.0, -1.0) and sam.core.half_dtype is None
    assert "TF32" in sam.describe()
    apart = [float((shares - exact).abs().sum() / 2) for shares in (literal, ruled)]
    assert apart[0] > 0.1 and apart[1] < 0.05, apart


def test_who_multiplies_in_tf32(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert multiplies_in_tf32(cuda) and not multiplies_in_tf32(torch.device("cpu"))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert not multiplies_in_tf32(cuda)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not multiplies_in_tf32(cuda)
