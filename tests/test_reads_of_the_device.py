"""SAM and delta-SAM wait for the device no more often than Adam does: every wait stalls a GPU."""

from collections import Counter

import pytest
import tiny
from fairseq.logging import metrics
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that bring a number, or a shape that depends on one, to the host.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class CountReads(TorchDispatchMode):
    """Counts what is read while inside, apart from what models read in their forward."""

    def __init__(self, model):
        super().__init__()
        self.reads, self.in_forward = Counter(), 0
        model.register_forward_pre_hook(lambda *_: self.enter(1))
        model.register_forward_hook(lambda *_: self.enter(-1))

    def enter(self, step):
        self.in_forward += step

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in READS and not self.in_forward:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def reads(data, tmp_path, optimizer, *more):
    argv = tiny.arguments(data, tmp_path, "--optimizer", optimizer, *more)
    trainer = tiny.build_trainer([*argv, "--log-interval", "100"])
    samples = tiny.batches(trainer)
    with metrics.aggregate(new_root=True):
        trainer.train_step(samples[:1])  # the first update checks more
        counter = CountReads(trainer.get_model())
        with counter:
            trainer.train_step(samples[1:2])
    return counter.reads


@pytest.mark.parametrize("mode", [[], ["--memory-efficient-fp16"], ["--update-freq", "2"]])
@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
def test_as_often_as_adam(classification, tmp_path, optimizer, mode):
    """But for --sam-ascent-fraction, which has to know how long the chosen sentences are."""
    expected = reads(classification, tmp_path, "adam", *mode)
    assert expected and reads(classification, tmp_path, optimizer, *mode) == expected


def test_a_read_is_seen(classification, tmp_path):
    """Where the norm of the ascent gradient is read it is counted."""
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "sam_adam")
    trainer = tiny.build_trainer(argv)
    counter = CountReads(trainer.get_model())
    with counter:
        float(next(trainer.get_model().parameters()).norm())
    assert counter.reads == {"aten::_local_scalar_dense": 1}
