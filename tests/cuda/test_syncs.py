"""SAM and delta-SAM wait for the device as often as Adam does, and once for the copy of the log."""

import warnings

import pytest
import torch
from fairseq.logging import metrics

from tests.helpers import gpu, tiny

COPY_OF_THE_LOG = 1


def waits(data, tmp_path, optimizer, *more):
    """Waits of the third update, but for those of the model's forwards: SAM has more forwards.

    tests/trainer/test_device_syncs.py counts the same as far as a CPU can show it.
    """
    trainer = gpu.build_trainer(data, tmp_path, optimizer, *more, "--log-interval", "100")
    samples, model = tiny.batches(trainer), trainer.get_model()
    with metrics.aggregate(new_root=True):
        for sample in samples[:2]:
            trainer.train_step([sample])
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            marks = []
            model.register_forward_pre_hook(lambda *_: marks.append(len(caught)))
            model.register_forward_hook(lambda *_: marks.append(len(caught)))
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer.train_step(samples[2:3])
            finally:
                torch.cuda.set_sync_debug_mode("default")
    inside = {i for a, b in zip(marks[::2], marks[1::2]) for i in range(a, b)}
    outside = [warning for i, warning in enumerate(caught) if i not in inside]
    return [str(w.message) for w in outside if "synchronizing CUDA operation" in str(w.message)]


@pytest.mark.parametrize("mode", ["fp32", "fp16", "memory-efficient-bf16", "amp"])
def test_as_often_as_adam(classification, tmp_path, mode):
    options = gpu.MODES[mode]
    adam = len(waits(classification, tmp_path, "adam", *options))
    counts = {name: len(waits(classification, tmp_path, name, *options)) for name in gpu.OPTIMIZERS}
    print(f"waits of an update, {mode}: adam {adam}, {counts}")  # pytest -rP shows it
    assert adam > 0
    assert all(count <= adam + COPY_OF_THE_LOG for count in counts.values()), (adam, counts)
