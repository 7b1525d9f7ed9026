"""What every registered sharpness-aware optimizer and every per-sentence criterion must do.

A new one is under test by being registered.
"""

import copy

import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.optim import OPTIMIZER_REGISTRY

from deltasam_fairseq.criterions import has_per_sentence_losses, per_sentence_losses
from deltasam_fairseq.optim import SharpnessAwareOptimizer, sharpness_aware
from tests.helpers import tiny

OPTIMIZERS = sorted(
    name for name, cls in OPTIMIZER_REGISTRY.items() if issubclass(cls, SharpnessAwareOptimizer)
)
CRITERIONS = sorted(
    name
    for name, cls in CRITERION_REGISTRY.items()
    # not those that other tests register
    if has_per_sentence_losses(cls) and not cls.__module__.startswith("tests.")
)
OWN = set("freelb plain r3f r_drop smart vat distill".split())
OWN |= {"seq2seq_r3f", "seq2seq_r_drop", "seq2seq_distill"}
OWN |= {"span_prediction", "nt_xent", "nt_xent_r3f"}
NEEDS_APEX = {"sam_lamb", "delta_sam_lamb"}


def optimizer_trainer(data, tmp_path, name, *more):
    if name in NEEDS_APEX:
        pytest.importorskip("apex", reason=f"{name}: fairseq's lamb is apex's")
    argv = tiny.arguments(data, tmp_path, "--optimizer", name, "--dropout", "0.1", *more)
    return tiny.build_trainer(argv)


def train(trainer, updates=3):
    for sample in tiny.batches(trainer)[:updates]:
        trainer.train_step([sample])
    return tiny.weights(trainer)


def equal(some, others):
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others))


def test_every_base_optimizer_has_its_two_wrappers():
    bases = "adam adadelta adafactor adagrad adamax lamb nag sgd".split()
    assert sorted(OPTIMIZERS) == sorted(f"{p}_{b}" for p in ("sam", "delta_sam") for b in bases)


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestOptimizer:
    def test_trains_and_goes_elsewhere_than_its_base(self, classification, tmp_path, name):
        trainer = optimizer_trainer(classification, tmp_path, name)
        start = tiny.weights(trainer)
        end = train(trainer)
        assert all(torch.isfinite(w).all() for w in end)
        base = name.replace("delta_sam_", "").replace("sam_", "")
        plain = optimizer_trainer(classification, tmp_path, base)
        assert equal(tiny.weights(plain), start)
        assert not equal(train(plain), end) and not equal(start, end)

    def test_rho_zero_is_its_base_bitwise(self, classification, tmp_path, name):
        base = name.replace("delta_sam_", "").replace("sam_", "")
        zero = optimizer_trainer(classification, tmp_path, name, "--sam-rho", "0")
        assert equal(train(zero), train(optimizer_trainer(classification, tmp_path, base)))

    def test_forward_sees_other_weights_and_update_starts_at_its_own(
        self, classification, tmp_path, name
    ):
        """With a learning rate of 0 the weights are bitwise the same after the update."""
        trainer = optimizer_trainer(classification, tmp_path, name, "--lr", "0")
        before, seen = tiny.weights(trainer), []
        trainer.get_model().register_forward_pre_hook(lambda *_: seen.append(tiny.weights(trainer)))
        trainer.train_step(tiny.batches(trainer)[:1])
        assert any(not equal(weights, before) for weights in seen)
        assert equal(tiny.weights(trainer), before)

    def test_refuses_to_step_without_an_ascent(self, classification, tmp_path, name):
        trainer = optimizer_trainer(classification, tmp_path, name)
        sam = sharpness_aware(trainer.optimizer)
        with pytest.raises(RuntimeError, match="without an ascent.*--user-dir"):
            sam.step()

    def test_state_dict_is_that_of_its_base(self, classification, tmp_path, name):
        """So the wrapper adds nothing that a resumed run would miss; and it survives a trip."""
        trainer = optimizer_trainer(classification, tmp_path, name)
        train(trainer)
        sam = sharpness_aware(trainer.optimizer)
        state = copy.deepcopy(sam.state_dict())
        assert state["state"].keys() == sam.base.state_dict()["state"].keys()
        other = optimizer_trainer(classification, tmp_path, name)
        other.optimizer.load_state_dict(state)
        torch.testing.assert_close(
            dict(other.optimizer.state_dict()["state"]), dict(state["state"]), rtol=0, atol=0
        )


def test_every_criterion_is_registered():
    assert set(CRITERIONS) >= OWN


@pytest.mark.parametrize("name", CRITERIONS)
class TestCriterion:
    def setup_run(self, data_of, tmp_path, name, optimizer="adam"):
        argv = tiny.arguments(
            data_of[name], tmp_path, "--optimizer", optimizer, "--dropout", "0.1", criterion=name
        )
        trainer = tiny.build_trainer(argv)
        model, criterion = trainer.get_model(), trainer.get_criterion()
        if hasattr(criterion, "before_update"):  # what the trainer says before it calls forward
            criterion.before_update(model, lambda: dict(model.named_parameters()), 0, 1.0)
        return trainer, model, criterion, tiny.batches(trainer)[0]

    def test_losses_add_up_to_the_criterions_own(self, data_of, tmp_path, name):
        """Value, gradient, sample size and logging output, under the same dropout masks."""
        _, model, criterion, sample = self.setup_run(data_of, tmp_path, name)
        results = []
        for forward in (criterion, lambda *a: per_sentence_losses(criterion, *a)):
            torch.manual_seed(1)
            model.zero_grad()
            loss, sample_size, log = forward(model, sample)
            assert loss.dim() == (0 if forward is criterion else 1)
            loss.sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            log = {k: torch.as_tensor(v).float() for k, v in log.items()}
            results.append((loss.sum().float(), torch.as_tensor(sample_size), log, grads))
        torch.testing.assert_close(results[1], results[0])

    def test_loss_of_a_sentence_is_its_loss_alone(self, data_of, tmp_path, name):
        """But for criterions that say that it is not, and then it is not."""
        trainer, model, criterion, _ = self.setup_run(data_of, tmp_path, name)
        model.eval()
        dataset = trainer.task.dataset("train")
        with torch.no_grad():
            items = [dataset[i] for i in range(5)]
            together = per_sentence_losses(criterion, model, dataset.collater(items)).losses
            order = dataset.collater(items).get("id")
            alone = [criterion(model, dataset.collater([item]))[0] for item in items]
        if order is not None:  # translation batches are sorted by length
            ids = [int(dataset.collater([item])["id"]) for item in items]
            alone = [alone[ids.index(int(i))] for i in order]
        assert together.shape == (5,)
        alone = torch.stack(alone).to(together)  # a criterion may sum in float32 itself
        if not getattr(criterion, "sentences_are_independent", True):
            assert (together - alone).abs().min() > 0.1
            return
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)

    def test_sample_is_not_changed(self, data_of, tmp_path, name):
        _, model, criterion, sample = self.setup_run(data_of, tmp_path, name)
        before = copy.deepcopy(sample)
        per_sentence_losses(criterion, model, sample)
        torch.testing.assert_close(sample, before, rtol=0, atol=0)

    @pytest.mark.parametrize("optimizer", ["adam", "sam_adam", "delta_sam_adam"])
    def test_trains(self, data_of, tmp_path, name, optimizer):
        trainer, _, _, _ = self.setup_run(data_of, tmp_path, name, optimizer)
        start = tiny.weights(trainer)
        logs = [trainer.train_step(tiny.batches(trainer)[:n]) for n in (1, 2)]
        assert all(torch.isfinite(torch.as_tensor(log["loss"])) for log in logs)
        end = tiny.weights(trainer)
        assert not equal(start, end) and all(torch.isfinite(w).all() for w in end)


def test_masked_lm_without_a_masked_token(data_of, tmp_path, monkeypatch):
    """All tokens are projected, on the CPU as they are and on a GPU by an all-True mask."""
    argv = tiny.arguments(data_of["masked_lm"], tmp_path, criterion="masked_lm")
    trainer = tiny.build_trainer(argv)
    criterion, model = trainer.get_criterion(), trainer.get_model()
    sample = copy.deepcopy(tiny.batches(trainer)[0])
    sample["target"].fill_(criterion.padding_idx)
    losses = per_sentence_losses(criterion, model, sample).losses
    assert losses.tolist() == [0.0] * len(sample["target"])

    def projected_flat(**kwargs):
        return model(**{**kwargs, "masked_tokens": torch.ones_like(sample["target"]).bool()})

    projected_flat.get_targets = model.get_targets
    losses = per_sentence_losses(criterion, projected_flat, sample).losses
    assert losses.tolist() == [0.0] * len(sample["target"])


def test_buffers_are_those_of_one_pass(classification, tmp_path):
    """Spectral norm moves its buffers in every forward; with a learning rate of 0 an update of
    delta-SAM leaves them as a single forward does, and its check of the losses passes."""
    ends = []
    for optimizer in ("adam", "sam_adam", "delta_sam_adam"):
        more = ["--lr", "0", "--spectral-norm-classification-head"]
        more += [] if optimizer == "adam" else ["--sam-rho", "1e-6"]
        trainer = optimizer_trainer(classification, tmp_path, optimizer, *more)
        trainer.train_step(tiny.batches(trainer)[:1])
        ends.append([b.clone() for b in trainer.get_model().buffers() if b.dim()])
    assert len(ends[0]) > 0
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1), (16,), ()])
def test_own_losses_of_another_shape_are_refused(classification, tmp_path, shape):
    trainer = optimizer_trainer(classification, tmp_path, "delta_sam_adam")
    criterion = trainer.get_criterion()
    criterion.per_sentence_losses = lambda model, sample: (torch.zeros(shape), 8, {})
    with pytest.raises(ValueError, match="one loss a sentence"):
        trainer.train_step(tiny.batches(trainer)[:1])
