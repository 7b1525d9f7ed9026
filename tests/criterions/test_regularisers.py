"""R3F, R-Drop, FreeLB, SMART and VAT against their equations, a sentence at a time, in float64.

The references know nothing of the package: they put perturbed embeddings through RoBERTa's
extract_features, sentence by sentence without padding, and accumulate gradients as the papers do.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from deltasam_fairseq.criterions import per_sentence_losses
from tests.helpers import same_noise, tiny

HEAD = "sentence_classification_head"
NO_DROPOUT = ["--dropout", "0", "--attention-dropout", "0"]


def build(data, tmp_path, name, *more, regression=False, dropout=False, dtype=torch.float64):
    argv = tiny.arguments(data, tmp_path, *([] if dropout else NO_DROPOUT), criterion=name)
    argv += ["--regression-target", "--num-classes", "1"] if regression else []
    trainer = tiny.build_trainer([*argv, *more], dtype=dtype)
    model, criterion = trainer.get_model(), trainer.get_criterion()
    model.train()
    # What lies far from its start has gradients and divergences of a size that rounding spares.
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.classification_heads.parameters():
            p.add_(0.3 * torch.randn_like(p))
    if hasattr(criterion, "before_update"):
        criterion.before_update(model, lambda: dict(model.named_parameters()), 0, 1.0)
    return trainer, model, criterion, tiny.batches(trainer)[0]


def logits_of(model, tokens, delta=None):
    """Logits of one sentence without padding, shape (1, classes)."""
    embeddings = model.encoder.sentence_encoder.embed_tokens(tokens)
    if delta is not None:
        embeddings = embeddings + delta
    features, _ = model.encoder.extract_features(tokens, token_embeddings=embeddings)
    return model.classification_heads[HEAD](features)


def sentences(sample, regression=False):
    """Tokens (1, T) without padding and target (1,) of each sentence."""
    for tokens, target in zip(sample["net_input"]["src_tokens"], sample["target"].view(-1)):
        target = target.view(1)
        yield tokens[tokens != 1].unsqueeze(0), target.double() if regression else target


def task_loss(logits, target, regression):
    if regression:
        return F.mse_loss(logits.view(-1), target)
    return F.cross_entropy(logits, target)


def probabilities(logits):
    return F.softmax(logits, dim=-1)


def directed(p_logits, q_logits, regression):
    """KL(p || q), or the squared difference."""
    if regression:
        return ((p_logits - q_logits) ** 2).sum()
    p = probabilities(p_logits)
    return (p * (p.log() - probabilities(q_logits).log())).sum()


def both_ways(p_logits, q_logits, regression):
    forth = directed(p_logits, q_logits, regression)
    return forth if regression else forth + directed(q_logits, p_logits, regression)


def noise_of(tokens, model):
    dim = model.encoder.sentence_encoder.embed_tokens.embedding_dim
    return same_noise.content_noise(tokens, 1, dim, torch.float64)


def r3f(model, tokens, target, regression, weight=0.7, eps=0.02):
    clean = logits_of(model, tokens)
    noised = logits_of(model, tokens, eps * noise_of(tokens, model))
    return task_loss(clean, target, regression) + weight * both_ways(clean, noised, regression)


def r_drop(model, tokens, target, regression):
    """Without dropout both forwards are equal."""
    return task_loss(logits_of(model, tokens), target, regression)


def freelb(model, tokens, target, regression, steps=3, lr=0.2, init=0.3, radius=0.25, norm=2):
    """Algorithm 1, except that gradients for the weights come from the mean of the losses."""
    delta = noise_of(tokens, model)
    delta = delta * (init if norm == math.inf else init / delta.numel() ** 0.5)
    losses = []
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        loss = task_loss(logits_of(model, tokens, delta), target, regression)
        (g,) = torch.autograd.grad(loss, delta, retain_graph=True)
        losses.append(loss)
        delta = delta + lr * g / g.norm(p=norm)
        if norm == math.inf:
            delta = delta.clamp(-radius, radius)
        elif delta.norm() > radius:
            delta = delta * radius / delta.norm()
    return sum(losses) / steps


def freelb_linf(*args):
    return freelb(*args, lr=0.03, init=0.02, radius=0.035, norm=math.inf)


def freelb_free(*args):
    """No ball, no start, one step more."""
    return freelb(*args, steps=4, init=0, radius=math.inf)


def smart(model, tokens, target, regression, weight=3.0, eps=0.02, sigma=0.01, step=0.05):
    clean = logits_of(model, tokens)
    delta = (sigma * noise_of(tokens, model)).requires_grad_()
    divergence = both_ways(clean.detach(), logits_of(model, tokens, delta), regression)
    (g,) = torch.autograd.grad(divergence, delta)
    delta = (delta + step * g / g.abs().max()).clamp(-eps, eps).detach()
    perturbed = logits_of(model, tokens, delta)
    return task_loss(clean, target, regression) + weight * both_ways(clean, perturbed, regression)


def vat(model, tokens, target, regression, weight=0.5, eps=0.4, xi=0.1, steps=2):
    clean, d = logits_of(model, tokens), noise_of(tokens, model)
    constant = clean.detach()
    for _ in range(steps):
        r = (xi * d / d.norm()).requires_grad_()
        (d,) = torch.autograd.grad(directed(constant, logits_of(model, tokens, r), regression), r)
    r = eps * d / d.norm()
    divergence = directed(constant, logits_of(model, tokens, r), regression)
    return task_loss(clean, target, regression) + weight * divergence


CASES = {
    "r3f": (r3f, ["--r3f-lambda", "0.7", "--eps", "0.02"]),
    "r_drop": (r_drop, ["--r-drop-alpha", "2"]),
    "freelb": (
        freelb,
        "--adv-steps 3 --adv-lr 0.2 --adv-init-mag 0.3 --adv-max-norm 0.25".split(),
    ),
    "freelb, linf": (
        freelb_linf,
        "--adv-lr 0.03 --adv-init-mag 0.02 --adv-max-norm 0.035 --adv-norm linf".split(),
    ),
    "freelb, free": (
        freelb_free,
        "--adv-steps 4 --adv-lr 0.2 --adv-init-mag 0 --adv-max-norm 0".split(),
    ),
    "smart": (
        smart,
        "--smart-lambda 3 --smart-mu 0 --smart-eps 0.02 --smart-sigma 0.01 "
        "--smart-step-size 0.05".split(),
    ),
    "vat": (
        vat,
        "--vat-alpha 0.5 --vat-eps 0.4 --vat-xi 0.1 --vat-steps 2".split(),
    ),
}
REGRESSION = [False, True]


def gradients(model):
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("regression", REGRESSION, ids=["classes", "numbers"])
@pytest.mark.parametrize("case", CASES)
class TestEquations:
    def test_losses_and_gradients(self, classification, tmp_path, monkeypatch, case, regression):
        """Of each sentence alone and unpadded, and of their weighted sum; by both ways in."""
        reference, options = CASES[case]
        _, model, criterion, sample = build(
            classification, tmp_path, case.split(",")[0], *options, regression=regression
        )
        same_noise.use(monkeypatch.setattr)
        expected = torch.stack(
            [reference(model, *each, regression) for each in sentences(sample, regression)]
        )
        weights = torch.linspace(-1, 2, len(expected), dtype=torch.float64)
        model.zero_grad()
        (weights * expected).sum().backward(retain_graph=True)
        expected_weighted = gradients(model)
        expected.sum().backward()
        expected_sum = gradients(model)

        losses = per_sentence_losses(criterion, model, sample).losses
        torch.testing.assert_close(losses, expected)
        (weights * losses).sum().backward()
        torch.testing.assert_close(gradients(model), expected_weighted)

        loss, sample_size, log = criterion(model, sample)
        assert sample_size == len(expected)
        torch.testing.assert_close(loss, expected.sum())
        torch.testing.assert_close(log["loss"], expected.sum())
        (3 * loss).backward()  # what multiplies the loss reaches all that its gradient is made of
        found = {name: grad / 3 for name, grad in gradients(model).items()}
        torch.testing.assert_close(found, expected_sum)

    def test_nothing_is_left_in_the_gradients_before_the_backward(
        self, classification, tmp_path, case, regression
    ):
        _, options = CASES[case]
        _, model, criterion, sample = build(
            classification, tmp_path, case.split(",")[0], *options, regression=regression
        )
        criterion(model, sample)
        assert all(p.grad is None for p in model.parameters())

    def test_validation_has_the_plain_loss(self, classification, tmp_path, case, regression):
        _, options = CASES[case]
        _, model, criterion, sample = build(
            classification, tmp_path, case.split(",")[0], *options, regression=regression
        )
        model.eval()
        with torch.no_grad():
            loss, _, log = criterion(model, sample)
            plain = sum(
                task_loss(logits_of(model, tokens), target, regression)
                for tokens, target in sentences(sample, regression)
            )
        torch.testing.assert_close(loss, plain)
        assert not set(log) & set(criterion.regulariser_class.TERMS)


@pytest.mark.parametrize("regression", REGRESSION, ids=["classes", "numbers"])
@pytest.mark.parametrize(
    "name, off",
    [
        ("r3f", "--r3f-lambda 0"),
        ("r3f", "--eps 0"),
        ("r_drop", "--r-drop-alpha 0"),
        ("freelb", "--adv-steps 0"),
        ("freelb", "--adv-steps 2 --adv-init-mag 0 --adv-lr 0"),
        ("smart", "--smart-lambda 0 --smart-mu 0"),
        ("smart", "--smart-lambda 0 --smart-mu 1"),  # the average is the model itself at first
        ("vat", "--vat-alpha 0"),
        ("vat", "--vat-eps 0"),
        ("distill", "--distill-lambda 0"),
    ],
)
def test_reduces_to_the_plain_criterion(
    classification_and_teacher, tmp_path, name, off, regression
):
    """In value and gradient; with dropout where one forward is all that is computed."""
    results = []
    one_forward = off in (
        *("--r3f-lambda 0", "--r-drop-alpha 0", "--adv-steps 0", "--vat-alpha 0"),
        "--distill-lambda 0",
    )
    for criterion_name, more in ((name, off.split()), ("sentence_prediction", [])):
        _, model, criterion, sample = build(
            classification_and_teacher,
            tmp_path,
            criterion_name,
            *more,
            regression=regression,
            dropout=one_forward,
            dtype=torch.float32,
        )
        torch.manual_seed(3)
        loss, sample_size, log = criterion(model, sample)
        loss.backward()
        figures = {k: v for k, v in log.items() if k in ("ncorrect", "ntokens", "nsentences")}
        results.append((loss.detach(), sample_size, figures, gradients(model)))
    torch.testing.assert_close(results[0], results[1])


class TestRDrop:
    @pytest.mark.parametrize("regression", REGRESSION, ids=["classes", "numbers"])
    def test_two_masks(self, classification, tmp_path, regression):
        """Mean of two losses, alpha times the mean of both directions, with the masks of fairseq's
        dropout replayed outside."""
        _, model, criterion, sample = build(
            classification,
            tmp_path,
            "r_drop",
            "--r-drop-alpha",
            "2",
            regression=regression,
            dropout=True,
        )
        torch.manual_seed(7)
        losses, _, log = criterion.per_sentence_losses(model, sample)
        torch.manual_seed(7)
        kwargs = {"features_only": True, "classification_head_name": HEAD}
        first, second = (model(**sample["net_input"], **kwargs)[0] for _ in range(2))
        assert not torch.equal(first, second)
        targets = [t for _, t in sentences(sample, regression)]
        for j, target in enumerate(targets):
            a, b = first[j : j + 1], second[j : j + 1]
            mean = (task_loss(a, target, regression) + task_loss(b, target, regression)) / 2
            apart = both_ways(a, b, regression) / (1 if regression else 2)
            torch.testing.assert_close(losses[j], mean + 2 * apart)
        assert log["r_drop_kl"] > 0


class TestSMARTAverage:
    def test_bregman_term_and_average_by_hand(self, classification, tmp_path):
        """w~ is w_0; after an update to w_1: .9 w_0 + .1 w_1; after the switch half of each."""
        _, model, criterion, sample = build(
            classification, tmp_path, "smart",
            *"--smart-lambda 0 --smart-mu 2 --smart-momentum 0.9 --smart-late-momentum 0.5".split(),
            *"--smart-switch 1".split(),
        )  # fmt: skip
        w0 = {n: p.detach().clone() for n, p in model.named_parameters()}
        teacher = copy.deepcopy(model)

        def move(scale):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(scale * torch.cos(torch.arange(p.numel()).view_as(p)))
            criterion.after_update(lambda: dict(model.named_parameters()))
            return {n: p.detach().clone() for n, p in model.named_parameters()}

        w1 = move(0.05)
        average = {n: 0.9 * w0[n] + 0.1 * w1[n] for n in w0}
        torch.testing.assert_close(criterion.regulariser.state_dict()["averages"], average)
        criterion.before_update(model, lambda: dict(model.named_parameters()), 1, 1.0)
        teacher.load_state_dict(average, strict=False)
        found = criterion.per_sentence_losses(model, sample)
        for j, (tokens, target) in enumerate(sentences(sample)):
            now, then = logits_of(model, tokens), logits_of(teacher, tokens)
            expected = task_loss(now, target, False) + 2 * both_ways(now, then, False)
            torch.testing.assert_close(found[0][j], expected)
        assert found[2]["smart_bregman"] > 1e-4
        w2 = move(0.02)
        average = {n: 0.5 * average[n] + 0.5 * w2[n] for n in w0}
        torch.testing.assert_close(criterion.regulariser.state_dict()["averages"], average)

    def test_average_has_no_gradient_and_the_models_buffers_stay(self, classification, tmp_path):
        trainer, model, criterion, sample = build(
            classification, tmp_path, "smart", "--spectral-norm-classification-head"
        )
        buffers = copy.deepcopy(dict(model.named_buffers()))
        criterion.batch(model, sample, 1.0).scores_with(criterion.regulariser._teacher)
        torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
        assert not any(t.requires_grad for t in criterion.regulariser._teacher.values())

    def test_without_the_trainer_it_refuses(self, classification, tmp_path):
        _, model, criterion, sample = build(classification, tmp_path, "smart")
        criterion.regulariser._teacher = None
        with pytest.raises(RuntimeError, match="--smart-mu.*--user-dir"):
            criterion(model, sample)


class TestDropoutMasks:
    def divergence(self, data, tmp_path, name, term, *more):
        _, model, criterion, sample = build(data, tmp_path, name, *more, dropout=True)
        torch.manual_seed(1)
        return criterion(model, sample)[2][term]

    @pytest.mark.parametrize(
        "name, term, size",
        [("r3f", "symm_kl", "--eps"), ("smart", "smart_adversarial", "--smart-eps")],
    )
    def test_same_dropout_leaves_the_perturbation_alone(
        self, classification, tmp_path, name, term, size
    ):
        """A perturbation of 1e-9 moves nothing, masks of its own do."""
        args = (classification, tmp_path, name, term, size, "1e-9")
        assert self.divergence(*args, "--same-dropout") < 1e-12
        assert self.divergence(*args) > 1e-4

    def test_vat_has_one_mask(self, classification, tmp_path):
        args = (classification, tmp_path, "vat", "vat_kl", "--vat-eps", "1e-9")
        assert self.divergence(*args) < 1e-12

    def test_freelb_has_one_mask_in_all_steps(self, classification, tmp_path):
        """Two steps that go nowhere: the loss is that of one, with its masks."""
        losses = []
        for steps in ("1", "2", "3"):
            more = ["--adv-steps", steps, "--adv-init-mag", "0", "--adv-lr", "0"]
            _, model, criterion, sample = build(
                classification, tmp_path, "freelb", *more, dropout=True
            )
            torch.manual_seed(1)
            losses.append(criterion(model, sample)[0])
        torch.testing.assert_close(losses[1:], [losses[0]] * 2)
