"""Sequence-to-sequence: padding ignored, sums over tokens, the sample untouched."""

import copy

import pytest
import torch
import torch.nn.functional as F

from deltasam_fairseq.criterions import per_sentence_losses
from deltasam_fairseq.criterions.task_losses import LabelSmoothedTokens
from tests.helpers import same_noise, tiny

NO_DROPOUT = ["--dropout", "0", "--attention-dropout", "0"]


def build(translation, tmp_path, name, *more, dtype=torch.float64):
    argv = [*tiny.arguments(translation, tmp_path, criterion=name), *more]
    trainer = tiny.build_trainer(argv, dtype=dtype)
    model = trainer.get_model()
    model.train()
    return model, trainer.get_criterion(), tiny.batches(trainer)[0]


class TestObjective:
    """Two sentences, a vocabulary of 3, padding 0: targets (1, 2) and (1, padding)."""

    TARGETS = torch.tensor([[1, 2], [1, 0]])

    def test_losses_by_hand(self):
        """All tokens equally likely: ln 3 each, 2 tokens and 1. Smoothing changes nothing then."""
        for smoothing in (0.0, 0.2):
            objective = LabelSmoothedTokens(self.TARGETS, 0, smoothing)
            losses, nll = objective.losses_and_nll(objective.scores(torch.zeros(2, 2, 3)))
            expected = torch.tensor([2.0, 1.0]) * torch.tensor(3.0).log()
            assert nll.dtype == losses.dtype == torch.float64  # summed in it, of float32 terms
            torch.testing.assert_close(nll.float(), expected)
            torch.testing.assert_close(losses.float(), expected)

    def test_divergence_leaves_padding_out(self):
        torch.manual_seed(1)
        objective = LabelSmoothedTokens(self.TARGETS, 0, 0.1)
        p, q = objective.scores(torch.randn(2, 2, 3)), objective.scores(torch.randn(2, 2, 3))
        token = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        back = F.kl_div(p, q, log_target=True, reduction="none").sum(-1)
        forth = torch.stack([token[0].sum(), token[1, 0]])
        both = forth + torch.stack([back[0].sum(), back[1, 0]])
        torch.testing.assert_close(objective.directed_divergence(p, q).float(), forth)
        torch.testing.assert_close(objective.divergence(p, q).float(), both)
        torch.testing.assert_close(objective.mean_divergence(p, q).float(), both / 2)

    def test_ignored_prefix(self):
        objective = LabelSmoothedTokens(self.TARGETS, 0, 0.0, ignore_prefix_size=1)
        scores = objective.scores(torch.zeros(2, 2, 3))
        assert scores.shape == (2, 1, 3)
        expected = torch.tensor([1.0, 0.0]) * torch.tensor(3.0).log()
        torch.testing.assert_close(objective.losses(scores).float(), expected)

    def test_rises_of_long_targets_are_kept(self):
        """512 tokens of 3 nats: float32's spacing of their sum is 1.2e-4, the rise is 1e-4."""
        torch.manual_seed(1)
        objective = LabelSmoothedTokens(torch.randint(1, 20, (4, 512)), 0, 0.1)
        exact = torch.randn(4, 512, 20, dtype=torch.float64)
        scores = [F.log_softmax(x, dim=-1) for x in (exact, exact * (1 + 1e-6))]
        rise = objective.losses(scores[1]) - objective.losses(scores[0])
        found = [objective.losses(s.float()) for s in scores]
        in_float32 = [losses.float() for losses in found]
        error = (found[1] - found[0] - rise).abs().mean()
        assert error < 0.2 * (in_float32[1] - in_float32[0] - rise).abs().mean()


@pytest.mark.parametrize(
    "name, off",
    [
        ("seq2seq_r3f", "--r3f-lambda"),
        ("seq2seq_r_drop", "--r-drop-alpha"),
        ("seq2seq_distill", "--distill-lambda"),
    ],
)
class TestCriterions:
    @pytest.mark.parametrize("more", ["", "--sentence-avg", "--ignore-prefix-size 2"])
    def test_reduces_to_label_smoothed(self, translation_and_teacher, tmp_path, name, off, more):
        more = [*more.split(), "--label-smoothing", "0.1", "--report-accuracy"]
        results = []
        for criterion_name, options in ((name, [off, "0"]), ("label_smoothed_cross_entropy", [])):
            model, criterion, sample = build(
                translation_and_teacher,
                tmp_path,
                criterion_name,
                *more,
                *options,
                dtype=torch.float32,
            )
            torch.manual_seed(1)
            loss, sample_size, log = criterion(model, sample)
            loss.backward()
            log = {k: torch.as_tensor(v).float() for k, v in log.items()}
            gradients = [p.grad for p in model.parameters()]
            results.append((loss.float(), float(sample_size), log, gradients))
        torch.testing.assert_close(results[0], results[1])

    def test_normalised_as_the_task_loss(self, translation_and_teacher, tmp_path, name, off):
        """Twice the batch has twice the loss, the divergence and the sample size: what is divided
        by the sample size is a mean over tokens, also of the regulariser."""
        model, criterion, sample = build(translation_and_teacher, tmp_path, name, *NO_DROPOUT)
        twice = copy.deepcopy(sample)
        for part in (twice, twice["net_input"]):
            for key, value in part.items():
                part[key] = torch.cat([value, value]) if torch.is_tensor(value) else value
        for key in ("ntokens", "nsentences"):
            twice[key] = 2 * sample[key]
        same_noise_results = []
        for each in (sample, twice):
            with pytest.MonkeyPatch.context() as patch:
                same_noise.use(patch.setattr)
                _, sample_size, log = criterion(model, each)
                same_noise_results.append({k: float(v) for k, v in log.items()})
        one, two = same_noise_results
        assert two == pytest.approx({k: 2 * v for k, v in one.items()})

    def test_sample_is_not_changed(self, translation_and_teacher, tmp_path, name, off):
        """fairseq's own label_smoothed_cross_entropy_with_rdrop doubles it in place."""
        model, criterion, sample = build(translation_and_teacher, tmp_path, name)
        before = copy.deepcopy(sample)
        criterion(model, sample)
        torch.testing.assert_close(sample, before, rtol=0, atol=0)

    def test_adaptive_softmax_is_refused(self, translation_and_teacher, tmp_path, name, off):
        model, criterion, sample = build(translation_and_teacher, tmp_path, name)
        model.decoder.adaptive_softmax = object()
        with pytest.raises(ValueError, match="--adaptive-softmax-cutoff"):
            criterion(model, sample)


def test_r3f_by_hand(translation, tmp_path, monkeypatch):
    """Label-smoothed loss and lambda times the symmetric KL of all real target tokens."""
    options = ["--r3f-lambda", "0.7", "--eps", "0.3", "--label-smoothing", "0.1"]
    model, criterion, sample = build(translation, tmp_path, "seq2seq_r3f", *NO_DROPOUT, *options)
    same_noise.use(monkeypatch.setattr)
    found = per_sentence_losses(criterion, model, sample)
    net_input = sample["net_input"]
    tokens, target = net_input["src_tokens"], sample["target"]
    clean = model(**net_input)[0].log_softmax(-1)
    embed = model.encoder.embed_tokens.forward
    noise = 0.3 * same_noise.content_noise(tokens, 1, 16, torch.float64)
    monkeypatch.setattr(
        model.encoder.embed_tokens, "forward", lambda t: embed(t) + (noise if t is tokens else 0)
    )
    noised = model(**net_input)[0].log_softmax(-1)
    vocabulary = clean.size(-1)
    for j in range(len(target)):
        expected = 0.0
        for t, word in enumerate(target[j].tolist()):
            if word == 1:
                continue
            p, q = clean[j, t], noised[j, t]
            eps = 0.1 / (vocabulary - 1)
            expected -= (1 - 0.1 - eps) * p[word] + eps * p.sum()
            expected += 0.7 * ((p.exp() - q.exp()) * (p - q)).sum()
        torch.testing.assert_close(found.losses[j], expected)
    assert found.logging_output["symm_kl"] > 1e-3


def test_r_drop_by_hand(translation, tmp_path):
    options = ["--r-drop-alpha", "2.5", "--label-smoothing", "0", "--dropout", "0.3"]
    model, criterion, sample = build(translation, tmp_path, "seq2seq_r_drop", *options)
    torch.manual_seed(5)
    losses = per_sentence_losses(criterion, model, sample).losses
    torch.manual_seed(5)
    p, q = (model(**sample["net_input"])[0].log_softmax(-1) for _ in range(2))
    real = sample["target"].ne(1)
    nll = -(p + q).gather(-1, sample["target"].unsqueeze(-1)).squeeze(-1) / 2
    apart = ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2
    assert not torch.equal(p, q)
    torch.testing.assert_close(losses, ((nll + 2.5 * apart) * real).sum(1))
