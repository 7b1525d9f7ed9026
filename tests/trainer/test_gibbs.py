"""RW-SAM (--delta-sam-weights gibbs) in fairseq's train step; its twin: test_against_twin."""

import pytest
import torch

from deltasam_fairseq.optim import sharpness_aware
from tests.helpers import runs, tiny

GIBBS = ["--optimizer", "delta_sam_adam", "--delta-sam-weights", "gibbs", "--dropout", "0.1"]


def trained(data, folder, *more):
    trainer = tiny.build_trainer(tiny.arguments(data, folder, *GIBBS, *more))
    samples = tiny.batches(trainer)
    logs = [trainer.train_step(micro_batches) for micro_batches in (samples[:1], samples[1:])]
    return trainer, logs


def test_lambda_zero_is_sam_bitwise(classification, tmp_path):
    zero, _ = trained(classification, tmp_path, "--delta-sam-lambda", "0")
    sam, _ = trained(
        classification, tmp_path, "--delta-sam-weights", "linear", "--delta-sam-beta", "0"
    )
    assert all(map(torch.equal, tiny.weights(zero), tiny.weights(sam)))
    other, _ = trained(classification, tmp_path)
    assert not all(map(torch.equal, tiny.weights(other), tiny.weights(sam)))


def test_log_has_the_effective_share_and_no_r(classification, tmp_path):
    trainer, _ = trained(classification, tmp_path)
    log = runs.train(classification, tmp_path / "run", *GIBBS).updates[-1]
    assert 1 / 8 < float(log["delta_sam_effective"]) < 1 and log["delta_sam_uniform"] == "0"
    assert "delta_sam_r" not in log and "delta_sam_negative" not in log
    assert sharpness_aware(trainer.optimizer).describe() == ("RW-SAM on adam: rho 0.05, lambda 2")


def test_probe_is_a_rademacher_vector(classification, tmp_path):
    """Every weight moves by the same amount, R / sqrt(d), up or down."""
    trainer = tiny.build_trainer(tiny.arguments(classification, tmp_path, *GIBBS))
    sam, params = sharpness_aware(trainer.optimizer), trainer._trainable()
    before = torch.cat([p.data.flatten() for p in params]).double()
    radius = sam.core.probe(params, 3, 0)
    moved = torch.cat([p.data.flatten() for p in params]).double() - before
    sam.restore()
    expected = torch.full_like(moved, float(radius) / len(moved) ** 0.5)
    torch.testing.assert_close(moved.abs(), expected, rtol=1e-3, atol=1e-7)
    assert abs(moved.sign().mean()) < 5 / len(moved) ** 0.5


@pytest.mark.parametrize("option", ["--sam-only=layer_norm", "--sam-adaptive", "--bf16"])
def test_with_other_options(classification, tmp_path, option):
    trainer, logs = trained(classification, tmp_path, option)
    assert all(torch.isfinite(w).all() for w in tiny.weights(trainer))
    assert all(torch.isfinite(torch.as_tensor(log["loss"])) for log in logs)
