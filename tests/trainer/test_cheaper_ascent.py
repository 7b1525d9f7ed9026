"""An ascent from a fraction of the sentences, every k-th update, or of some weights only."""

import math
import re

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from deltasam_fairseq.algorithms import SENTENCES, update_generator
from deltasam_fairseq.algorithms.reference import delta_sam_reference, gradient, perturbation
from deltasam_fairseq.optim import sharpness_aware
from deltasam_fairseq.trainer.subsampling import draw_sentences
from tests.helpers import tiny
from tests.helpers.twin import BETA, RHO, SEED, Twin, trainer_of

OPTIMIZERS = ["sam_adam", "delta_sam_adam"]
CRITERIONS = [
    *("sentence_prediction", "sentence_ranking", "masked_lm", "label_smoothed_cross_entropy"),
    *("r3f", "r_drop", "freelb", "smart", "vat", "seq2seq_r3f", "seq2seq_r_drop"),
]
HALF = ["--bf16", "--memory-efficient-bf16", "--memory-efficient-fp16"]
CHEAPER = {
    "a fraction": ["--sam-ascent-fraction", "0.4"],
    "some weights": ["--sam-only", "layer_norm"],
    "both, every other": [
        *("--sam-ascent-fraction", "0.4", "--sam-only", "layer_norm", "--sam-every", "2"),
    ],
}


def end(trainer):
    return parameters_to_vector(list(trainer.get_model().parameters())).detach()


def record_ascents(trainer):
    """Note of every ascent: number of updates done, weights that had a gradient, eps*."""
    sam, seen = sharpness_aware(trainer.optimizer).core, []
    ascend = sam.ascend

    def recording(params, seed, update):
        model = trainer.get_model()
        graded = {name for name, p in model.named_parameters() if p.grad is not None}
        before = end(trainer)
        ascent = ascend(params, seed, update)
        seen.append((update, graded, end(trainer) - before))
        return ascent

    sam.ascend = recording
    return seen


def record_forwards(trainer):
    """Note of every forward: its tokens, and whether it had a graph."""
    model, seen = trainer.get_model(), []
    forward = model.forward

    def recording(src_tokens, **kwargs):
        seen.append((src_tokens, torch.is_grad_enabled()))
        return forward(src_tokens=src_tokens, **kwargs)

    model.forward = recording
    return seen


class TestReducesTo:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize(
        "more",
        [["--sam-ascent-fraction", "1"], ["--sam-every", "1"], ["--sam-only", "."]],
        ids=" ".join,
    )
    def test_without_the_option_bitwise(self, classification, tmp_path, optimizer, more):
        """All sentences, every update, all weights; with dropout."""
        ends = []
        for options in ([], more):
            argv = tiny.arguments(classification, tmp_path, "--optimizer", optimizer, *options)
            trainer = tiny.build_trainer(argv)
            samples = tiny.batches(trainer)
            for micro_batches in (samples[:1], samples[1:2], samples[2:]):
                trainer.train_step(micro_batches)
            ends.append(end(trainer))
        assert torch.equal(*ends)

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_updates_between_ascents_are_the_base_optimizers(
        self, classification, tmp_path, optimizer
    ):
        """An ascent in update 0 only: from there on, Adam with the same state is the same."""
        ends = []
        for only_first in (["--sam-every", "9"], ["--sam-every", "1"]):
            argv = tiny.arguments(classification, tmp_path, "--optimizer", optimizer, *only_first)
            trainer = tiny.build_trainer(argv)
            samples = tiny.batches(trainer)
            trainer.train_step(samples[:1])
            sam = sharpness_aware(trainer.optimizer)
            if only_first[1] == "1":
                sam.core.parts.radius.rho = 0.0  # the base optimizer, bit for bit
            for sample in samples[1:]:
                trainer.train_step([sample])
            ends.append(end(trainer))
        assert torch.equal(*ends)


class FractionTwin(Twin):
    """Takes the ascent step of half of the sentences of every micro-batch."""

    def eps_star(self, losses):
        n = len(losses(self.w))
        micro_batches = [range(at, at + 8) for at in range(0, n, 8)]
        kept = torch.zeros(n, dtype=torch.float64)
        weights = torch.full_like(kept, 1.0 / n)
        if self.ascent == "sam":
            generator = update_generator(SEED, self.updates, SENTENCES, torch.device("cpu"))
            for numbers in micro_batches:
                kept[numbers.start + draw_sentences(8, 0.5, generator)] = 1
        else:
            found = delta_sam_reference(losses, self.w, self.direction(), RHO, BETA)
            weights = found.weights
            for numbers in micro_batches:
                sizes = found.a[list(numbers)].abs().tolist()
                largest = sorted(range(8), key=lambda i: -sizes[i])[:4]
                kept[[numbers.start + i for i in largest]] = 1
        return perturbation(gradient(losses, self.w, kept * weights), RHO)


class OnlyTwin(Twin):
    """Probes and perturbs in the space of the layer normalisations."""

    def eps_star(self, losses):
        chosen = torch.cat(
            [torch.full_like(p, "layer_norm" in name).flatten() for name, p in self.named]
        )
        n = len(losses(self.w))
        weights = torch.full((n,), 1.0 / n, dtype=torch.float64)
        if self.ascent == "delta_sam":
            u = self.direction_of([name for name, _ in self.named if "layer_norm" in name])
            weights = delta_sam_reference(losses, self.w, u, RHO, BETA).weights
        return perturbation(chosen * gradient(losses, self.w, weights), RHO)

    def direction_of(self, names):
        """u over the chosen weights alone, 0 elsewhere."""
        everything, self.named = self.named, [(n, p) for n, p in self.named if n in names]
        drawn = self.unflatten(self.direction())
        self.named = everything
        return torch.cat([drawn.get(n, torch.zeros_like(p)).flatten() for n, p in everything])


@pytest.mark.parametrize(
    "twin_class, more",
    [
        (FractionTwin, ["--sam-ascent-fraction", "0.5"]),
        (OnlyTwin, ["--sam-only", "layer_norm"]),
    ],
    ids=["fraction", "only"],
)
@pytest.mark.parametrize("ascent", ["sam", "delta_sam"])
@pytest.mark.parametrize("update_freq", [1, 2])
def test_six_updates_equal_the_twin(
    classification, tmp_path, twin_class, more, ascent, update_freq
):
    """Accumulated or not; bound: float64 rounding, through Adam, over six updates."""
    trainer = trainer_of(classification, tmp_path, f"{ascent}_adam", *more)
    twin = twin_class(trainer, ascent)
    whole = Twin(trainer, ascent)
    micro_batches = tiny.batches(trainer) * 3
    for at in range(0, 6 * update_freq, update_freq):
        samples = micro_batches[at : at + update_freq]
        trainer.train_step(samples)
        twin.step(samples)
        whole.step(samples)
    assert (end(trainer) - twin.w).abs().max() < 1e-9
    assert (end(trainer) - whole.w).abs().max() > 1e-6  # the option makes a difference


class TestFraction:
    @pytest.mark.parametrize(
        "optimizer, micro_batches, forwards",
        [
            ("sam_adam", 1, [(2, True), (8, True)]),
            ("sam_adam", 2, [(2, True)] * 2 + [(8, True)] * 2),
            ("delta_sam_adam", 1, [(8, False)] * 2 + [(2, True), (8, True)]),
            ("delta_sam_adam", 2, [(8, False)] * 4 + [(2, True)] * 2 + [(8, True)] * 2),
        ],
    )
    def test_forwards_of_an_update(
        self, classification, tmp_path, optimizer, micro_batches, forwards
    ):
        trainer = trainer_of(classification, tmp_path, optimizer, "--sam-ascent-fraction", "0.25")
        samples = tiny.batches(trainer)[:micro_batches]
        trainer.train_step(samples)  # the first update checks the criterion, with two more
        seen = record_forwards(trainer)
        trainer.train_step(samples)
        assert [(len(tokens), graph) for tokens, graph in seen] == forwards

    def test_other_sentences_in_every_update_and_micro_batch(self, classification, tmp_path):
        trainer = trainer_of(classification, tmp_path, "sam_adam", "--sam-ascent-fraction", "0.25")
        sample, seen = tiny.batches(trainer)[0], record_forwards(trainer)
        for _ in range(4):
            trainer.train_step([sample, sample])
        drawn = [str(tokens.tolist()) for tokens, _ in seen if len(tokens) == 2]
        assert len(drawn) == 8 and len(set(drawn)) > 4

    def test_log_of_delta_sam_is_that_of_all_sentences(self, classification, tmp_path):
        """In the first update nothing but sam_loss and ascent_gnorm can tell it."""
        logs = []
        for more in ([], ["--sam-ascent-fraction", "0.25"]):
            trainer = trainer_of(classification, tmp_path, "delta_sam_adam", *more)
            with tiny.metrics.aggregate() as log:
                trainer.train_step(tiny.batches(trainer)[:2])
            logs.append({key: log[key].avg for key in SAME_IN_THE_LOG})
            assert log["sharpness"].avg == pytest.approx(log["sam_loss"].avg - log["loss"].avg)
        assert logs[0] == logs[1]

    def test_log_of_sam_is_an_estimate(self, classification, tmp_path):
        """loss is that of the drawn sentences; the batch is logged in its full size; sharpness,
        which would compare different sentences, is not logged."""
        trainer = trainer_of(classification, tmp_path, "sam_adam", "--sam-ascent-fraction", "0.25")
        twin, samples = Twin(trainer, "sam"), tiny.batches(trainer)[:2]
        losses = twin.losses(samples)
        generator = update_generator(SEED, 0, SENTENCES, torch.device("cpu"))
        kept = torch.cat([8 * i + draw_sentences(8, 0.25, generator) for i in range(2)])
        weights = torch.zeros(16, dtype=torch.float64)
        weights[kept] = 1 / 4
        g = gradient(losses, twin.w, weights)
        with tiny.metrics.aggregate() as log:
            trainer.train_step(samples)
        assert log["bsz"].avg == 16
        bits = 1 / math.log(2)  # fairseq logs sentence_prediction's loss in base 2
        assert log["loss"].avg == pytest.approx(bits * losses(twin.w)[kept].mean().item())
        everywhere = losses(twin.w + perturbation(g, RHO))
        assert log["sam_loss"].avg == pytest.approx(bits * everywhere.mean().item())
        assert log["ascent_gnorm"].avg == pytest.approx(g.norm().item())
        assert "sharpness" not in log

    @pytest.mark.parametrize("criterion", CRITERIONS)
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_every_criterion_trains(self, data_of, tmp_path, criterion, optimizer):
        """Ragged: of the last micro-batch there is one sentence; accumulated and not."""
        argv = tiny.arguments(data_of[criterion], tmp_path, "--dropout", "0.1", criterion=criterion)
        argv += ["--optimizer", optimizer, "--sam-ascent-fraction", "0.3"]
        trainer = tiny.build_trainer(argv)
        seen, dataset = record_ascents(trainer), trainer.task.dataset("train")
        samples = [*tiny.batches(trainer)[:3], dataset.collater([dataset[0]])]
        for micro_batches in (samples[:1], samples[1:]):
            log = trainer.train_step(micro_batches)
            assert torch.isfinite(torch.as_tensor(log["loss"]))
        assert [update for update, _, _ in seen] == [0, 1]
        for _, _, eps in seen:
            assert eps.norm() == pytest.approx(RHO, rel=1e-3)

    def test_mini_batch_is_not_changed(self, classification, tmp_path):
        trainer = trainer_of(classification, tmp_path, "sam_adam", "--sam-ascent-fraction", "0.25")
        samples, again = tiny.batches(trainer), tiny.batches(trainer)
        trainer.train_step(samples)
        torch.testing.assert_close(samples, again, rtol=0, atol=0)


SAME_IN_THE_LOG = (
    *("loss", "bsz", "wpb", "delta_sam_effective", "delta_sam_r", "delta_sam_negative"),
)


class TestOnly:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_others_do_not_move_and_have_no_gradient_in_the_ascent(
        self, classification, tmp_path, optimizer
    ):
        """In all forwards, those of probe and descent too; then every weight makes its step."""
        trainer = trainer_of(classification, tmp_path, optimizer, "--sam-only", "layer_norm")
        model, moved, graded = trainer.get_model(), [], []
        own = {name: p.data.clone() for name, p in model.named_parameters()}

        def note(*_):
            moved.append({n for n, p in model.named_parameters() if not torch.equal(p, own[n])})

        model.register_forward_pre_hook(note)
        seen = record_ascents(trainer)
        step = trainer.optimizer.step
        trainer.optimizer.step = lambda *a, **k: (
            graded.append({n for n, p in model.named_parameters() if p.grad is not None}),
            step(*a, **k),
        )
        trainer.train_step(tiny.batches(trainer)[:1])
        norms = {name for name in own if "layer_norm" in name}
        assert len(norms) == 10 and moved[-1] and all(m <= norms for m in moved)
        assert seen[0][1] <= norms and len(seen[0][1]) >= 8
        assert seen[0][2].norm() == pytest.approx(RHO)
        plain = trainer_of(classification, tmp_path, "adam")
        plain.train_step(tiny.batches(plain)[:1])
        used = {n for n, p in plain.get_model().named_parameters() if p.grad is not None}
        assert graded[0] == used
        ends = dict(model.named_parameters())
        assert all(
            not torch.equal(ends[name], own[name]) for name in graded[0] if ".k_" not in name
        )
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize(
        "pattern, names",
        [
            ("layer_norm", lambda name: "layer_norm" in name),
            (r"layers\.0\..*weight$", lambda n: "layers.0." in n and n.endswith("weight")),
            ("^classification_heads", lambda name: name.startswith("classification_heads")),
        ],
    )
    def test_pattern_is_searched_in_names(self, classification, tmp_path, caplog, pattern, names):
        caplog.set_level("INFO")
        trainer = trainer_of(classification, tmp_path, "sam_adam", "--sam-only", pattern)
        named = list(trainer.get_model().named_parameters())
        _ = trainer.optimizer
        found = trainer._ascent_step._weights.parameters()
        assert [id(p) for p in found] == [id(p) for n, p in named if names(n)]
        some, all_ = sum(p.numel() for p in found), sum(p.numel() for _, p in named)
        assert f"{some:,} of {all_:,} weights are perturbed" in caplog.text
        assert f"of weights that match {pattern}" in caplog.text

    def test_copy_of_the_weights_is_of_these_only(self, classification, tmp_path):
        trainer = trainer_of(classification, tmp_path, "delta_sam_adam", "--sam-only", "layer_norm")
        trainer.train_step(tiny.batches(trainer)[:1])
        copied = sharpness_aware(trainer.optimizer).core.weights._buffers
        assert sum(buffer.numel() for buffer in copied.values()) == 10 * 16

    def test_pattern_that_matches_nothing(self, classification, tmp_path):
        trainer = trainer_of(classification, tmp_path, "sam_adam", "--sam-only", "LayerNorm")
        message = "--sam-only LayerNorm: no name of a trained weight matches.*layer_norm.*"
        with pytest.raises(ValueError, match=message):
            _ = trainer.optimizer

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_weights_that_take_no_part(self, classification, tmp_path, optimizer):
        trainer = trainer_of(classification, tmp_path, optimizer, "--sam-only", "lm_head.dense")
        message = "--sam-only lm_head.dense: the loss depends on none"
        with pytest.raises(ValueError, match=message):
            trainer.train_step(tiny.batches(trainer)[:1])
        assert all(p.requires_grad for p in trainer.get_model().parameters())

    def test_frozen_weights_stay_frozen(self, classification, tmp_path):
        trainer = trainer_of(classification, tmp_path, "sam_adam", "--sam-only", "layer_norm")
        frozen = [p for n, p in trainer.get_model().named_parameters() if "layers.0" in n]
        for p in frozen:
            p.requires_grad_(False)
        before = [p.data.clone() for p in frozen]
        trainer.train_step(tiny.batches(trainer)[:1])
        assert not any(p.requires_grad for p in frozen)
        assert all(torch.equal(p, b) for p, b in zip(frozen, before))

    @pytest.mark.parametrize("criterion", CRITERIONS)
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_every_criterion_trains(self, data_of, tmp_path, criterion, optimizer):
        argv = tiny.arguments(data_of[criterion], tmp_path, "--dropout", "0.1", criterion=criterion)
        argv += ["--optimizer", optimizer, "--sam-only", "layer_norm"]
        trainer = tiny.build_trainer(argv)
        seen, samples = record_ascents(trainer), tiny.batches(trainer)
        for micro_batches in (samples[:1], samples[1:3]):
            trainer.train_step(micro_batches)
        named = trainer.get_model().named_parameters()
        norms = torch.cat([torch.full_like(p, "layer_norm" in n).flatten() for n, p in named])
        for _, graded, eps in seen:
            assert graded and all("layer_norm" in name for name in graded)
            assert eps.norm() == pytest.approx(RHO, rel=1e-3)
            assert not eps[norms == 0].any()


@pytest.mark.parametrize(
    "every, start, expected",
    [(1, 0, range(7)), (3, 0, [0, 3, 6]), (3, 2, [2, 5]), (9, 0, [0])],
)
def test_updates_with_an_ascent_step(classification, tmp_path, every, start, expected):
    options = ["--sam-every", str(every), "--sam-start-update", str(start)]
    trainer = trainer_of(classification, tmp_path, "sam_adam", *options)
    seen, samples = record_ascents(trainer), tiny.batches(trainer) * 2
    for sample in samples[:7]:
        trainer.train_step([sample])
    assert [update for update, _, _ in seen] == list(expected)


def test_description_says_it(classification, tmp_path, caplog):
    caplog.set_level("INFO")
    options = [*CHEAPER["both, every other"], "--sam-start-update", "4"]
    for optimizer, which in (("sam_adam", "a random"), ("delta_sam_adam", "the most unguarded")):
        _ = trainer_of(classification, tmp_path, optimizer, *options).optimizer
        message = (
            f"ascent from {which} 0.4 of the sentences, of weights that match layer_norm, "
            "one update in 2, from update 4 on"
        )
        assert re.search(message, caplog.text)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("option", CHEAPER)
@pytest.mark.parametrize("mode", [*HALF, "--sam-adaptive", "rank"])
def test_with_other_options(classification, tmp_path, optimizer, option, mode):
    """Half precision, ASAM, rank scope: the ascent has its length, the weights come back."""
    more = ["--sam-scope", "rank"] if mode == "rank" else [mode]
    argv = tiny.arguments(classification, tmp_path, "--optimizer", optimizer, "--lr", "0")
    trainer = tiny.build_trainer([*argv, *CHEAPER[option], *more, "--fp16-init-scale", "4"])
    _ = trainer.optimizer
    before, seen, samples = end(trainer).clone(), record_ascents(trainer), tiny.batches(trainer)
    for micro_batches in (samples[:1], samples[1:3]):
        trainer.train_step(micro_batches)
    assert trainer.get_num_updates() == 2
    assert torch.equal(end(trainer), before)
    for _, _, eps in seen:
        size = eps.double().norm().item()
        assert size > 0 if mode == "--sam-adaptive" else size == pytest.approx(RHO, rel=0.3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("option", ["a fraction", "some weights"])
def test_ascent_that_is_not_finite_is_fairseqs_to_handle(
    classification, tmp_path, optimizer, option
):
    argv = tiny.arguments(classification, tmp_path, "--optimizer", optimizer, *CHEAPER[option])
    trainer = tiny.build_trainer(argv)
    before = end(trainer)
    norm = trainer.get_model().encoder.sentence_encoder.layers[0].final_layer_norm
    norm.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match="Nan/Inf"):
        trainer.train_step(tiny.batches(trainer)[:1])
    assert torch.equal(end(trainer), before)
    assert all(p.requires_grad for p in trainer.get_model().parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("option", ["a fraction", "some weights"])
def test_ascent_that_runs_out_of_memory_skips_the_batch(
    classification, tmp_path, monkeypatch, optimizer, option
):
    trainer = trainer_of(classification, tmp_path, optimizer, *CHEAPER[option])
    before, backward = end(trainer), trainer.optimizer.backward

    def fail(loss):
        raise RuntimeError("CUDA out of memory.")

    trainer.optimizer.backward = fail
    monkeypatch.setattr(trainer, "_log_oom", lambda _: None)
    assert trainer.train_step(tiny.batches(trainer)[:1]) is None
    assert torch.equal(end(trainer), before) and trainer.get_num_updates() == 0
    assert all(p.requires_grad for p in trainer.get_model().parameters())
    trainer.optimizer.backward = backward
    trainer.train_step(tiny.batches(trainer)[:1])
    assert trainer.get_num_updates() == 1
