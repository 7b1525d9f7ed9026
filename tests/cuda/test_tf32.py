"""Products in TF32, on a card that has them; tests/trainer/test_tf32.py simulates the same."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from deltasam_fairseq.algorithms import multiplies_in_tf32
from deltasam_fairseq.core import parts
from deltasam_fairseq.optim import sharpness_aware
from tests.helpers import gpu, tiny
from tests.helpers.twin import FLOAT64, NO_DROPOUT

REGRESSION = Path(__file__).parents[1] / "regression"
trainer_module = importlib.import_module("deltasam_fairseq.trainer.sharpness_aware")


@pytest.fixture
def has_tf32():
    if torch.cuda.get_device_capability(gpu.DEVICE) < (8, 0):
        pytest.skip("TF32 came with compute capability 8.0")


@pytest.fixture
def shares_of(tmp_path, monkeypatch):
    """Returns g of an update, |a_j| / sum |a|, of one batch and one direction of the probe."""
    gpu.draw_on_the_host(monkeypatch)

    def found(*more, dtype=None, tf32=False, known=True):
        options = [
            *json.loads((REGRESSION / "architecture.json").read_text()),
            *("--sam-rho", "0.02", "--batch-size", "32", *NO_DROPOUT, *more),
        ]
        torch.backends.cuda.matmul.allow_tf32 = tf32
        seen, own = [], parts.reweight
        with monkeypatch.context() as patch:
            if not known:
                patch.setattr(trainer_module, "multiplies_in_tf32", lambda device: False)
            trainer = gpu.build_trainer(
                REGRESSION / "data", tmp_path, "delta_sam_adam", *options, dtype=dtype
            )
            # Not checkpoint_utils.load_checkpoint, which needs fairseq's compiled extensions.
            trainer.load_checkpoint(str(REGRESSION / "small_roberta.pt"), reset_optimizer=True)
            patch.setattr(parts, "reweight", lambda a, *x: seen.append(a) or own(a, *x))
            trainer.train_step(tiny.batches(trainer)[:1])
        return seen[0].abs() / seen[0].abs().sum(), trainer

    return found


def rounds_products(trainer):
    """Whether cuBLAS takes the tensor cores at this model's sizes, which is its own choice."""
    linear = trainer.get_model().encoder.sentence_encoder.layers[0].fc1
    x = torch.randn(256, linear.in_features, device=gpu.DEVICE)
    outputs = []
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        outputs.append(linear(x))
    return not torch.equal(*outputs)


def test_the_probe_follows_float16s_rule(has_tf32, shares_of):
    """Total variation of g to float64: the literal probe's is larger than the rule's."""
    exact, _ = shares_of(*FLOAT64, dtype=torch.float64)
    float32, trainer = shares_of()
    assert sharpness_aware(trainer.optimizer).core.probe_signs == (1.0,)
    literal, _ = shares_of(tf32=True, known=False)
    ruled, trainer = shares_of(tf32=True)
    assert multiplies_in_tf32(trainer.device)
    assert sharpness_aware(trainer.optimizer).core.probe_signs == (1.0, -1.0)
    found = (float32, literal, ruled)
    apart = [(shares - exact).abs().sum().item() / 2 for shares in found]
    print("total variation to float64: float32 {:.4f}, literal {:.3f}, rule {:.3f}".format(*apart))
    assert apart[0] < 0.02 and apart[2] < 0.05, apart
    if rounds_products(trainer):
        assert apart[1] > apart[2], apart
