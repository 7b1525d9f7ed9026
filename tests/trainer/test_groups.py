"""m-sharpness (--sam-micro): groups of M sentences with a perturbation each, in fairseq's step."""

import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.logging import metrics

from deltasam_fairseq.algorithms.reference import m_sharpness_reference
from deltasam_fairseq.config_checks import check_config
from deltasam_fairseq.optim import sharpness_aware
from deltasam_fairseq.trainer.groups import GroupedAscents
from tests.helpers import runs, tiny
from tests.helpers.twin import RHO, Twin, trainer_of


def build(data, folder, *more):
    argv = tiny.arguments(data, folder, "--optimizer", "sam_adam", "--dropout", "0.1", *more)
    return tiny.build_trainer(argv)


def trained(data, folder, *more):
    trainer = build(data, folder, *more)
    samples = tiny.batches(trainer)
    with metrics.aggregate() as log:
        for micro_batches in (samples[:1], samples[1:3]):
            trainer.train_step(micro_batches)
    return trainer, log.get_smoothed_values()


def end(trainer):
    return torch.cat([w.flatten() for w in tiny.weights(trainer)])


class MicroTwin(Twin):
    group = 1

    def gradient(self, samples):
        return m_sharpness_reference(self.losses(samples), self.w, RHO, self.group)


@pytest.mark.parametrize("m", [1, 3, 8])
def test_updates_equal_the_twin(classification, tmp_path, m):
    """M = 1 is per-instance perturbation, groups of 3 cross the micro-batches of 8; last ragged.

    Bound: float64 rounding, through Adam, over four updates, of 1 and of 2 micro-batches.
    """
    trainer = trainer_of(classification, tmp_path, "sam_adam", "--sam-micro", str(m))
    twin = MicroTwin(trainer, "sam")
    twin.group, whole = m, Twin(trainer, "sam")
    samples = tiny.batches(trainer) * 2
    for micro_batches in (samples[:1], samples[1:3], samples[3:4], samples[4:6]):
        trainer.train_step(micro_batches)
        twin.step(micro_batches)
        whole.step(micro_batches)
    assert (end(trainer) - twin.w).abs().max() < 1e-9
    assert (end(trainer) - whole.w).abs().max() > 1e-6


def test_split_into_micro_batches_does_not_matter(classification, tmp_path):
    ends = []
    for sizes in ((32,), (5, 13, 13, 1)):
        trainer = trainer_of(classification, tmp_path, "sam_adam", "--sam-micro", "4")
        tiny.batches(trainer)
        dataset, at, samples = trainer.task.dataset("train"), 0, []
        for size in sizes:
            samples.append(dataset.collater([dataset[i] for i in range(at, at + size)]))
            at += size
        trainer.train_step(samples)
        ends.append(end(trainer))
    assert (ends[0] - ends[1]).abs().max() < 1e-10


@pytest.mark.parametrize(
    "more",
    [[], ["--sam-adaptive"], ["--sam-only", "layer_norm"], ["--bf16"], ["--fp16"]],
    ids=" ".join,
)
def test_one_group_is_sam_bitwise(classification, tmp_path, more):
    """With dropout, of one micro-batch and of two; the figures of the log too."""
    sam, of_sam = trained(classification, tmp_path, *more)
    for m in ("16", "1000"):
        micro, log = trained(classification, tmp_path, "--sam-micro", m, *more)
        assert torch.equal(end(micro), end(sam))
        assert log.keys() == of_sam.keys()
        for key in ("loss", "sam_loss", "sharpness", "ascent_gnorm", "gnorm"):
            assert float(log[key]) == pytest.approx(float(of_sam[key])), key
    other, _ = trained(classification, tmp_path, "--sam-micro", "2", *more)
    assert not torch.equal(end(other), end(sam))


def test_resumed_is_uninterrupted_bitwise(classification, tmp_path):
    options = ["--optimizer", "sam_adam", "--sam-micro", "3", "--update-freq", "2"]
    whole = runs.train(classification, tmp_path / "whole", *options, "--max-update", "4")
    folder = tmp_path / "parts"
    runs.train(classification, folder, *options, "--max-update", "3")
    runs.assert_same_end(whole, runs.train(classification, folder, *options, "--max-update", "4"))
    assert float(whole.updates[-1]["ascent_gnorm"]) > 0


def fail_at(trainer, call, error):
    """Have the ``call``-th pass over a group raise: 1 and 3 are ascents, 2 and 4 descents."""
    original, calls = trainer.task.train_step, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    trainer.task.train_step = failing


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")], ids=repr)
def test_errors_leave_w(classification, tmp_path, call, error):
    """crash.pt, which fairseq saves of some errors, has w too."""
    trainer = build(classification, tmp_path, "--sam-micro", "4")
    samples, before = tiny.batches(trainer), tiny.weights(trainer)
    fail_at(trainer, call, error)
    with pytest.raises(type(error)):
        trainer.train_step(samples[:1])
    assert all(map(torch.equal, tiny.weights(trainer), before))
    assert not sharpness_aware(trainer.optimizer).core.weights.moved
    if isinstance(error, ValueError):
        saved = tiny.checkpoint_weights(tmp_path / "crash.pt")
        model = dict(trainer.get_model().named_parameters())
        assert all(torch.equal(saved[name], p) for name, p in model.items())


def test_out_of_memory_in_the_second_ascent_skips_the_batch(classification, tmp_path):
    trainer = build(classification, tmp_path, "--sam-micro", "4")
    samples, before = tiny.batches(trainer), tiny.weights(trainer)
    fail_at(trainer, 3, RuntimeError("CUDA out of memory"))
    assert trainer.train_step(samples[:1]) is None
    assert all(map(torch.equal, tiny.weights(trainer), before))
    assert trainer.train_step(samples[:1]) is not None and trainer.get_num_updates() == 1


def test_nan_in_the_second_group_stops_as_fairseq_does(classification, tmp_path):
    """Also fairseq's second pass, which looks for the NaN."""
    trainer = build(classification, tmp_path, "--sam-micro", "4")
    samples, before = tiny.batches(trainer), tiny.weights(trainer)
    original, calls = trainer.task.train_step, []

    def spoilt(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            next(p for p in trainer._trainable() if p.grad is not None).grad.fill_(float("nan"))
        return result

    trainer.task.train_step = spoilt
    with pytest.raises(FloatingPointError):
        trainer.train_step(samples[:1])
    assert all(map(torch.equal, tiny.weights(trainer), before))


def test_overflow_in_fp16_is_skipped(classification, tmp_path):
    more = ["--sam-micro", "4", "--memory-efficient-fp16", "--fp16-scale-window", "1"]
    trainer = build(classification, tmp_path, *more)
    samples, before = tiny.batches(trainer), tiny.weights(trainer)
    original = trainer.task.train_step

    def overflowing(*args, **kwargs):
        result = original(*args, **kwargs)
        next(p for p in trainer._trainable() if p.grad is not None).grad.fill_(float("inf"))
        return result

    trainer.task.train_step = overflowing
    assert trainer.train_step(samples[:1]) is None
    assert all(map(torch.equal, tiny.weights(trainer), before))
    trainer.task.train_step = original
    assert trainer.train_step(samples[:1]) is not None


@pytest.mark.parametrize("criterion", ["masked_lm", "sentence_ranking", "cross_entropy"])
def test_other_tasks(data_of, tmp_path, criterion):
    argv = tiny.arguments(
        data_of[criterion],
        tmp_path,
        *("--optimizer", "sam_adam", "--sam-micro", "3"),
        criterion=criterion,
    )
    trainer = tiny.build_trainer(argv)
    log = trainer.train_step(tiny.batches(trainer)[:2])
    assert torch.isfinite(torch.as_tensor(log["loss"]))


def test_one_sentence(classification, tmp_path):
    trainer = build(classification, tmp_path, "--sam-micro", "4")
    log = trainer.train_step(tiny.batches(trainer, 1)[:1])
    assert torch.isfinite(torch.as_tensor(log["loss"]))


def test_losses_that_depend_on_other_sentences_are_refused(classification, tmp_path, monkeypatch):
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "sam_adam", "--sam-micro", "4")
    cfg = runs.parse(argv)
    check_config(cfg)
    criterion = CRITERION_REGISTRY["sentence_prediction"]
    monkeypatch.setattr(criterion, "sentences_are_independent", False, raising=False)
    with pytest.raises(ValueError, match="--sam-micro 4 .*--criterion sentence_prediction.*drop"):
        check_config(cfg)


@pytest.mark.parametrize(
    "words, accepted",
    [
        (["--ddp-backend", "legacy_ddp"], True),
        (["--ddp-backend", "pytorch_ddp", "--find-unused-parameters"], True),
        (["--ddp-backend", "pytorch_ddp"], False),
        (
            ["--ddp-backend", "pytorch_ddp", "--find-unused-parameters", "--broadcast-buffers"],
            False,
        ),
    ],
)
def test_wrappers_that_communicate_in_forwards_are_refused(
    classification, tmp_path, monkeypatch, words, accepted
):
    """Ranks have different groups, and would wait for each other."""
    trainer = trainer_of(classification, tmp_path, "sam_adam", "--sam-micro", "4", *words)
    args = (trainer, sharpness_aware(trainer.optimizer), trainer._ascent_step._weights)
    monkeypatch.setattr(type(trainer), "data_parallel_world_size", 2)
    if accepted:
        GroupedAscents(*args)
        return
    with pytest.raises(ValueError, match="--sam-micro 4: .*use --ddp-backend legacy_ddp"):
        GroupedAscents(*args)
