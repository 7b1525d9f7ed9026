"""Options of fairseq beside SAM: they work, and what is logged is the clean loss."""

import collections
import re

import pytest
import torch
from fairseq.logging import metrics

from tests.helpers import runs, tiny

OPTIONS = {
    "clip": ["--clip-norm", "0.1"],
    "unused parameters": ["--find-unused-parameters"],
    "sentence average": ["--sentence-avg"],
    "legacy_ddp": ["--ddp-backend", "legacy_ddp"],
    "c10d": ["--ddp-backend", "c10d"],
    "no_c10d": ["--ddp-backend", "no_c10d"],
    "accumulation": ["--update-freq", "2"],
    "ema": ["--store-ema", "--ema-decay", "0.75"],
    "no data buffer": ["--data-buffer-size", "0"],
    "tokens": ["--max-tokens", "40"],
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
def test_runs_and_perturbs(classification, tmp_path, name, optimizer):
    run = runs.train(
        classification, tmp_path, "--optimizer", optimizer, *OPTIONS[name], "--max-update", "2"
    )
    assert run.checkpoint["optimizer_history"][-1]["num_updates"] == len(run.updates) == 2
    assert all({"sam_loss", "sharpness", "ascent_gnorm"} <= log.keys() for log in run.updates)
    assert all(float(log["sharpness"]) != 0 for log in run.updates)
    assert name != "clip" or {log["clip"] for log in run.updates} == {"100"}


def test_workers_that_load_data_change_nothing(classification, tmp_path):
    ends = [
        runs.train(
            classification,
            tmp_path / workers,
            *("--optimizer", "delta_sam_adam", "--max-update", "5", "--num-workers", workers),
        )
        for workers in ("0", "1")
    ]
    runs.assert_same_end(*ends)


@pytest.mark.parametrize("log_format", ["json", "simple", "tqdm"])
def test_log_formats_have_the_figures(classification, tmp_path, log_format, capfd):
    options = ["--optimizer", "delta_sam_adam", "--max-update", "2", "--log-format", log_format]
    run = runs.train(classification, tmp_path, *options)
    shown = "\n".join([*run.messages, *capfd.readouterr()])
    for key in (
        "loss sam_loss sharpness ascent_gnorm delta_sam_effective delta_sam_r delta_sam_negative "
        "delta_sam_uniform"
    ).split():
        assert re.search(rf"\b{key}\W+[0-9.-]+", shown), key


def test_tensorboard_has_the_figures(classification, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logdir = tmp_path / "events"
    options = ["--optimizer", "delta_sam_adam", "--tensorboard-logdir", str(logdir)]
    run = runs.train(classification, tmp_path / "run", *options, "--max-update", "4")
    events = reader.EventAccumulator(str(logdir / "train_inner")).Reload()
    for key in ("loss", "sam_loss", "sharpness", "ascent_gnorm", "delta_sam_effective"):
        found = [event.value for event in events.Scalars(key)]
        assert len(found) == 4
        assert found == pytest.approx([float(log[key]) for log in run.updates], rel=1e-3, abs=1e-6)


def meters_of_first_update(data, folder, criterion, *options):
    argv = tiny.arguments(data, folder, "--dropout", "0.1", *options, criterion=criterion)
    trainer = tiny.build_trainer(argv)
    with metrics.aggregate("train"):
        trainer.train_step(tiny.batches(trainer)[:2])
        meters = metrics.get_meters("train")
    return {
        key: meter.avg
        for key, meter in meters.items()
        if hasattr(meter, "avg") and key not in ("train_wall", "wps", "ups", "wall")
    }


@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
@pytest.mark.parametrize("criterion", ["sentence_prediction", "masked_lm", "cross_entropy"])
def test_logged_loss_is_the_clean_one(data_of, tmp_path, criterion, optimizer):
    """What the base optimizer logs for the first update, unrounded; only gnorm is SAM's own."""
    data = data_of[criterion]
    plain = meters_of_first_update(data, tmp_path, criterion, "--optimizer", "adam")
    found = meters_of_first_update(data, tmp_path, criterion, "--optimizer", optimizer)
    own = {key for key in found if key.startswith(("sam_", "delta_sam_"))}
    assert found.keys() - own == plain.keys() | {"sharpness", "ascent_gnorm"}
    assert "loss" in plain and (criterion != "sentence_prediction" or "accuracy" in plain)
    for key in plain.keys() - {"gnorm"}:
        assert torch.as_tensor(found[key]).item() == torch.as_tensor(plain[key]).item(), key
    assert found["gnorm"] != plain["gnorm"]
    assert found["sam_loss"] - found["loss"] == pytest.approx(float(found["sharpness"]), abs=1e-6)
    if optimizer == "sam_adam":
        assert float(found["ascent_gnorm"]) == pytest.approx(float(plain["gnorm"]), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
def test_ema_averages_unperturbed_weights(classification, tmp_path, optimizer):
    """EMA with decay 3/4 from w0: after one update (3 w0 + w1) / 4.

    fairseq averages a weight that has two names (the embedding, tied to the output) twice.
    """
    options = ["--optimizer", optimizer, "--sam-rho", "1", "--store-ema", "--ema-decay", "0.75"]
    trainer = tiny.build_trainer(tiny.arguments(classification, tmp_path, *options))
    start = {n: p.data.clone() for n, p in trainer.get_model().named_parameters()}
    averages = trainer.ema.get_model().state_dict()
    assert all(torch.equal(averages[name], w) for name, w in start.items())
    trainer.train_step(tiny.batches(trainer)[:1])
    averages = trainer.ema.get_model().state_dict()
    names = collections.Counter(w.data_ptr() for w in trainer.get_model().state_dict().values())
    for name, p in trainer.get_model().named_parameters():
        old = 0.75 ** names[p.data_ptr()]
        expected = old * start[name] + (1 - old) * p.data
        torch.testing.assert_close(averages[name], expected, rtol=1e-5, atol=1e-7)


def test_ema_begins_at_a_checkpoint_without_it(classification, tmp_path):
    """Of a model without the head, as --finetune-from-model has it; fairseq ends in KeyError."""
    head = ("--classification-head-name", "other", "--max-update", "1")
    start = runs.train(classification, tmp_path / "start", *head)
    path = str(start.save_dir / "checkpoint_last.pt")
    options = ["--finetune-from-model", path, "--store-ema", "--lr", "0"]
    run = runs.train(classification, tmp_path / "run", *options, "--max-update", "1")
    averages = run.checkpoint["extra_state"]["ema"]
    assert averages.keys() == run.checkpoint["model"].keys()
    for name, value in run.checkpoint["model"].items():
        if not name.endswith(".version"):
            torch.testing.assert_close(averages[name], value)


def test_ema_goes_on_after_a_resume(classification, tmp_path):
    options = ["--optimizer", "delta_sam_adam", "--store-ema", "--ema-decay", "0.75"]
    whole = runs.train(classification, tmp_path / "whole", *options, "--max-update", "5")
    runs.train(classification, tmp_path / "parts", *options, "--max-update", "3")
    parts = runs.train(classification, tmp_path / "parts", *options, "--max-update", "5")
    runs.assert_same_end(parts, whole)
    averages = [run.checkpoint["extra_state"]["ema"] for run in (parts, whole)]
    runs.assert_same(*averages)
