"""Runs with --lr-scheduler swa_X: what is averaged, validated, saved, and resumed."""

import json

import fairseq_cli.train
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.optim.fp16_optimizer import FP16Optimizer

from deltasam_fairseq.trainer import averaging as averaging_trainer
from deltasam_fairseq.trainer.checkpoint_state import WEIGHT_AVERAGE
from deltasam_fairseq.trainer.sharpness_aware import SharpnessAwareTrainer
from deltasam_fairseq.trainer.weight_average import WeightAverage
from tests.helpers import runs, tiny
from tests.helpers.parameter_criterion import ParameterCriterion  # noqa: F401

SWA = ["--lr-scheduler", "swa_polynomial_decay", "--total-num-update", "20"]
PLAIN = ["--lr-scheduler", "polynomial_decay", "--total-num-update", "20"]
OPTIMIZERS = ["adam", "sam_adam", "delta_sam_adam"]
MODES = {
    "fp32": [],
    "fp16": ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4"],
    "bf16": ["--bf16"],
    "memory-efficient-fp16": ["--memory-efficient-fp16", "--fp16-init-scale", "4"],
    "memory-efficient-bf16": ["--memory-efficient-bf16"],
}
with_every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
in_every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def passed(monkeypatch):
    """Weights that the runs of this test pass through: updates done -> name -> copy."""
    seen = {}
    train_step = SharpnessAwareTrainer.train_step

    def recording(self, *args, **kwargs):
        stats = train_step(self, *args, **kwargs)
        seen[self.get_num_updates()] = {n: v.clone() for n, v in self._raw().items()}
        return stats

    monkeypatch.setattr(SharpnessAwareTrainer, "train_step", recording)
    return seen


def mean(passed, updates):
    """float64 mean of recorded weights."""
    names = passed[updates[0]]
    return {n: sum(passed[u][n].double() for u in updates) / len(updates) for n in names}


def assert_model_is(checkpoint, expected):
    """The model of a checkpoint, and the average in it, are these float64 weights."""
    state = checkpoint["extra_state"][WEIGHT_AVERAGE]
    for name, value in expected.items():
        owner, key = name.split(".", 1)
        torch.testing.assert_close(checkpoint[owner][key], value.float())
        assert torch.equal(checkpoint[owner][key], state["averages"][name])


# options -> updates whose weights are averaged, in a run of 6 updates, 4 an epoch
SCHEDULES = {
    "--swa-start 3": [3, 4, 5, 6],
    "--swa-start 0": [1, 2, 3, 4, 5, 6],
    "--swa-start 0.5": [3, 4, 5, 6],
    "--swa-start 6": [6],
    "--swa-start 1ep": [4, 5, 6],
    "--swa-start 2 --swa-every 2": [2, 4, 6],
    "--swa-start 2 --swa-every 3": [2, 5],
    "--swa-start 0 --swa-every 4": [4],
    "--swa-start 0 --swa-every epoch": [4],
    "--swa-start 1ep --swa-every epoch": [4],
    "--swa-start 1 --swa-cycle-length 2 --swa-lr 1e-3": [1, 3, 5],
    "--swa-start 0.5 --swa-lr 1e-3 --swa-anneal 2 --swa-device cpu": [3, 4, 5, 6],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_averaged(classification, tmp_path, passed, schedule):
    run = runs.train(classification, tmp_path, *SWA, *schedule.split())
    updates = SCHEDULES[schedule]
    assert run.checkpoint["extra_state"][WEIGHT_AVERAGE]["n"] == len(updates)
    assert_model_is(run.checkpoint, mean(passed, updates))
    logged = [update.get("swa_n") for update in run.updates]
    n = [sum(u <= update for u in updates) for update in range(1, 7)]
    assert [int(found or 0) for found in logged] == n


def test_epochs_with_accumulation(classification, tmp_path, passed):
    """4 batches are 2 updates; the last of an epoch of 32 sentences in batches of 12 is short."""
    options = ["--update-freq", "2", "--batch-size", "12", "--swa-start", "0"]
    run = runs.train(
        classification, tmp_path, *SWA, *options, "--swa-every", "epoch", "--max-update", "4"
    )
    assert_model_is(run.checkpoint, mean(passed, [2, 4]))


def test_exponential(classification, tmp_path, passed):
    """The mean of the first four; then 3/4 of the average and 1/4 of the weights."""
    options = ["--swa-start", "1", "--swa-decay", "0.75"]
    run = runs.train(classification, tmp_path, *SWA, *options)
    expected = {
        name: 0.75 * (0.75 * first + 0.25 * passed[5][name]) + 0.25 * passed[6][name]
        for name, first in mean(passed, [1, 2, 3, 4]).items()
    }
    assert_model_is(run.checkpoint, expected)


def test_the_exponential_average_begins_as_the_uniform_one():
    """Of 8, 0, 4, 0 the means are 8, 4, 4, 3; then 3/4 of 3 and 1/4 of 7 are 4."""
    average = WeightAverage({"w": torch.nn.Parameter(torch.zeros(1))}, decay=0.75, on_cpu=False)
    found = []
    for value in (8.0, 0.0, 4.0, 0.0, 7.0):
        average.add({"w": torch.tensor([value])})
        found.append(average.averages["w"].item())
    assert found == pytest.approx([8, 4, 4, 3, 4])


def test_the_average_of_one_is_a_copy(classification, tmp_path, passed):
    run = runs.train(classification, tmp_path, *SWA, "--swa-start", "6")
    for name, value in passed[6].items():
        assert torch.equal(run.checkpoint["model"][name.split(".", 1)[1]], value)


@with_every_optimizer
def test_training_does_not_see_it(classification, tmp_path, optimizer):
    """Weights, optimizer state and log are those of a run without, bit for bit."""
    options = ["--optimizer", optimizer, "--max-epoch", "2", "--max-update", "0"]
    swa = ["--swa-start", "2", "--swa-validate-both"]
    plain = runs.train(classification, tmp_path / "plain", *PLAIN, *options, validate=True)
    run = runs.train(classification, tmp_path / "swa", *SWA, *swa, *options, validate=True)
    for name, value in run.checkpoint["extra_state"][WEIGHT_AVERAGE]["raw"].items():
        assert torch.equal(plain.checkpoint["model"][name.split(".", 1)[1]], value)
    key = "last_optimizer_state"
    runs.assert_same(run.checkpoint[key], plain.checkpoint[key])
    assert [u["loss"] for u in run.updates] == [u["loss"] for u in plain.updates]


@pytest.mark.parametrize("device", ["model", "cpu"])
def test_its_memory_is_taken_before_the_first_update(classification, tmp_path, device):
    """The tensors of the average are those that were there when the trainer was built."""
    options = ["--swa-start", "2", "--swa-device", device]
    trainer = tiny.build_trainer(tiny.arguments(classification, tmp_path, *SWA, *options))
    assert trainer.get_lr() > 0  # as fairseq's main asks before it trains
    average = trainer.weight_average
    addresses = [tensor.data_ptr() for tensor in average._averages.values()]
    assert len(addresses) == len(trainer._raw()) and average.averages == {}
    for sample in tiny.batches(trainer)[:3]:
        trainer.train_step([sample])
    assert average.n == 2
    assert [tensor.data_ptr() for tensor in average.averages.values()] == addresses


def test_shared_and_frozen_weights_and_buffers(classification, tmp_path, monkeypatch):
    """Token embeddings are the language model's head too; positions are frozen here."""
    trainer = tiny.build_trainer(tiny.arguments(classification, tmp_path, *SWA, "--swa-start", "1"))
    model = trainer.get_model()
    positions = model.encoder.sentence_encoder.embed_positions.weight
    positions.requires_grad = False
    model.register_buffer("numbers", torch.tensor([1, 2]))
    for sample in tiny.batches(trainer)[:3]:
        trainer.train_step([sample])
        model.numbers += 1
    averages = trainer.weight_average.averages
    trainer.consolidate_optimizer()
    names = [name for name in averages if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(names) == 1
    assert not any("embed_positions" in name or "numbers" in name for name in averages)
    saved = trainer.state_dict()["model"]
    assert torch.equal(saved["numbers"], torch.tensor([4, 5]))
    assert torch.equal(saved["encoder.sentence_encoder.embed_positions.weight"], positions)
    tied = [saved[f"encoder.{n}.weight"] for n in ("sentence_encoder.embed_tokens", "lm_head")]
    assert torch.equal(*tied) and torch.equal(tied[0], averages[names[0]])
    assert not torch.equal(tied[0], model.encoder.lm_head.weight)


def test_the_criterions_own_weights(classification, tmp_path, passed):
    options = ["--criterion", "parameter_criterion", "--swa-start", "3"]
    run = runs.train(classification, tmp_path, *SWA, *options)
    assert_model_is(run.checkpoint, mean(passed, [3, 4, 5, 6]))
    assert "criterion.temperature" in passed[3]


class TestValidation:
    def test_of_the_average(self, classification, tmp_path, monkeypatch, passed):
        """What the model's forward sees in validation is the average of the weights so far."""
        seen = {}
        valid_step = SharpnessAwareTrainer.valid_step

        def looking(self, *args, **kwargs):
            named = self._trained_by_name()
            seen[self.get_num_updates()] = {n: p.data.clone() for n, p in named.items()}
            return valid_step(self, *args, **kwargs)

        monkeypatch.setattr(SharpnessAwareTrainer, "valid_step", looking)
        options = ["--max-epoch", "2", "--max-update", "0", "--swa-start", "3"]
        run = runs.train(classification, tmp_path, *SWA, *options, validate=True)
        for update, averaged in ((4, [3, 4]), (8, [3, 4, 5, 6, 7, 8])):
            for name, value in mean(passed, averaged).items():
                torch.testing.assert_close(seen[update][name], value.float())
        logged = [json.loads(m) for m in run.messages if '"valid_loss"' in m]
        assert [line["valid_swa_n"] for line in logged] == ["2", "6"]

    def test_best_checkpoint_and_both(self, classification, tmp_path):
        """The best file is scored as fairseq-validate scores it; valid_raw has no part in it."""
        options = ["--max-epoch", "3", "--max-update", "0", "--lr", "3e-2"]
        swa = [*SWA, *options, "--swa-start", "2", "--swa-validate-both"]
        run = runs.train(classification, tmp_path / "swa", *swa, validate=True)
        plain = runs.train(classification, tmp_path / "plain", *PLAIN, *options, validate=True)
        lines = [json.loads(m) for m in run.messages if m[:1] == "{"]
        raw = [line["valid_raw_loss"] for line in lines if "valid_raw_loss" in line]
        valid = [line["valid_loss"] for line in lines if "valid_loss" in line]
        own = [json.loads(m)["valid_loss"] for m in plain.messages if '"valid_loss"' in m]
        assert raw == own and raw != valid and len(raw) == 3
        assert not any("valid_raw_best_loss" in line for line in lines)
        best = runs.load(tmp_path / "swa" / "checkpoint_best.pt")
        assert best["extra_state"]["val_loss"] == min(map(float, valid))

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
    def test_weights_come_back_however_it_ends(self, classification, tmp_path, monkeypatch, error):
        trainer = tiny.build_trainer(
            tiny.arguments(classification, tmp_path, *SWA, "--swa-start", "1")
        )
        for sample in tiny.batches(trainer)[:3]:
            trainer.train_step([sample])
        before = tiny.weights(trainer)
        trainer.consolidate_optimizer()
        state = trainer.state_dict()

        def fail(*_, **__):
            assert not torch.equal(tiny.weights(trainer)[0], before[0])
            runs.assert_same(trainer.state_dict()["model"], state["model"])
            raw = trainer.state_dict()["extra_state"][WEIGHT_AVERAGE]["raw"]
            runs.assert_same(raw, state["extra_state"][WEIGHT_AVERAGE]["raw"])
            raise error("out of memory")

        monkeypatch.setattr(trainer.task, "valid_step", fail)
        trainer.task.load_dataset("valid")
        epoch_itr = trainer.get_train_iterator(1)
        with pytest.raises(error):
            fairseq_cli.train.validate(trainer.cfg, trainer, trainer.task, epoch_itr, ["valid"])
        runs.assert_same(tiny.weights(trainer), before)


class TestCheckpoints:
    @in_every_mode
    @with_every_optimizer
    def test_resumed_is_uninterrupted(self, classification, tmp_path, optimizer, mode):
        """Stopped after 3 updates, in the middle of an epoch, an average of 2 in the file."""
        options = [*SWA, *MODES[mode], "--optimizer", optimizer]
        options += ["--swa-start", "2", "--swa-lr", "1e-3", "--swa-anneal", "3"]
        whole = runs.train(classification, tmp_path / "whole", *options, "--max-update", "7")
        runs.train(classification, tmp_path / "parts", *options, "--max-update", "3")
        parts = runs.train(classification, tmp_path / "parts", *options, "--max-update", "7")
        assert [log["num_updates"] for log in parts.updates] == ["4", "5", "6", "7"]
        assert [log["swa_n"] for log in parts.updates] == ["3", "4", "5", "6"]
        assert [log["lr"] for log in parts.updates] == [log["lr"] for log in whole.updates[3:]]
        runs.assert_same_end(parts, whole)
        states = [run.checkpoint["extra_state"][WEIGHT_AVERAGE] for run in (parts, whole)]
        runs.assert_same(*states)

    @pytest.mark.parametrize("mode", ["fp32", "fp16"])
    def test_stopped_before_averaging_begins(self, classification, tmp_path, monkeypatch, mode):
        options = [*SWA, *MODES[mode], "--swa-start", "5", "--max-update", "7"]
        options += ["--save-interval-updates", "3"]
        whole = runs.train(classification, tmp_path / "whole", *options)
        with monkeypatch.context() as patch:
            step = SharpnessAwareTrainer.train_step

            def interrupted(self, *args):
                if self.get_num_updates() == 3:
                    raise KeyboardInterrupt
                return step(self, *args)

            patch.setattr(SharpnessAwareTrainer, "train_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                runs.train(classification, tmp_path / "parts", *options)
        parts = runs.train(classification, tmp_path / "parts", *options)
        assert [log["num_updates"] for log in parts.updates] == ["4", "5", "6", "7"]
        runs.assert_same_end(parts, whole)
        runs.assert_same(*(run.checkpoint["extra_state"][WEIGHT_AVERAGE] for run in (parts, whole)))

    @in_every_mode
    def test_the_model_is_the_float32_average(self, classification, tmp_path, passed, mode):
        run = runs.train(classification, tmp_path, *SWA, *MODES[mode], "--swa-start", "3")
        assert_model_is(run.checkpoint, mean(passed, [3, 4, 5, 6]))
        raw = run.checkpoint["extra_state"][WEIGHT_AVERAGE]["raw"]
        runs.assert_same(raw, {n: v.float() for n, v in passed[6].items()})

    def test_goes_on_without_averaging(self, classification, tmp_path, caplog):
        """From the weights themselves, with another --lr-scheduler; said in the log."""
        swa = [*SWA, "--swa-start", "1"]
        runs.train(classification, tmp_path / "swa", *swa, "--max-update", "3")
        resumed = runs.train(classification, tmp_path / "swa", *PLAIN, "--max-update", "6")
        whole = runs.train(classification, tmp_path / "plain", *PLAIN, "--max-update", "6")
        runs.assert_same_end(resumed, whole)
        assert "goes on from the weights themselves" in caplog.text
        assert WEIGHT_AVERAGE not in resumed.checkpoint["extra_state"]

    @pytest.mark.parametrize("start, averaged", [("7", [7, 8]), ("1", [6, 7, 8])])
    def test_a_reset_schedule_begins_a_new_average(
        self, classification, tmp_path, passed, caplog, start, averaged
    ):
        """From the weights themselves after 5 updates; the average of 4 is dropped, with a warning.

        A start that is past is the present: the next update's weights are the first.
        """
        runs.train(classification, tmp_path, *SWA, "--swa-start", "2", "--max-update", "5")
        more = ["--swa-start", start, "--reset-lr-scheduler", "--max-update", "8"]
        resumed = runs.train(classification, tmp_path, *SWA, *more)
        assert "average of 4 weights" in caplog.text
        assert f"starts again from update {start} on" in caplog.text
        assert_model_is(resumed.checkpoint, mean(passed, averaged))
        whole = runs.train(classification, tmp_path / "plain", *PLAIN, "--max-update", "8")
        for name, value in resumed.checkpoint["extra_state"][WEIGHT_AVERAGE]["raw"].items():
            assert torch.equal(value, whole.checkpoint["model"][name.split(".", 1)[1]])

    def test_before_a_new_average_has_begun_the_weights_are_saved(self, classification, tmp_path):
        runs.train(classification, tmp_path, *SWA, "--swa-start", "2", "--max-update", "5")
        more = ["--swa-start", "9", "--max-update", "10", "--save-interval-updates", "7"]
        more += ["--reset-lr-scheduler"]
        runs.train(classification, tmp_path, *SWA, *more)
        saved = runs.load(tmp_path / "checkpoint_2_7.pt")
        assert saved["extra_state"][WEIGHT_AVERAGE]["n"] == 0
        for name, value in saved["extra_state"][WEIGHT_AVERAGE]["raw"].items():
            assert torch.equal(value, saved["model"][name.split(".", 1)[1]])

    @pytest.mark.parametrize(
        "first, then, said",
        [
            (["0.5", "4"], "0.5", "--swa-start 0.5, that is update 4"),  # of 7 and of 8 updates
            (["2", "4"], "1ep", "--swa-start 1ep, that is the end of epoch 1"),
            (["0.5", "4"], "2", None),  # half of 4 is 2
            (["6", "6"], "6", None),
        ],
    )
    def test_another_start_does_not_apply_to_an_average_that_has_begun(
        self, classification, tmp_path, caplog, first, then, said
    ):
        """Said at every resumption, as the average that goes on is that of the first start."""
        for start, end in (first, [then, "7"], [then, "8"]):
            caplog.clear()
            options = ["--swa-start", start, "--max-update", end]
            run = runs.train(classification, tmp_path, *SWA, *options)
        if said is None:
            assert "comes too late" not in caplog.text
        else:
            assert said in caplog.text and "began to average at update 2" in caplog.text
            assert run.checkpoint["extra_state"][WEIGHT_AVERAGE]["n"] == 7  # 2 to 8

    def test_a_run_taken_up_after_the_start(self, classification, tmp_path, passed, caplog):
        """The start is then the update of the checkpoint, 4; with every second update 6 is next."""
        runs.train(classification, tmp_path, *PLAIN, "--max-update", "4")
        swa = [*SWA, "--swa-start", "2", "--swa-every", "2"]
        runs.train(classification, tmp_path, *swa, "--max-update", "7")
        run = runs.train(classification, tmp_path, *swa, "--max-update", "8")
        assert_model_is(run.checkpoint, mean(passed, [6, 8]))
        assert "comes too late" not in caplog.text

    def test_a_new_run_starts_from_the_average(self, classification, tmp_path):
        swa = runs.train(classification, tmp_path / "swa", *SWA, "--swa-start", "1")
        start = ["--finetune-from-model", str(tmp_path / "swa" / "checkpoint_last.pt")]
        start += ["--lr", "0", "--max-update", "1"]
        tuned = runs.train(classification, tmp_path / "tuned", *start)
        models = [tiny.without_fused(run.checkpoint["model"]) for run in (tuned, swa)]
        runs.assert_same(*models)

    def test_averaging_begins_when_a_run_without_goes_on(self, classification, tmp_path, passed):
        runs.train(classification, tmp_path, *PLAIN, "--max-update", "3")
        run = runs.train(classification, tmp_path, *SWA, "--swa-start", "1", "--max-update", "6")
        assert_model_is(run.checkpoint, mean(passed, [4, 5, 6]))

    def test_without_optimizer_state_it_is_an_ordinary_file(self, classification, tmp_path, passed):
        options = ["--swa-start", "3", "--no-save-optimizer-state"]
        run = runs.train(classification, tmp_path, *SWA, *options)
        assert WEIGHT_AVERAGE not in run.checkpoint["extra_state"]
        for name, value in mean(passed, [3, 4, 5, 6]).items():
            torch.testing.assert_close(run.checkpoint["model"][name[6:]], value.float())

    def test_the_average_is_in_the_file_once(self, classification, tmp_path):
        """One float32 copy more than without averaging: the weights themselves."""
        swa = runs.train(classification, tmp_path / "swa", *SWA, "--swa-start", "1")
        runs.train(classification, tmp_path / "plain", *PLAIN)
        sizes = [
            (tmp_path / name / "checkpoint_last.pt").stat().st_size for name in ("swa", "plain")
        ]
        raw = swa.checkpoint["extra_state"][WEIGHT_AVERAGE]["raw"]
        copy = sum(v.numel() * 4 for v in raw.values())
        assert copy <= sizes[0] - sizes[1] < 2 * copy

    def test_ordinary_for_fairseq(self, classification, tmp_path):
        """The model that fairseq loads for validation, generation and the hub is the average."""
        run = runs.train(classification, tmp_path, *SWA, "--swa-start", "1")
        path = str(tmp_path / "checkpoint_last.pt")
        models, _, _ = checkpoint_utils.load_model_ensemble_and_task([path])
        averages = run.checkpoint["extra_state"][WEIGHT_AVERAGE]["averages"]
        for name, p in tiny.without_fused(dict(models[0].named_parameters())).items():
            assert torch.equal(p, averages[f"model.{name}"])


def test_skipped_updates_are_not_averaged(classification, tmp_path, monkeypatch, passed):
    """The optimizer meets an overflow twice: neither updates nor the average count them."""
    clip, calls = FP16Optimizer.clip_grad_norm, []

    def overflowing(self, *args, **kwargs):
        calls.append(None)
        if len(calls) in (3, 5):
            raise OverflowError("loss scale")
        return clip(self, *args, **kwargs)

    monkeypatch.setattr(FP16Optimizer, "clip_grad_norm", overflowing)
    run = runs.train(classification, tmp_path, *SWA, *MODES["fp16"], "--swa-start", "2")
    assert len(calls) == 8 and run.checkpoint["extra_state"][WEIGHT_AVERAGE]["n"] == 5
    assert_model_is(run.checkpoint, mean(passed, [2, 3, 4, 5, 6]))


def test_an_amp_retry_is_averaged_once(classification, tmp_path, monkeypatch):
    """fairseq calls train_step from within train_step."""
    trainer = tiny.build_trainer(
        tiny.arguments(classification, tmp_path, *SWA, "--swa-start", "1", "--amp")
    )
    clip, step, left = trainer.clip_grad_norm, trainer.task.optimizer_step, [2]
    monkeypatch.setattr(
        trainer, "clip_grad_norm", lambda norm: clip(norm) * (float("inf") if left[0] else 1)
    )

    def optimizer_step(optimizer, **kwargs):
        if left[0]:
            left[0] -= 1
        else:
            step(optimizer, **kwargs)

    monkeypatch.setattr(trainer.task, "optimizer_step", optimizer_step)
    for sample in tiny.batches(trainer)[:2]:
        trainer.train_step([sample])
    assert trainer.get_num_updates() == 2 and trainer.weight_average.n == 2


class TestNothingWasAveraged:
    SAID = "nothing was averaged: the run ended after update"

    @pytest.mark.parametrize(
        "options, last",
        [
            (["--stop-time-hours", "1e-9"], 1),
            (["--stop-min-lr", "9e-4"], 4),  # 8e-4 at the end of the epoch
            (["--patience", "1", "--validate-interval-updates", "1", "--lr", "1e-9"], None),
        ],
    )
    def test_said_where_a_run_stops_early(self, classification, tmp_path, caplog, options, last):
        swa = [*SWA, "--swa-start", "0.9", "--max-update", "40", *options]
        run = runs.train(classification, tmp_path, *swa, validate=last is None)
        ended = len(run.updates)
        assert ended == (last or ended) and ended < 36
        assert f"{self.SAID} {ended}, " in caplog.text and "that is update 36" in caplog.text
        assert caplog.text.count(self.SAID) == 1

    def test_said_at_the_end_of_the_last_epoch(self, classification, tmp_path, caplog, monkeypatch):
        """Skipped updates make a run shorter than it was when it was checked."""
        monkeypatch.setattr(averaging_trainer, "check_start", lambda *_: None)
        swa = [*SWA, "--swa-start", "9", "--max-update", "0", "--max-epoch", "2"]
        runs.train(classification, tmp_path, *swa)
        assert caplog.text.count(f"{self.SAID} 8, ") == 1

    def test_not_said_with_an_average_or_without_averaging(self, classification, tmp_path, caplog):
        runs.train(classification, tmp_path / "swa", *SWA, "--swa-start", "6")
        runs.train(classification, tmp_path / "plain", *PLAIN)
        assert "nothing was averaged" not in caplog.text


def test_what_is_said(classification, tmp_path, caplog):
    caplog.set_level("INFO")
    options = ["--swa-start", "0.5", "--swa-lr", "1e-4", "--swa-anneal", "2"]
    run = runs.train(classification, tmp_path, *SWA, *options)
    assert "average of weights from update 3 on: uniform mean, every 1 update(s)" in caplog.text
    assert "learning rate 0.0001 after 2 updates of annealing" in caplog.text
    assert "averaging of weights begins: update 3, epoch 1" in caplog.text
    assert [u.get("swa_start") for u in run.updates] == [None, None, *["3"] * 4]
