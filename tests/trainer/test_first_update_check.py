"""The first update of delta-SAM: its forwards replay, and losses add up to the criterion's."""

import pytest
import torch

from deltasam_fairseq.criterions import require_replay, require_same_sum
from tests.helpers import tiny

MODES = {
    "fp32": [],
    "fp16": ["--fp16"],
    "memory-efficient-fp16": ["--memory-efficient-fp16"],
    "bf16": ["--bf16"],
}
NAMES = ["sentence_prediction", "plain", "r3f", "masked_lm", "label_smoothed_cross_entropy"]
in_all_modes = pytest.mark.parametrize("mode", list(MODES))


def build(data, folder, mode, optimizer="delta_sam_adam", criterion="sentence_prediction"):
    argv = tiny.arguments(
        data,
        folder,
        *("--optimizer", optimizer, "--dropout", "0.1", *MODES[mode]),
        criterion=criterion,
    )
    return tiny.build_trainer(argv)


def drop_without_replay(trainer):
    """Dropout from a generator that no seed of torch's reaches, as cuDNN's in nn.LSTM."""
    own = torch.Generator().manual_seed(7)

    def drop(module, args, output):
        kept = torch.rand(output.shape, generator=own) > 0.1
        return output * kept.to(output) / 0.9

    layer = trainer.get_model().encoder.sentence_encoder.layers[0]
    layer.final_layer_norm.register_forward_hook(drop)


@in_all_modes
def test_dropout_that_does_not_replay(classification, tmp_path, mode):
    trainer = build(classification, tmp_path, mode)
    drop_without_replay(trainer)
    with pytest.raises(ValueError, match="same random state gave the losses .* nn.LSTM"):
        trainer.train_step(tiny.batches(trainer)[:1])


def test_sam_does_not_ask(classification, tmp_path):
    trainer = build(classification, tmp_path, "fp32", "sam_adam")
    drop_without_replay(trainer)
    assert trainer.train_step(tiny.batches(trainer)[:1]) is not None


@in_all_modes
@pytest.mark.parametrize("criterion", NAMES)
def test_healthy_models(data_of, tmp_path, mode, criterion):
    trainer = build(data_of[criterion], tmp_path, mode, criterion=criterion)
    trainer.train_step(tiny.batches(trainer)[:1])
    assert trainer._ascent_step._losses_checked


@pytest.mark.parametrize(
    "dtype, apart", [("float32", 1e-5), ("float16", 2**-9), ("bfloat16", 2**-6)]
)
def test_rounding_of_logits_is_allowed(dtype, apart):
    """One unit in the last place of two logits: 4 u, of float16 4 x 2^-11."""
    losses, factor = torch.tensor([0.5, 800.0], dtype=torch.float64), 0.99
    off = losses + torch.tensor([0.0, 800 * apart * factor])
    require_replay(None, losses, off, getattr(torch, dtype))
    with pytest.raises(ValueError, match="gave the losses 800 and 8"):
        require_replay(None, losses, losses + 1.02 * (off - losses), getattr(torch, dtype))
    require_replay(None, losses, losses * float("nan"), getattr(torch, dtype))


@pytest.mark.parametrize(
    "dtype, apart", [("float32", 1e-4), ("float16", 2**-9), ("bfloat16", 2**-6)]
)
def test_rounding_of_a_sum_is_allowed(dtype, apart):
    """Of a loss in half precision, u = 2^-8 in bfloat16: 4 u of 64. A loss in float32 is exact."""
    losses = torch.full((32,), 2.0)
    steps = 64 * apart
    require_same_sum(None, losses, torch.tensor(64 - 0.9 * steps).to(getattr(torch, dtype)))
    with pytest.raises(ValueError, match="belong to no sentence"):
        require_same_sum(None, losses, torch.tensor(64 - 2 * steps).to(getattr(torch, dtype)))
