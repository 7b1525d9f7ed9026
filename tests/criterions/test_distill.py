"""Distillation against its equation, a sentence at a time, in float64; what a teacher may be."""

import copy
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils
from omegaconf import OmegaConf

from deltasam_fairseq.criterions import per_sentence_losses
from deltasam_fairseq.criterions.task_losses import Classification, LabelSmoothedTokens
from deltasam_fairseq.criterions.teacher import load_teacher
from deltasam_fairseq.trainer.checkpoint_state import CRITERION
from tests.criterions.test_regularisers import (
    HEAD,
    build,
    gradients,
    logits_of,
    sentences,
    task_loss,
)
from tests.helpers import tiny

REGRESSION = [False, True]
FIGURES = {"distill_hard", "distill_soft", "distill_teacher_loss"}
SHARES = {"distill_teacher_accuracy", "distill_agreement"}


@pytest.fixture(scope="module")
def data(classification):
    """With a teacher of two classes, and one that gives numbers."""
    tiny.write_teacher(classification, "sentence_prediction")
    more = ["--num-classes", "1", "--regression-target"]
    tiny.write_teacher(classification, "sentence_prediction", *more, name="scores.pt")
    return classification


def build_student(data, tmp_path, *more, regression=False, **kwargs):
    teacher = data / ("scores.pt" if regression else tiny.TEACHER)
    more = ["--distill-teacher", str(teacher), *more]
    return build(data, tmp_path, "distill", *more, regression=regression, **kwargs)


def loaded(path):
    """The teacher as fairseq itself loads it."""
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    return model.double().eval()


def hinton(student, teacher, tokens, target, regression, weight, temperature):
    logits = logits_of(student, tokens)
    with torch.no_grad():
        teacher_scores = logits_of(teacher, tokens)
    hard = task_loss(logits, target, regression)
    if regression:
        return (1 - weight) * hard + weight * ((logits - teacher_scores) ** 2).sum()
    p, q = (F.softmax(z / temperature, dim=-1) for z in (teacher_scores, logits))
    soft = temperature**2 * (p * (p.log() - q.log())).sum()
    return (1 - weight) * hard + weight * soft


@pytest.mark.parametrize("regression", REGRESSION, ids=["classes", "numbers"])
@pytest.mark.parametrize("weight, temperature", [(0.3, 2.5), (1, 1), (0.5, 0.7)])
def test_losses_and_gradients(data, tmp_path, weight, temperature, regression):
    """Of each sentence alone and unpadded, and of their weighted sum; by both ways in."""
    options = ["--distill-lambda", str(weight), "--distill-temperature", str(temperature)]
    _, model, criterion, sample = build_student(data, tmp_path, *options, regression=regression)
    teacher = loaded(data / ("scores.pt" if regression else tiny.TEACHER))
    assert len(teacher.encoder.sentence_encoder.layers) == 3
    assert len(model.encoder.sentence_encoder.layers) == 2
    each = [
        hinton(model, teacher, *one, regression, weight, temperature)
        for one in sentences(sample, regression)
    ]
    expected = torch.stack(each)
    weights = torch.linspace(-1, 2, len(expected), dtype=torch.float64)
    model.zero_grad()
    (weights * expected).sum().backward()
    expected_gradients = gradients(model)

    losses = per_sentence_losses(criterion, model, sample).losses
    torch.testing.assert_close(losses, expected)
    (weights * losses).sum().backward()
    torch.testing.assert_close(gradients(model), expected_gradients)
    loss, sample_size, log = criterion(model, sample)
    torch.testing.assert_close(loss, expected.sum())
    assert sample_size == len(expected) and log.keys() >= FIGURES
    total = (1 - weight) * log["distill_hard"] + weight * log["distill_soft"]
    torch.testing.assert_close(total, loss.detach())


def test_shares_are_counted(data, tmp_path):
    """Right ones and equal ones among eight sentences, in percent where they are logged."""
    trainer, model, criterion, sample = build_student(data, tmp_path)
    teacher = loaded(data / tiny.TEACHER)
    predicted = [
        [int(logits_of(m, tokens).argmax()) for m in (teacher, model)] + [int(target)]
        for tokens, target in sentences(sample)
    ]
    _, _, log = criterion(model, sample)
    right = sum(top == target for top, _, target in predicted)
    same = sum(top == own for top, own, _ in predicted)
    assert (log["distill_teacher_accuracy"], log["distill_agreement"]) == (right, same)
    logged = trainer.train_step([sample, sample])
    assert logged["distill_teacher_accuracy"] == pytest.approx(100 * right / 8, abs=0.05)
    assert logged["distill_agreement"] == pytest.approx(100 * same / 8, abs=0.05)
    assert logged["distill_hard"] > 0


class TestLimits:
    """Of lambda and T."""

    def test_the_teacher_alone_needs_no_labels(self, data, tmp_path):
        _, model, criterion, sample = build_student(data, tmp_path, "--distill-lambda", "1")
        other = dict(sample, target=1 - sample["target"])
        found = [criterion(model, each)[0].item() for each in (sample, other)]
        assert found[0] == found[1] > 0

    def test_a_student_that_is_its_teacher_has_the_task_loss(self, data, tmp_path):
        options = "--encoder-layers 3 --encoder-embed-dim 24 --encoder-ffn-embed-dim 40".split()
        options += ["--distill-lambda", "0.25", "--distill-temperature", "3"]
        _, model, criterion, sample = build_student(data, tmp_path, *options)
        model.load_state_dict(loaded(data / tiny.TEACHER).state_dict())
        losses, _, log = criterion.per_sentence_losses(model, sample)
        hard = [task_loss(logits_of(model, *one[:1]), one[1], False) for one in sentences(sample)]
        torch.testing.assert_close(losses, 0.75 * torch.stack(hard))
        assert abs(log["distill_soft"]) < 1e-12 and log["distill_agreement"] == len(losses)

    def test_temperature_one_is_kl_and_a_high_one_matches_logits(self):
        """T to infinity: the squared distance of the centred logits, over 2 C (Hinton et al.)."""
        torch.manual_seed(1)
        objective = Classification(torch.tensor([0, 2]))
        z, v = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
        student, teacher = objective.scores(z), objective.scores(v)
        one = objective.distillation_losses(teacher, student, 1.0)
        torch.testing.assert_close(one, objective.directed_divergence(teacher, student))
        apart = (z - z.mean(1, keepdim=True)) - (v - v.mean(1, keepdim=True))
        high = objective.distillation_losses(teacher, student, 1e4)
        torch.testing.assert_close(high, apart.square().sum(1) / 6, rtol=1e-3, atol=0)


class TestTeacher:
    def test_is_no_part_of_the_student(self, data, tmp_path):
        """Not trained, not saved, in eval mode while the criterion trains."""
        trainer, model, criterion, sample = build_student(data, tmp_path)
        teacher = criterion.regulariser.teacher.model
        before = copy.deepcopy(teacher).double().state_dict()
        criterion.train()
        trainer.train_step([sample])
        assert not teacher.training and not any(m.training for m in teacher.modules())
        torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert list(criterion.parameters()) == [] and criterion.state_dict() == {}
        trainer.consolidate_optimizer()
        saved = trainer.state_dict()
        assert saved["model"].keys() == model.state_dict().keys()
        assert not saved["criterion"] and saved["extra_state"][CRITERION] == {}

    @pytest.mark.parametrize("optimizer", ["adam", "sam_adam", "delta_sam_adam"])
    def test_one_forward_for_each_micro_batch_of_an_update(self, data, tmp_path, optimizer):
        trainer, _, criterion, _ = build_student(
            data, tmp_path, "--optimizer", optimizer, dtype=torch.float32
        )
        seen = []
        teacher = criterion.regulariser.teacher.model
        teacher.register_forward_hook(lambda *_: seen.append(1))
        samples = tiny.batches(trainer)
        trainer.train_step(samples[:1])  # delta-SAM checks the losses of the first
        seen.clear()
        for micro_batches in (1, 3, 1):
            trainer.train_step(samples[:micro_batches])
        assert len(seen) == 1 + 3 + 1
        assert not criterion.regulariser.teacher._known

    def test_without_updates_nothing_is_kept(self, data, tmp_path):
        """A second call of the criterion by someone else computes again, and holds no memory."""
        _, model, criterion, sample = build_student(data, tmp_path)
        criterion.regulariser.after_update(dict)
        criterion(model, sample)
        assert not criterion.regulariser.teacher._known

    def test_draws_of_the_run_do_not_depend_on_it(self, data, tmp_path):
        trainer, _, _, _ = build_student(data, tmp_path)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        load_teacher(str(data / tiny.TEACHER), trainer.task, HEAD)
        assert torch.equal(torch.get_rng_state(), before)

    def test_validation_needs_none(self, data, tmp_path):
        """A student can be evaluated where its teacher is not."""
        trainer, model, criterion, sample = build_student(data, tmp_path)
        cfg = trainer.cfg.criterion
        cfg.distill_teacher = str(tmp_path / "gone.pt")
        other = trainer.task.build_criterion(cfg)
        model.eval()
        other.eval()
        with torch.no_grad():
            loss, _, log = other(model, sample)
            plain = sum(task_loss(logits_of(model, t), y, False) for t, y in sentences(sample))
        torch.testing.assert_close(loss, plain)
        assert not set(log) & (FIGURES | SHARES)
        model.train()
        with pytest.raises(RuntimeError, match="--criterion distill.*--user-dir"):
            other(model, sample)

    def test_of_an_old_checkpoint_another_head_and_a_normalised_one(self, data, tmp_path):
        """A namespace in place of the configuration, as in fairseq's published models; R4F."""
        more = ["--classification-head-name", "mine", "--spectral-norm-classification-head"]
        tiny.write_teacher(data, "sentence_prediction", *more, name="mine.pt")
        state = checkpoint_utils.load_checkpoint_to_cpu(str(data / "mine.pt"))
        model_args = state["cfg"].model
        if not isinstance(model_args, Namespace):
            model_args = Namespace(**OmegaConf.to_container(model_args))
        state.update(args=model_args, cfg=None)
        torch.save(state, data / "old.pt")
        for name in ("mine.pt", "old.pt"):
            more = ["--distill-teacher", str(data / name), "--distill-teacher-head", "mine"]
            _, model, criterion, sample = build_student(data, tmp_path, *more)
            teacher = loaded(data / "mine.pt")
            _, _, log = criterion(model, sample)
            expected = 0.0
            for tokens, target in sentences(sample):
                net_input = {"src_tokens": tokens, "src_lengths": None}
                kwargs = {"features_only": True, "classification_head_name": "mine"}
                expected += task_loss(teacher(**net_input, **kwargs)[0], target, False)
            torch.testing.assert_close(log["distill_teacher_loss"], expected.detach())

    def test_of_another_architecture(self, data, tmp_path):
        """BERT teaches RoBERTa."""
        tiny.write_teacher(data, "sentence_prediction", "--arch", "bert", name="bert.pt")
        more = ["--distill-teacher", str(data / "bert.pt")]
        _, model, criterion, sample = build_student(data, tmp_path, *more)
        teacher = criterion.regulariser.teacher.model
        assert type(teacher) is not type(model)
        _, _, log = criterion(model, sample)
        net_input = {"features_only": True, "classification_head_name": HEAD}
        logits = loaded(data / "bert.pt")(**sample["net_input"], **net_input)[0]
        expected = F.cross_entropy(logits, sample["target"].view(-1), reduction="sum")
        torch.testing.assert_close(log["distill_teacher_loss"], expected.detach())

    def test_of_bart(self, data, tmp_path):
        """With the input that its decoder needs; without it, it is refused before training."""
        more = ["--arch", "bart_base", "--decoder-layers", "1", "--decoder-embed-dim", "24"]
        more += ["--decoder-ffn-embed-dim", "40", "--decoder-attention-heads", "2"]
        decoder_input = "--add-prev-output-tokens"
        tiny.write_teacher(data, "sentence_prediction", *more, decoder_input, name="bart.pt")
        more = ["--distill-teacher", str(data / "bart.pt")]
        _, model, criterion, sample = build_student(data, tmp_path, *more, decoder_input)
        _, _, log = criterion(model, sample)
        assert torch.isfinite(log["distill_teacher_loss"])
        with pytest.raises(ValueError, match="has a decoder.*--add-prev-output-tokens"):
            build_student(data, tmp_path, *more)

    def test_too_long_a_sentence_is_named(self, data, tmp_path):
        tiny.write_teacher(data, "sentence_prediction", "--max-positions", "8", name="short.pt")
        more = ["--distill-teacher", str(data / "short.pt")]
        _, model, criterion, sample = build_student(data, tmp_path, *more)
        assert sample["net_input"]["src_tokens"].size(1) > 8
        with pytest.raises(ValueError, match="--distill-teacher.*8 positions.*--max-positions"):
            criterion(model, sample)


class TestRefused:
    """Before training: when the trainer is built."""

    def error(self, data, tmp_path, path, *more, criterion="distill"):
        argv = tiny.arguments(data, tmp_path, *more, "--distill-teacher", str(path))
        argv[argv.index("--criterion") + 1] = criterion
        with pytest.raises(ValueError) as error:
            tiny.build_trainer(argv)
        return str(error.value)

    def test_another_dictionary(self, data, tmp_path):
        state = torch.load(data / tiny.TEACHER, weights_only=False)
        name = "encoder.sentence_encoder.embed_tokens.weight"
        state["model"][name] = state["model"][name][:-1]
        torch.save(state, tmp_path / "other.pt")
        message = self.error(data, tmp_path, tmp_path / "other.pt")
        for part in ("--distill-teacher", "24 words", "dictionary 25", "student's dict.txt"):
            assert part in message

    def test_another_number_of_classes(self, data, tmp_path):
        message = self.error(data, tmp_path, data / "scores.pt")
        for part in (f"head {HEAD} has 1 outputs", "--num-classes is 2"):
            assert part in message

    def test_no_such_head(self, data, tmp_path):
        message = self.error(data, tmp_path, data / tiny.TEACHER, "--distill-teacher-head", "mine")
        for part in ("no classification head mine", f"it has {HEAD}", "--distill-teacher-head"):
            assert part in message

    def test_not_fine_tuned(self, data, tmp_path):
        state = torch.load(data / tiny.TEACHER, weights_only=False)
        heads = [name for name in state["model"] if "classification_heads" in name]
        for name in heads:
            del state["model"][name]
        torch.save(state, tmp_path / "pretrained.pt")
        message = self.error(data, tmp_path, tmp_path / "pretrained.pt")
        assert "it has none" in message and "fine-tune the teacher" in message

    def test_no_configuration(self, data, tmp_path):
        torch.save({"model": {}, "args": None}, tmp_path / "bare.pt")
        message = self.error(data, tmp_path, tmp_path / "bare.pt")
        assert "bare.pt" in message and "fairseq-train" in message


class TestTokens:
    """Word-level distillation of label-smoothed cross-entropy."""

    def build(self, data, tmp_path, *more):
        argv = tiny.arguments(data, tmp_path, criterion="seq2seq_distill")
        argv += ["--dropout", "0", "--attention-dropout", "0", *more]
        trainer = tiny.build_trainer(argv, dtype=torch.float64)
        model, criterion = trainer.get_model(), trainer.get_criterion()
        model.train()
        return trainer, model, criterion, tiny.batches(trainer)[0]

    def test_by_hand(self, translation_and_teacher, tmp_path):
        more = "--distill-lambda 0.4 --distill-temperature 2 --label-smoothing 0.1".split()
        _, model, criterion, sample = self.build(translation_and_teacher, tmp_path, *more)
        found = per_sentence_losses(criterion, model, sample)
        teacher = loaded(translation_and_teacher / tiny.TEACHER)
        with torch.no_grad():
            teacher_scores = teacher(**sample["net_input"])[0]
            logits = model(**sample["net_input"])[0]
        log_probs, target, right, same = logits.log_softmax(-1), sample["target"], 0, 0
        eps = 0.1 / (logits.size(-1) - 1)
        for j in range(len(target)):
            expected = 0.0
            for t, word in enumerate(target[j].tolist()):
                if word == 1:
                    continue
                hard = (1 - 0.1 - eps) * log_probs[j, t, word] + eps * log_probs[j, t].sum()
                p, q = F.softmax(teacher_scores[j, t] / 2, 0), F.softmax(logits[j, t] / 2, 0)
                expected += -0.6 * hard + 0.4 * 4 * (p * (p / q).log()).sum()
                right += int(teacher_scores[j, t].argmax() == word)
                same += int(teacher_scores[j, t].argmax() == logits[j, t].argmax())
            torch.testing.assert_close(found.losses[j].detach(), expected)
        log = found.logging_output
        assert log["distill_predictions"] == sample["ntokens"]
        assert (log["distill_teacher_accuracy"], log["distill_agreement"]) == (right, same)

    @pytest.mark.parametrize("more", ["", "--sentence-avg"])
    def test_shares_are_of_tokens(self, translation_and_teacher, tmp_path, more):
        trainer, model, criterion, sample = self.build(
            translation_and_teacher, tmp_path, *more.split()
        )
        _, _, log = criterion(model, sample)
        share = 100 * float(log["distill_agreement"]) / sample["ntokens"]
        logged = trainer.train_step([sample])
        assert logged["distill_agreement"] == pytest.approx(share, abs=0.05)

    def test_one_micro_batch_is_kept(self, translation_and_teacher, tmp_path):
        """Scores of all words are large: with one micro-batch the forwards of an update share
        them, with several each computes them again."""
        more = ["--optimizer", "sam_adam"]
        trainer, _, criterion, _ = self.build(translation_and_teacher, tmp_path, *more)
        seen = []
        criterion.regulariser.teacher.model.register_forward_hook(lambda *_: seen.append(1))
        samples = tiny.batches(trainer)
        trainer.train_step(samples[:1])
        assert len(seen) == 1
        trainer.train_step(samples[:2])
        assert len(seen) == 1 + 4

    def test_ignored_prefix_and_padding_add_nothing(self):
        objective = LabelSmoothedTokens(torch.tensor([[1, 2], [1, 0]]), 0, 0.0, 1)
        torch.manual_seed(1)
        p, q = objective.scores(torch.randn(2, 2, 3)), objective.scores(torch.randn(2, 2, 3))
        soft = objective.distillation_losses(p, q, 2.0)
        assert soft[0] > 0 and soft[1] == 0
        assert objective.num_correct(p.argmax(-1), p.argmax(-1)).tolist() == [1, 0]
