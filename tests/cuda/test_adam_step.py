"""--adam-step on a GPU, under SAM and in every precision."""

import pytest
import torch
from fairseq.optim.adam import get_fused_adam_class

from deltasam_fairseq.optim.adam import FusedAdam, MultiTensorAdam
from tests.helpers import gpu, tiny

CLASSES = {"foreach": MultiTensorAdam, "fused": FusedAdam}


def train(data, tmp_path, step, mode):
    options = ["--adam-step", step, "--dropout", "0", *gpu.MODES[mode]]
    trainer = gpu.build_trainer(data, tmp_path, "sam_adam", *options)
    trainer.train_step(tiny.batches(trainer)[:1])
    return trainer


@pytest.mark.parametrize("mode", ["fp32", "fp16", "flat-fp16", "amp"])
@pytest.mark.parametrize("step", list(CLASSES))
def test_is_the_loop_to_rounding(classification, tmp_path, step, mode):
    """One step, of the same gradients: the next would magnify the last place of those near zero."""
    loop = train(classification, tmp_path, "loop", mode)
    other = train(classification, tmp_path, step, mode)
    assert type(other.optimizer.optimizer) is CLASSES[step]
    for a, b in zip(tiny.weights(loop), tiny.weights(other)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if a.dtype == torch.float32 else 1e-3)


def test_auto_is_foreach_without_apex(classification, tmp_path):
    trainer = gpu.build_trainer(classification, tmp_path, "delta_sam_adam")
    assert (type(trainer.optimizer.optimizer) is MultiTensorAdam) == (
        get_fused_adam_class() is None
    )
