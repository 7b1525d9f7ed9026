"""TRAM: equals a plain twin; every criterion that it takes; reduces to ASAM; its refusals."""

import pytest
import torch
from fairseq.logging import metrics
from torch.nn.utils import parameters_to_vector

from deltasam_fairseq.algorithms.reference import tram_reference
from deltasam_fairseq.criterions.embeddings import WordEmbeddings
from deltasam_fairseq.optim import sharpness_aware
from tests.helpers import same_noise, tiny
from tests.helpers.twin import Twin, functional_call, trainer_of

SIGMA = 0.5
TRAM = ["--sam-radius", "trust_region", "--sam-trust-sigma", str(SIGMA)]
THETA = ["--sam-radius", "trust_region_theta"]


def end(trainer):
    return parameters_to_vector(list(trainer.get_model().parameters())).detach()


class TRAMTwin(Twin):
    def step(self, samples):
        self.samples = samples
        super().step(samples)

    def logits(self, sample, noised):
        kwargs = dict(sample["net_input"], features_only=True)
        kwargs["classification_head_name"] = "sentence_classification_head"
        tokens, embeddings = kwargs["src_tokens"], WordEmbeddings(self.model)
        size = (embeddings.padding_idx, 16, torch.float64)
        delta = SIGMA * noised * same_noise.content_noise(tokens, *size)
        with embeddings.perturbed(tokens, delta), torch.no_grad():
            return functional_call(self.model, self.unflatten(self.w), (), kwargs)[0]

    def eps_star(self, losses):
        sums = [
            torch.softmax(p, 1) * (torch.log_softmax(p, 1) - torch.log_softmax(q, 1))
            for p, q in ((self.logits(s, 1.0), self.logits(s, 0.0)) for s in self.samples)
        ]
        self.d = torch.cat(sums).sum(1).mean()
        return tram_reference(losses, self.w, self.d)


class ThetaTwin(TRAMTwin):
    """d of the outputs at the weights before the last update; 0 in the first."""

    before = None

    def step(self, samples):
        w = self.w
        super().step(samples)
        self.before = w

    def logits(self, sample, moved):
        w = self.w
        self.w = self.before if moved and self.before is not None else w
        found, self.w = super().logits(sample, 0.0), w
        return found


@pytest.mark.parametrize("update_freq", [1, 2])
@pytest.mark.parametrize("options, of", [(TRAM, TRAMTwin), (THETA, ThetaTwin)], ids=["x", "theta"])
def test_updates_equal_the_twin(classification, tmp_path, monkeypatch, update_freq, options, of):
    """Five updates, with noise that depends on the words. Bound: float64 rounding, through Adam."""
    same_noise.use(monkeypatch.setattr)
    trainer = trainer_of(classification, tmp_path, "sam_adam", *options)
    twin, samples = of(trainer, "tram"), tiny.batches(trainer) * 3
    for at in range(0, 5 * update_freq, update_freq):
        trainer.train_step(samples[at : at + update_freq])
        twin.step(samples[at : at + update_freq])
    assert (end(trainer) - twin.w).abs().max() < 1e-9
    assert float(sharpness_aware(trainer.optimizer).core.rho) == pytest.approx(twin.d.item())
    assert twin.d > (1e-4 if options is TRAM else 1e-5)
    plain = trainer_of(classification, tmp_path, "adam")
    for at in range(0, 5 * update_freq, update_freq):
        plain.train_step(samples[at : at + update_freq])
    assert (end(plain) - twin.w).abs().max() > 1e-7


of_every_criterion = pytest.mark.parametrize(
    "criterion",
    [
        *("sentence_prediction", "plain", "distill", "sentence_ranking", "masked_lm"),
        *("label_smoothed_cross_entropy", "seq2seq_distill", "span_prediction"),
    ],
)


@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
@of_every_criterion
def test_every_criterion_trains(data_of, tmp_path, optimizer, criterion):
    """Larger noise moves the outputs further; the log has the radius."""
    found = []
    for sigma in ("0", "0.01", "1"):
        argv = tiny.arguments(data_of[criterion], tmp_path, "--dropout", "0", criterion=criterion)
        argv += ["--attention-dropout", "0", "--optimizer", optimizer, *TRAM]
        trainer = tiny.build_trainer([*argv, "--sam-trust-sigma", sigma])
        trainer.train_step(tiny.batches(trainer)[:2])
        found.append(metrics.get_smoothed_values("train")["sam_rho"])
        assert torch.isfinite(end(trainer)).all()
    assert found[0] == 0 and found[0] <= found[1] < found[2]


@pytest.mark.parametrize("lr", ["0", "1e-3"])
@of_every_criterion
def test_theta_of_every_criterion(data_of, tmp_path, lr, criterion):
    """d is 0 in the first update and where the last one moved nothing: the masks are the same."""
    argv = tiny.arguments(data_of[criterion], tmp_path, "--dropout", "0.3", criterion=criterion)
    trainer = tiny.build_trainer([*argv, "--lr", lr, "--optimizer", "sam_adam", *THETA])
    found, samples = [], tiny.batches(trainer) * 2
    for at in (0, 2):
        with metrics.aggregate() as log:
            trainer.train_step(samples[at : at + 2])
        found.append(log.get_smoothed_values()["sam_rho"])
    assert found[0] == 0 and (found[1] > 0) == (lr != "0")


def test_theta_knows_the_weights_before_an_update_without_ascent(classification, tmp_path):
    more = ["--optimizer", "delta_sam_adam", *THETA, "--sam-start-update", "1"]
    trainer = tiny.build_trainer(tiny.arguments(classification, tmp_path, *more))
    before = tiny.weights(trainer)
    trainer.train_step(tiny.batches(trainer)[:1])
    kept = sharpness_aware(trainer.optimizer).core.parts.radius.state_dict()["before_update"]
    assert all(map(torch.equal, [v for _, v in kept], before))
    trainer.train_step(tiny.batches(trainer)[:1])
    assert all(map(torch.equal, [v for _, v in kept], before))  # a saved state stays as it is
    assert metrics.get_smoothed_values("train")["sam_rho"] > 0


@pytest.mark.parametrize("criterion", ["sentence_prediction", "plain"])
def test_d_of_regression_is_the_mean_squared_difference(classification, tmp_path, criterion):
    argv = tiny.arguments(classification, tmp_path, "--dropout", "0", criterion=criterion)
    argv += ["--regression-target", "--num-classes", "1", "--attention-dropout", "0"]
    trainer = tiny.build_trainer([*argv, "--optimizer", "sam_adam", "--lr", "0.01", *THETA])
    first, second = tiny.batches(trainer)[:2]
    kwargs = {**second["net_input"], "features_only": True}
    kwargs["classification_head_name"] = "sentence_classification_head"
    outputs = []
    for sample in (first, second):
        with torch.no_grad():
            outputs.append(trainer.get_model()(**kwargs)[0])
        trainer.train_step([sample])
    d = (outputs[0] - outputs[1]).square().mean()
    found = float(sharpness_aware(trainer.optimizer).core.rho)
    assert found == pytest.approx(d.item(), rel=1e-4) and found > 1e-6


def test_no_noise_and_no_dropout_is_the_base_optimizer(classification, tmp_path):
    ends = []
    for more in (["--optimizer", "sam_adam", *TRAM, "--sam-trust-sigma", "0"], []):
        argv = tiny.arguments(classification, tmp_path, "--dropout", "0", *more)
        trainer = tiny.build_trainer([*argv, "--attention-dropout", "0"])
        trainer.train_step(tiny.batches(trainer)[:2])
        ends.append(end(trainer))
    assert torch.equal(*ends)


def test_noised_forward_has_masks_of_its_own(classification, tmp_path):
    """As the authors' code and R3F's; then the descent has those of the ascent again."""
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "sam_adam", *TRAM)
    trainer = tiny.build_trainer([*argv, "--dropout", "0.3"])
    drawn = []
    trainer.get_model().register_forward_pre_hook(
        lambda *_: drawn.append(torch.random.get_rng_state())
    )
    trainer.train_step(tiny.batches(trainer)[:1])
    ascent, noised, descent = drawn  # 3F + 2B
    assert torch.equal(ascent, descent) and not torch.equal(ascent, noised)


@pytest.mark.parametrize(
    "mode", [["--memory-efficient-fp16"], ["--fp16", "--fp16-no-flatten-grads"]], ids=" ".join
)
def test_theta_in_half_precision(classification, tmp_path, mode):
    """d of the second update is that of float32, after a first one of half a weight's size."""
    found = []
    for more in ([], [*mode, "--fp16-init-scale", "4"]):
        argv = tiny.arguments(classification, tmp_path, "--optimizer", "sam_adam", *THETA, *more)
        trainer = tiny.build_trainer([*argv, "--lr", "0.02"])
        for sample in tiny.batches(trainer)[:2]:
            with metrics.aggregate() as log:
                trainer.train_step([sample])
        found.append(log.get_smoothed_values()["sam_rho"])
    assert found[1] == pytest.approx(found[0], rel=0.1) and found[0] > 0.01


@pytest.mark.parametrize("mode", [["--memory-efficient-fp16"], ["--bf16"]], ids=str)
def test_half_precision(classification, tmp_path, mode, monkeypatch):
    """d is that of float32, and stochastic rounding leaves the weights moved by it."""
    same_noise.use(monkeypatch.setattr)
    found = []
    for more in ([], mode):
        argv = tiny.arguments(classification, tmp_path, "--optimizer", "sam_adam", *TRAM, *more)
        argv += ["--dropout", "0", "--attention-dropout", "0", "--sam-trust-sigma", "30"]
        trainer = tiny.build_trainer([*argv, "--fp16-init-scale", "4"])
        trainer.train_step(tiny.batches(trainer)[:1])
        found.append(metrics.get_smoothed_values("train"))
    assert found[1]["sam_rho"] == pytest.approx(found[0]["sam_rho"], rel=0.1)
    assert found[1]["sam_realised"] > 0.5  # of few weights, moved by less than they are rounded


@pytest.mark.parametrize("options", [TRAM, THETA], ids=["x", "theta"])
def test_other_criterions_are_refused(data_of, tmp_path, capsys, options):
    argv = tiny.arguments(data_of["r3f"], tmp_path, criterion="r3f")
    with pytest.raises(SystemExit):
        tiny.build_trainer([*argv, "--optimizer", "sam_adam", *options])
    error = capsys.readouterr().err
    assert f"cannot be combined with --sam-radius {options[1]}: its loss" in error
