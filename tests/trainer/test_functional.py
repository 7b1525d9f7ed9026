"""Functional SAM: reduces to SAM and the base optimizer, equals a plain twin, refuses others."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

from deltasam_fairseq.algorithms.reference import functional_reference
from tests.helpers import tiny
from tests.helpers.parameter_criterion import ParameterCriterion
from tests.helpers.twin import RHO, Twin, functional_call, trainer_of

FUNCTIONAL = ["--sam-functional"]


def end(trainer):
    return parameters_to_vector(list(trainer.get_model().parameters())).detach()


def trained(trainer, micro_batches=1, updates=2):
    samples = tiny.batches(trainer) * micro_batches
    for at in range(0, updates * micro_batches, micro_batches):
        trainer.train_step(samples[at : at + micro_batches])
    return end(trainer)


class FunctionalTwin(Twin):
    def gradient(self, samples):
        def outputs(w):
            found = []
            for sample in samples:
                kwargs = dict(sample["net_input"], features_only=True)
                kwargs["classification_head_name"] = "sentence_classification_head"
                found.append(functional_call(self.model, self.unflatten(w), (), kwargs)[0])
            return torch.cat(found)

        targets = torch.cat([sample["target"].view(-1) for sample in samples])
        loss = lambda z: F.cross_entropy(z, targets)  # noqa: E731
        return functional_reference(outputs, loss, self.w, RHO)


@pytest.mark.parametrize("update_freq", [1, 2])
def test_updates_equal_the_twin(classification, tmp_path, update_freq):
    """Five updates; bound: float64 rounding, through Adam."""
    trainer = trainer_of(classification, tmp_path, "sam_adam", *FUNCTIONAL)
    twin, samples = FunctionalTwin(trainer, "functional"), tiny.batches(trainer) * 3
    for at in range(0, 5 * update_freq, update_freq):
        trainer.train_step(samples[at : at + update_freq])
        twin.step(samples[at : at + update_freq])
    assert (end(trainer) - twin.w).abs().max() < 1e-9
    sam = trainer_of(classification, tmp_path, "sam_adam")
    for at in range(0, 5 * update_freq, update_freq):
        sam.train_step(samples[at : at + update_freq])
    assert (end(sam) - twin.w).abs().max() > 1e-5


CRITERIONS = [
    *("sentence_prediction", "plain", "distill", "sentence_ranking", "masked_lm"),
    *("cross_entropy", "label_smoothed_cross_entropy", "seq2seq_distill", "span_prediction"),
]


@pytest.mark.parametrize("criterion", CRITERIONS)
@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
def test_next_to_no_perturbation_is_the_base_optimizer(data_of, tmp_path, optimizer, criterion):
    """With dropout, accumulated. Bound: rounding through Adam's first steps of 1e-3."""
    ends = []
    for more in (["--optimizer", optimizer, "--sam-rho", "1e-7", *FUNCTIONAL], []):
        argv = tiny.arguments(data_of[criterion], tmp_path, "--dropout", "0.1", criterion=criterion)
        trainer = tiny.build_trainer([*argv, "--adam-eps", "1e-4", *more])
        ends.append(trained(trainer, micro_batches=2))
    assert (ends[0] - ends[1]).abs().max() < 1e-4
    assert (ends[0] - ends[1]).norm() < 1e-2 * (ends[0] - end(tiny.build_trainer(argv))).norm()


def test_rho_zero_is_the_base_optimizer_bitwise(classification, tmp_path):
    ends = []
    for more in (["--optimizer", "sam_adam", "--sam-rho", "0", *FUNCTIONAL], []):
        argv = tiny.arguments(classification, tmp_path, "--dropout", "0.1", *more)
        ends.append(trained(tiny.build_trainer(argv)))
    assert torch.equal(*ends)


def test_the_ascent_is_sams_bitwise_and_so_is_the_log(classification, tmp_path):
    """Loss, accuracy and sam_loss of a first update do not depend on the gradient of the step."""
    logs, seen = [], []
    for more in (FUNCTIONAL, []):
        argv = tiny.arguments(classification, tmp_path, "--optimizer", "sam_adam", *more)
        trainer = tiny.build_trainer([*argv, "--dropout", "0.1"])
        core = trainer.optimizer.core
        ascend = core.ascend

        def recording(params, *args):
            found = ascend(params, *args)  # noqa: B023
            seen.append(torch.cat([p.data.flatten() for p in params]))
            return found

        core.ascend = recording
        trainer.train_step(tiny.batches(trainer)[:1])
        logs.append(tiny.metrics.get_smoothed_values("train"))
    assert torch.equal(*seen)
    for key in ("loss", "accuracy", "sam_loss", "sharpness", "ascent_gnorm"):
        assert logs[0][key] == logs[1][key], key
    assert logs[0]["gnorm"] != logs[1]["gnorm"]


@pytest.mark.parametrize(
    "mode", [["--memory-efficient-fp16"], ["--bf16"], ["--fp16", "--fp16-no-flatten-grads"]]
)
def test_half_precision(classification, tmp_path, mode):
    """The gradient's norm is float32's, with a loss scale; that of SAM is another."""
    norms = {}
    for name, more in (("half", [*mode, *FUNCTIONAL]), ("exact", FUNCTIONAL), ("sam", [])):
        options = ["--optimizer", "sam_adam", "--fp16-init-scale", "32", "--sam-rho", "1", *more]
        trainer = tiny.build_trainer(tiny.arguments(classification, tmp_path, *options))
        trained(trainer, micro_batches=2, updates=1)
        norms[name] = tiny.metrics.get_smoothed_values("train")["gnorm"]
    assert norms["half"] == pytest.approx(norms["exact"], rel=0.05)
    assert abs(norms["sam"] / norms["exact"] - 1) > 0.1


@pytest.mark.parametrize("criterion", ["r3f", "freelb"])
def test_other_criterions_are_refused(data_of, tmp_path, criterion, capsys):
    argv = tiny.arguments(data_of[criterion], tmp_path, criterion=criterion)
    with pytest.raises(SystemExit):
        tiny.build_trainer([*argv, "--optimizer", "sam_adam", *FUNCTIONAL])
    error = capsys.readouterr().err
    assert f"--criterion {criterion} cannot be combined with --sam-functional" in error
    assert "loss_of_output = True" in error


def test_loss_that_depends_on_other_weights_is_refused(classification, tmp_path, monkeypatch):
    monkeypatch.setattr(ParameterCriterion, "loss_of_output", True, raising=False)
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "sam_adam", *FUNCTIONAL)
    trainer = tiny.build_trainer([*argv, "--criterion", "parameter_criterion"])
    before = end(trainer)
    with pytest.raises(ValueError, match="--sam-functional: the loss of .* beside the model's lo"):
        trainer.train_step(tiny.batches(trainer)[:1])
    assert torch.equal(end(trainer), before) and "forward" not in vars(trainer.get_criterion())
