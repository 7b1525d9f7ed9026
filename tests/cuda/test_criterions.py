"""Every criterion with per-sentence losses and every base optimizer trains on a GPU."""

import pytest
import torch
from fairseq.logging import metrics

from tests.helpers import gpu, tiny
from tests.test_conformance import CRITERIONS, OPTIMIZERS

MODES = {"fp16": ["--fp16", "--fp16-no-flatten-grads"], "amp": ["--amp"]}
BASES = [name for name in OPTIMIZERS if name.startswith("delta") and "lamb" not in name]


def train_and_validate(trainer):
    samples = tiny.batches(trainer)
    with metrics.aggregate(new_root=True) as agg:
        for sample in samples[:2]:
            assert trainer.train_step([sample]) is not None
        trainer.valid_step(samples[-1])
        figures = agg.get_smoothed_values()
    assert all(torch.isfinite(torch.as_tensor(float(figures[k]))) for k in ("loss", "sam_loss"))
    assert all(torch.isfinite(w).all() for w in tiny.weights(trainer))


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("criterion", CRITERIONS)
def test_criterion(data_of, tmp_path, criterion, mode):
    if criterion == "masked_lm":
        pytest.importorskip("fairseq.data.token_block_utils_fast", reason="fairseq's extensions")
    trainer = gpu.build_trainer(
        data_of[criterion], tmp_path, "delta_sam_adam", *MODES[mode], criterion=criterion
    )
    train_and_validate(trainer)


@pytest.mark.parametrize("optimizer", BASES)
def test_optimizer(classification, tmp_path, optimizer):
    train_and_validate(gpu.build_trainer(classification, tmp_path, optimizer))


@pytest.mark.parametrize("where", [[], ["--swa-device", "cpu"]], ids=["gpu", "cpu"])
def test_average_of_the_weights(classification, tmp_path, where):
    """After three updates the average is the mean of what was seen, whatever device holds it."""
    swa = ["--lr-scheduler", "swa_fixed", "--swa-start", "0", *where]
    trainer = gpu.build_trainer(classification, tmp_path, "sam_adam", *swa)
    seen = []
    for sample in tiny.batches(trainer)[:3]:
        trainer.train_step([sample])
        seen.append(tiny.weights(trainer))
    with trainer.weight_average.in_force():
        averages = tiny.weights(trainer)
    for average, *each in zip(averages, *seen):
        torch.testing.assert_close(average, torch.stack(each).mean(dim=0))
    assert all(map(torch.equal, tiny.weights(trainer), seen[-1]))
