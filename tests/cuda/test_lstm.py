"""nn.LSTM under cuDNN, whose dropout has a state of its own."""

import pytest
import torch

from tests.helpers import gpu, tiny

LSTM = (
    "--arch lstm --encoder-embed-dim 16 --encoder-hidden-size 16 --decoder-embed-dim 16 "
    "--decoder-hidden-size 16 --decoder-out-embed-dim 16"
).split()


NOT_OF_LSTMS = ("ffn-embed-dim", "attention-heads")


def build(data, tmp_path, optimizer, *more):
    options = ("--task", "translation", "-s", "aa", "-t", "bb", *LSTM, *more)
    argv = gpu.arguments(data, tmp_path, optimizer, *options, criterion="cross_entropy")
    sides = [f"--{side}-{what}" for side in ("encoder", "decoder") for what in NOT_OF_LSTMS]
    for name in sides:
        at = argv.index(name)
        del argv[at : at + 2]
    return tiny.build_trainer(argv)


@pytest.mark.parametrize("optimizer", gpu.OPTIMIZERS)
@pytest.mark.parametrize("layers, dropout", [("1", "0.2"), ("2", "0")])
def test_without_dropout_between_its_layers(translation, tmp_path, optimizer, layers, dropout):
    more = ("--encoder-layers", layers, "--decoder-layers", layers, "--dropout", dropout)
    trainer = build(translation, tmp_path, optimizer, *more)
    logs = [trainer.train_step([sample]) for sample in tiny.batches(trainer)[:2]]
    assert all(torch.isfinite(torch.as_tensor(log["loss"])) for log in logs)


def test_dropout_between_its_layers_is_replayed_or_refused(translation, tmp_path):
    """Masks that differ between the clean forward and the probe would be noise in every a_j."""
    more = ("--encoder-layers", "2", "--decoder-layers", "2", "--dropout", "0.5")
    trainer = build(translation, tmp_path, "delta_sam_adam", *more)
    sample, _ = trainer._prepare_sample(tiny.batches(trainer)[0])
    losses = []
    for _ in range(2):
        trainer._set_seed()
        with torch.no_grad():
            losses.append(trainer.criterion(trainer.model, sample)[0].item())
    apart = abs(losses[1] / losses[0] - 1)
    print(f"two forwards of an LSTM from one seed: losses apart by {apart:.1e}")
    if apart > 1e-3:  # ten times what the check of the first update lets pass
        with pytest.raises(ValueError, match="per-sentence|two forwards"):
            trainer.train_step([sample])
    else:
        trainer.train_step([sample])
