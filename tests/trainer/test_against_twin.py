"""The trainer, in float64 and in fairseq's own train step, against plain twins of the papers."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from tests.helpers import tiny
from tests.helpers.twin import Twin, trainer_of


@pytest.mark.parametrize(
    "ascent, optimizer, more",
    [
        ("sam", "sam_adam", []),
        ("asam", "sam_adam", ["--sam-adaptive"]),
        ("delta_sam", "delta_sam_adam", []),
        ("rw_sam", "delta_sam_adam", ["--delta-sam-weights", "gibbs"]),
    ],
)
@pytest.mark.parametrize("update_freq", [1, 2])
def test_ten_updates_equal_the_twin(classification, tmp_path, ascent, optimizer, more, update_freq):
    """Accumulated or not; bound: float64 rounding, through Adam, over ten updates."""
    trainer = trainer_of(classification, tmp_path, optimizer, *more)
    twin = Twin(trainer, ascent)
    micro_batches = tiny.batches(trainer) * 5
    for at in range(0, 10 * update_freq, update_freq):
        samples = micro_batches[at : at + update_freq]
        trainer.train_step(samples)
        twin.step(samples)
    found = parameters_to_vector(list(trainer.get_model().parameters())).detach()
    assert (found - twin.w).abs().max() < 1e-9
    start = parameters_to_vector(
        list(trainer_of(classification, tmp_path, "adam").get_model().parameters())
    )
    assert (found - start).abs().max() > 5e-3  # ten steps of 1e-3 went somewhere


def test_delta_sam_is_not_sam(classification, tmp_path):
    """The test above can tell the two apart: their weights differ far beyond its bound."""
    ends = []
    for optimizer in ("sam_adam", "delta_sam_adam"):
        trainer = trainer_of(classification, tmp_path, optimizer)
        for sample in tiny.batches(trainer):
            trainer.train_step([sample])
        ends.append(parameters_to_vector(list(trainer.get_model().parameters())).detach())
    assert (ends[0] - ends[1]).abs().max() > 1e-5


def test_micro_batches_equal_the_large_batch(classification, tmp_path):
    """4 x 8 sentences give the update of 1 x 32, weights and all, to float64 rounding."""
    ends = []
    for size in (8, 32):
        trainer = trainer_of(classification, tmp_path, "delta_sam_adam")
        for _ in range(3):
            trainer.train_step(tiny.batches(trainer, size))
        ends.append(parameters_to_vector(list(trainer.get_model().parameters())).detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-10


def test_ragged_micro_batches_equal_the_large_batch(classification, tmp_path):
    """5 + 13 + 13 + 1 sentences are 32 sentences."""
    ends = []
    for sizes in ((32,), (5, 13, 13, 1)):
        trainer = trainer_of(classification, tmp_path, "delta_sam_adam")
        tiny.batches(trainer)
        dataset, at, samples = trainer.task.dataset("train"), 0, []
        for size in sizes:
            samples.append(dataset.collater([dataset[i] for i in range(at, at + size)]))
            at += size
        trainer.train_step(samples)
        ends.append(parameters_to_vector(list(trainer.get_model().parameters())).detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-10


def test_frozen_parameters_stay_and_are_not_perturbed(classification, tmp_path):
    trainer = trainer_of(classification, tmp_path, "delta_sam_adam")
    frozen = trainer.get_model().encoder.sentence_encoder.embed_tokens.weight
    frozen.requires_grad_(False)
    before, seen = frozen.data.clone(), []
    trainer.get_model().register_forward_pre_hook(lambda *_: seen.append(frozen.data.clone()))
    for sample in tiny.batches(trainer):
        trainer.train_step([sample])
    assert len(seen) >= 12 and all(torch.equal(s, before) for s in seen)
    assert torch.equal(frozen, before)


def test_parameter_without_gradient_is_left_alone(classification, tmp_path):
    """The language-model head takes no part in classification: probed, but never perturbed."""
    trainer = trainer_of(classification, tmp_path, "delta_sam_adam")
    idle = trainer.get_model().encoder.lm_head.dense.weight
    before = idle.data.clone()
    for sample in tiny.batches(trainer):
        trainer.train_step([sample])
    assert idle.grad is None and torch.equal(idle, before)


def test_every_forward_of_an_update_sees_the_same_masks(classification, tmp_path):
    """With dropout on: clean, probe and descent draw the same masks, another update others."""
    argv = tiny.arguments(classification, tmp_path, "--optimizer", "delta_sam_adam")
    trainer = tiny.build_trainer([*argv, "--dropout", "0.3"])
    drawn = []
    trainer.get_model().register_forward_pre_hook(
        lambda *_: drawn.append(torch.random.get_rng_state())
    )
    first, second = tiny.batches(trainer)[:2]
    trainer.train_step([first])
    assert len(drawn) >= 3 and all(torch.equal(state, drawn[0]) for state in drawn)
    drawn_first = drawn[0]
    trainer.train_step([second])
    assert not torch.equal(drawn[-1], drawn_first)


def test_number_of_forwards(classification, tmp_path):
    """Shared forward: clean, probe, descent. Accumulated: clean and probe, ascent, descent."""
    trainer = trainer_of(classification, tmp_path, "delta_sam_adam")
    with_graph, calls = [], []
    trainer.get_model().register_forward_hook(
        lambda *_: (calls if not torch.is_grad_enabled() else with_graph).append(1)
    )
    samples = tiny.batches(trainer)
    trainer.train_step(samples[:1])  # the first update checks the criterion, with two more
    with_graph.clear(), calls.clear()
    trainer.train_step(samples[:1])
    assert (len(with_graph), len(calls)) == (2, 1)
    with_graph.clear(), calls.clear()
    trainer.train_step(samples[:2])
    assert (len(with_graph), len(calls)) == (4, 4)


@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_model_counts_an_update_once_at_w(
    classification, tmp_path, monkeypatch, optimizer, micro_batches
):
    """A model may step an EMA teacher in set_num_updates."""
    trainer = trainer_of(classification, tmp_path, optimizer)
    samples, model, seen = tiny.batches(trainer), trainer.get_model(), []
    original = type(model).set_num_updates

    def recording(self, num_updates):
        if self is model:
            seen.append((num_updates, self.training, tiny.weights(trainer)))
        original(self, num_updates)

    monkeypatch.setattr(type(model), "set_num_updates", recording)
    for update in range(2):
        before = tiny.weights(trainer)
        trainer.train_step(samples[:micro_batches])
        ((number, training, found),) = seen
        assert (number, training) == (update, True)
        assert all(map(torch.equal, found, before))
        seen.clear()
