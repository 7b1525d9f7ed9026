"""The Fisher mask: reduces to SAM, equals a plain twin, is renewed when it should be."""

import numpy as np
import pytest
import torch
from fairseq.logging import metrics
from torch.nn.utils import parameters_to_vector

from deltasam_fairseq.algorithms.reference import fisher_reference, gradient, perturbation
from deltasam_fairseq.optim import sharpness_aware
from tests.helpers import tiny
from tests.helpers.twin import RHO, Twin, trainer_of

EVERY = 3
FISHER = ["--sam-mask", "fisher", "--sam-mask-share", "0.05", "--sam-mask-every", str(EVERY)]


def end(trainer):
    return parameters_to_vector(list(trainer.get_model().parameters())).detach()


class FisherTwin(Twin):
    def eps_star(self, losses):
        if self.updates % EVERY == 0:
            self.mask = fisher_reference(losses, self.w, 0.05)
        n = len(losses(self.w))
        uniform = torch.full((n,), 1.0 / n, dtype=torch.float64)
        return perturbation(self.mask * gradient(losses, self.w, uniform), RHO)


@pytest.mark.parametrize("update_freq", [1, 2])
def test_updates_equal_the_twin(classification, tmp_path, update_freq):
    """Five updates, two masks; bound: float64 rounding, through Adam."""
    trainer = trainer_of(classification, tmp_path, "sam_adam", *FISHER)
    twin, samples = FisherTwin(trainer, "fisher"), tiny.batches(trainer) * 3
    for at in range(0, 5 * update_freq, update_freq):
        trainer.train_step(samples[at : at + update_freq])
        twin.step(samples[at : at + update_freq])
    assert (end(trainer) - twin.w).abs().max() < 1e-9
    share = metrics.get_smoothed_values("train")["sam_mask_share"]
    assert share == pytest.approx(twin.mask.double().mean().item(), abs=1e-4)


def epsilons(trainer):
    """Note w + eps* - w of every ascent."""
    core, seen = sharpness_aware(trainer.optimizer).core, []
    ascend = core.ascend

    def recording(params, *args):
        before = torch.cat([p.data.flatten() for p in params])
        found = ascend(params, *args)
        seen.append(torch.cat([p.data.flatten() for p in params]) - before)
        return found

    core.ascend = recording
    return seen


@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
@pytest.mark.parametrize("more", [[], ["--sam-adaptive", "--sam-rho", "0.5"]])
def test_share_1_is_the_method_without_a_mask_bitwise(classification, tmp_path, optimizer, more):
    """A weight whose gradient was 0 stays masked: with one update there is no difference."""
    ends = []
    for mask in (["--sam-mask", "fisher", "--sam-mask-share", "1"], []):
        argv = tiny.arguments(classification, tmp_path, "--optimizer", optimizer, *mask, *more)
        trainer = tiny.build_trainer([*argv, "--dropout", "0.1"])
        trainer.train_step(tiny.batches(trainer)[:2])
        ends.append(end(trainer))
    assert torch.equal(*ends)


@pytest.mark.parametrize("criterion", ["sentence_prediction", "masked_lm", "r3f", "no_sentences"])
@pytest.mark.parametrize("mode", [[], ["--memory-efficient-fp16"], ["--bf16"]], ids=str)
def test_a_share_of_the_weights_moves_by_rho(data_of, tmp_path, criterion, mode, monkeypatch):
    """The norm is that of what moves; without per-sentence losses the batch's gradient chooses."""
    if criterion == "no_sentences":
        criterion = "sentence_prediction"
        for module in ("trainer.ascent", "trainer.sharpness_aware"):
            name = f"deltasam_fairseq.{module}.has_per_sentence_losses"
            monkeypatch.setattr(name, lambda _: False)
    argv = tiny.arguments(data_of[criterion], tmp_path, criterion=criterion)
    argv += ["--optimizer", "sam_adam", *FISHER, *mode, "--fp16-init-scale", "4"]
    trainer = tiny.build_trainer([*argv, "--dropout", "0.1"])
    seen, samples = epsilons(trainer) if trainer.optimizer else [], tiny.batches(trainer)
    masks = []
    for i in range(4):
        trainer.train_step([samples[i % len(samples)]])
        masks.append(sharpness_aware(trainer.optimizer).core.parts.mask.state_dict()["bits"])
    mask = sharpness_aware(trainer.optimizer).core.parts.mask
    state = mask.state_dict()
    assert state["weights"] == seen[0].numel()
    mask.load_state_dict(state)
    trainer.train_step(samples[:1])  # not renewed
    assert torch.equal(mask.state_dict()["bits"], state["bits"])
    for eps in seen:
        # rounding to half precision takes a little of it
        assert eps.double().norm().item() == pytest.approx(RHO, rel=0.3 if mode else 1e-3)
        assert 0 < (eps != 0).double().mean() <= 0.051
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])


def test_gradient_that_is_not_finite_keeps_the_mask(classification, tmp_path):
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "sam_adam", *FISHER)
    trainer = tiny.build_trainer([*argv, "--sam-mask-every", "1"])
    samples, mask = tiny.batches(trainer), sharpness_aware(trainer.optimizer).core.parts.mask
    trainer.train_step(samples[:1])
    before = mask.state_dict()
    norm = trainer.get_model().encoder.sentence_encoder.layers[0].final_layer_norm
    handle = norm.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match="Nan/Inf"):
        trainer.train_step(samples[1:2])
    after = mask.state_dict()
    assert torch.equal(before["bits"], after["bits"]) and after["renewed"] == 0
    handle.remove()
    trainer.train_step(samples[1:2])
    assert mask.state_dict()["renewed"] == 1


def test_a_state_that_is_not_needed_yet_is_saved_again(classification, tmp_path):
    trainer = trainer_of(classification, tmp_path, "sam_adam", *FISHER)
    mask = sharpness_aware(trainer.optimizer).core.parts.mask
    trainer.train_step(tiny.batches(trainer)[:1])
    state = mask.state_dict()
    mask.load_state_dict(state)
    again = mask.state_dict()
    assert again["renewed"] == 0 and torch.equal(again["bits"], state["bits"])


def test_state_of_another_model_is_not_used(classification, tmp_path):
    trainer = trainer_of(classification, tmp_path, "sam_adam", *FISHER)
    mask = sharpness_aware(trainer.optimizer).core.parts.mask
    bits = torch.from_numpy(np.packbits(np.ones(9, dtype=bool)))
    mask.load_state_dict({"bits": bits, "weights": 9, "renewed": 0})
    trainer.train_step(tiny.batches(trainer)[:1])
    assert mask.state_dict()["weights"] > 9
