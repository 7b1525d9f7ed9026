"""GSAM, and rho by schedule: reduces to SAM and to the base optimizer, and equals a plain twin."""

import pytest
import torch
from fairseq.logging import metrics
from torch.nn.utils import parameters_to_vector

from deltasam_fairseq.algorithms.reference import gsam_reference
from deltasam_fairseq.optim import sharpness_aware
from tests.helpers import tiny
from tests.helpers.twin import RHO, Twin, trainer_of

ALPHA, RHO_MIN = 0.4, 0.01
GSAM = ["--sam-gsam-alpha", str(ALPHA)]
ALONG_LR = ["--sam-rho-schedule", "lr", "--sam-rho-min", str(RHO_MIN)]
DECAY = ["--lr-scheduler", "polynomial_decay", "--total-num-update", "10", "--warmup-updates", "3"]
WARMUP = ["--sam-rho-schedule", "warmup", "--sam-rho-warmup-updates", "4"]


def end(trainer):
    return parameters_to_vector(list(trainer.get_model().parameters())).detach()


def trained(data, tmp_path, optimizer, *more, micro_batches=1, updates=4):
    """Float32, with dropout."""
    argv = tiny.arguments(data, tmp_path, "--optimizer", optimizer, "--dropout", "0.1", *more)
    trainer = tiny.build_trainer(argv)
    samples = tiny.batches(trainer) * micro_batches
    for at in range(0, updates * micro_batches, micro_batches):
        trainer.train_step(samples[at : at + micro_batches])
    return trainer


class ScheduledTwin(Twin):
    """Adam and GSAM with a learning rate that rises over 3 updates and falls to 0 at 10."""

    def gradient(self, samples):
        t = self.updates
        share = t / 3 if t < 3 else (10 - t) / 7
        self.lr = 1e-3 * share
        rho = RHO_MIN + (RHO - RHO_MIN) * share
        return gsam_reference(self.losses(samples), self.w, rho, ALPHA)


@pytest.mark.parametrize("update_freq", [1, 2])
def test_updates_equal_the_twin(classification, tmp_path, update_freq):
    """Seven updates; bound: float64 rounding, through Adam."""
    options = [*GSAM, *ALONG_LR, *DECAY]
    trainer = trainer_of(classification, tmp_path, "sam_adam", *options)
    twin, samples = ScheduledTwin(trainer, "gsam"), tiny.batches(trainer) * 4
    rhos = []
    for at in range(0, 7 * update_freq, update_freq):
        trainer.train_step(samples[at : at + update_freq])
        rhos.append(sharpness_aware(trainer.optimizer).core.rho)
        twin.step(samples[at : at + update_freq])
    assert (end(trainer) - twin.w).abs().max() < 1e-9
    assert rhos[3] == pytest.approx(RHO) and rhos[0] == pytest.approx(RHO_MIN)
    plain = trainer_of(classification, tmp_path, "sam_adam", *ALONG_LR, *DECAY)
    for at in range(0, 7 * update_freq, update_freq):
        plain.train_step(samples[at : at + update_freq])
    assert (end(plain) - twin.w).abs().max() > 1e-6  # alpha matters


@pytest.mark.parametrize(
    "more",
    [
        ["--sam-gsam-alpha", "0"],
        ["--sam-rho-schedule", "lr"],  # the learning rate is constant
        [*ALONG_LR, *DECAY, "--sam-rho-min", "0.05"],
        [*WARMUP, "--sam-rho-min", "0.05"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
def test_reduces_to_the_method_without_it_bitwise(classification, tmp_path, optimizer, more):
    lr = DECAY if "--lr-scheduler" in more else []
    one = trained(classification, tmp_path, optimizer, *more)
    other = trained(classification, tmp_path, optimizer, *lr)
    assert torch.equal(end(one), end(other))


@pytest.mark.parametrize("more", [GSAM, ALONG_LR[:2], WARMUP])
def test_rho_zero_is_the_base_optimizer_bitwise(classification, tmp_path, more):
    one = trained(classification, tmp_path, "sam_adam", *more, "--sam-rho", "0")
    assert torch.equal(end(one), end(trained(classification, tmp_path, "adam")))


@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
@pytest.mark.parametrize("adaptive", [[], ["--sam-adaptive"]])
def test_warmup(classification, tmp_path, optimizer, adaptive):
    """From 0, an update of the base optimizer, in four updates after --sam-start-update."""
    more = [*WARMUP, "--sam-start-update", "1", *adaptive]
    argv = tiny.arguments(classification, tmp_path, "--optimizer", optimizer, *more)
    trainer = tiny.build_trainer(argv)
    core, logged = sharpness_aware(trainer.optimizer).core, []
    for sample in tiny.batches(trainer) * 2:
        metrics.reset_meters("train")
        trainer.train_step([sample])
        log = metrics.get_smoothed_values("train")
        logged.append(log.get("sam_rho"))
        assert ("sam_rho" in log) == ("sam_loss" in log)
        assert "sam_rho" not in log or log["sam_rho"] == pytest.approx(core.rho, abs=1e-6)
    assert logged[:2] == [None, None]
    assert logged[2:] == pytest.approx([RHO / 4, RHO / 2, 3 * RHO / 4, RHO, RHO, RHO])


def test_the_log_says_the_rho_in_force(classification, tmp_path):
    options = [*WARMUP, "--sam-rho-min", "0.01"]
    trainer = trainer_of(classification, tmp_path, "sam_adam", *options)
    trainer.train_step(tiny.batches(trainer)[:1])
    assert metrics.get_smoothed_values("train")["sam_rho"] == pytest.approx(0.01)
    assert "0.05, from 0.01 on in 4 updates" in sharpness_aware(trainer.optimizer).describe()


def test_gsam_is_scaled_as_the_batch(classification, tmp_path):
    """g and g_p are in the same units whatever the number of sentences and micro-batches."""
    ends = []
    for size in (8, 32):
        trainer = trainer_of(classification, tmp_path, "sam_adam", *GSAM)
        for _ in range(3):
            trainer.train_step(tiny.batches(trainer, size))
        ends.append(end(trainer))
    assert (ends[0] - ends[1]).abs().max() < 1e-10


HALF = [
    *([], ["--memory-efficient-fp16"], ["--memory-efficient-bf16"], ["--bf16"]),
    ["--fp16", "--fp16-no-flatten-grads"],
]


@pytest.mark.parametrize("mode", HALF, ids=" ".join)
def test_half_precision(classification, tmp_path, mode):
    """With a loss scale: the correction is exact but for one rounding, its units those of the step.

    The share of the gradient at w that is orthogonal to the one at w + eps* is that of float32 up
    to the rounding of the gradients and of eps*.
    """
    options = ["--optimizer", "sam_adam", "--fp16-init-scale", "32", "--dropout", "0", *mode]
    options += ["--sam-gsam-alpha", "2", "--sam-rho", "0.5", "--attention-dropout", "0"]
    trainer = tiny.build_trainer(tiny.arguments(classification, tmp_path, *options))
    descent, seen = sharpness_aware(trainer.optimizer).core.parts.descent, []
    correct_ = descent.correct_

    def flat(tensors):
        return torch.cat([t.double().flatten() for t in tensors])

    def recording(grads):
        clean = flat([descent._clean.get(p, torch.zeros_like(p)) for p in grads])
        before = flat(grads.values())
        correct_(grads)
        seen.append((clean, before, flat(grads.values()), next(iter(grads.values())).dtype))

    descent.correct_ = recording
    trainer.train_step(tiny.batches(trainer)[:2])
    ((g, g_p, found, dtype),) = seen
    g_perp = g - (g @ g_p) / (g_p @ g_p) * g_p
    expected = g_p - 2 * g_perp
    assert (found - expected).norm() < 2 * torch.finfo(dtype).eps * expected.norm()
    # 2.522 in float32; g and g_p of other scales would give other figures
    assert (g_perp.norm() / g_p.norm()).item() == pytest.approx(2.522, rel=0.05)
    scale = 32 if "--fp16" in mode or "--memory-efficient-fp16" in mode else 1
    assert (g.norm() / scale / 16).item() == pytest.approx(5.406, rel=0.05)
