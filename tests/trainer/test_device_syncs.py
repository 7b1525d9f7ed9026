"""SAM and delta-SAM wait for the device no more often than Adam does: every wait stalls a GPU."""

from collections import Counter

import pytest
import torch
from fairseq.logging import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from deltasam_fairseq.trainer import metrics as step_metrics
from tests.helpers import tiny

# Operations that bring a number, or a shape that depends on one, to the host.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class CountReads(TorchDispatchMode):
    """Counts what is read while inside, apart from what models read in their forward.

    Everything is taken to be on a device but what `step_metrics.on_host` has brought, and what is
    made of that alone.
    """

    def __init__(self, model):
        super().__init__()
        self.reads, self.in_forward = Counter(), 0
        model.register_forward_pre_hook(lambda *_: self.enter(1))
        model.register_forward_hook(lambda *_: self.enter(-1))

    def enter(self, step):
        self.in_forward += step

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        tensors = [a for a in args if torch.is_tensor(a)]
        host = bool(tensors) and all(hasattr(t, "is_on_host") for t in tensors)
        if name in READS and not self.in_forward and not host:
            self.reads[name] += 1
        out = func(*args, **(kwargs or {}))
        if host and torch.is_tensor(out):
            out.is_on_host = True
        return out


@pytest.fixture(autouse=True)
def as_if_on_a_device(monkeypatch):
    """A copy to the host, which a CPU does not make, is made and marked."""

    def on_device(value):
        return torch.is_tensor(value) and value.dim() == 0 and not hasattr(value, "is_on_host")

    def on_host(figures):
        found = own(figures)
        for log in found[0]:
            for value in (*log.values(), found[1]):
                if torch.is_tensor(value):
                    value.is_on_host = True
        return found

    own = step_metrics.on_host
    monkeypatch.setattr(step_metrics, "_is_on_device", on_device)
    monkeypatch.setattr("deltasam_fairseq.trainer.sharpness_aware.on_host", on_host)


def reads(data, tmp_path, optimizer, *more, criterion="sentence_prediction", ranks=False):
    argv = tiny.arguments(data, tmp_path, "--optimizer", optimizer, *more, criterion=criterion)
    trainer = tiny.build_trainer([*argv, "--log-interval", "100"])
    if ranks:  # figures are reduced as between ranks, which leaves tensors
        trainer._sync_stats = lambda: True
    samples = tiny.batches(trainer)
    with metrics.aggregate(new_root=True):
        trainer.train_step(samples[:1])  # the first update checks more
        counter = CountReads(trainer.get_model())
        with counter:
            trainer.train_step(samples[1:2])
    copies = optimizer != "adam"  # of on_host
    return sum(counter.reads.values()) + copies


@pytest.mark.parametrize("mode", [[], ["--memory-efficient-fp16"], ["--update-freq", "2"]])
@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
def test_as_often_as_adam(classification, tmp_path, optimizer, mode):
    """But for --sam-ascent-fraction, which has to know how long the chosen sentences are."""
    expected = reads(classification, tmp_path, "adam", *mode)
    assert 0 < reads(classification, tmp_path, optimizer, *mode) <= expected


METHODS = [
    "sam_adam --sam-gsam-alpha 0.4 --sam-rho-schedule lr",
    "sam_adam --sam-functional",
    "sam_adam --sam-mask fisher",  # between two renewals
    "sam_adam --sam-radius trust_region",
    "sam_adam --sam-radius trust_region_theta",
    "delta_sam_adam --delta-sam-weights gibbs",
]


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_the_family_as_often_as_adam(classification, tmp_path, method):
    expected = reads(classification, tmp_path, "adam")
    assert 0 < reads(classification, tmp_path, *method.split()) <= expected


@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
def test_no_more_often_between_ranks(classification, tmp_path, optimizer, monkeypatch):
    """The figures are on the device then; all come in one copy."""
    monkeypatch.setattr("fairseq.distributed.utils.all_reduce", lambda t, *_, **__: t)
    expected = reads(classification, tmp_path, "adam", ranks=True)
    assert 0 < reads(classification, tmp_path, optimizer, ranks=True) <= expected


@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
def test_no_more_often_for_masked_words(language_modelling, tmp_path, optimizer):
    """Their criterion counts its sentences on the device."""
    expected = reads(language_modelling, tmp_path, "adam", criterion="masked_lm")
    found = reads(language_modelling, tmp_path, optimizer, criterion="masked_lm")
    assert 0 < found <= expected


def test_figures_come_to_the_host_as_they_were():
    """Their types stay; what is on the host, or no single number, is left alone."""
    words, real = torch.tensor([1.0, 2.0]), torch.tensor(0.1)
    figures = [[{"loss": real, "n": torch.tensor(7), "name": "x", "words": words}], 3]
    (log,), size = step_metrics.on_host(figures)
    assert size == 3 and log["name"] == "x" and log["words"] is words
    assert log["loss"].dtype == torch.float32 and torch.equal(log["loss"], real)
    assert log["loss"] is not real and log["n"].dtype == torch.int64 and log["n"] == 7


def test_a_read_is_seen(classification, tmp_path):
    """Where the norm of the ascent gradient is read it is counted."""
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "sam_adam")
    trainer = tiny.build_trainer(argv)
    counter = CountReads(trainer.get_model())
    with counter:
        float(next(trainer.get_model().parameters()).norm())
    assert counter.reads == {"aten::_local_scalar_dense": 1}
