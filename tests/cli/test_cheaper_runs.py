"""Cheaper ascents in whole runs: what is logged, what is refused before training."""

import json

import pytest

from tests.helpers import runs, tiny

OPTIMIZERS = ["sam_adam", "delta_sam_adam"]
OF_AN_ASCENT = {
    "sam_adam": {"sam_loss", "sharpness", "ascent_gnorm"},
    "delta_sam_adam": {"sam_loss", "sharpness", "ascent_gnorm", "delta_sam_r"},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_without_an_ascent_have_no_figures_of_one(classification, tmp_path, optimizer):
    """Ascents are those of updates 2, 5 and 8 (the first is 1)."""
    options = ["--optimizer", optimizer, "--sam-every", "3", "--sam-start-update", "1"]
    run = runs.train(classification, tmp_path, *options, "--max-update", "8")
    keys = OF_AN_ASCENT[optimizer]
    for log in run.updates:
        ascended = int(log["num_updates"]) in (2, 5, 8)
        assert keys & set(log) == (keys if ascended else set())
        assert None not in log.values() and "loss" in log
    assert [log["num_updates"] for log in run.updates] == [str(i + 1) for i in range(8)]


def test_averages_over_an_interval_are_of_its_ascents(classification, tmp_path):
    options = ["--optimizer", "sam_adam", "--sam-every", "2", "--max-update", "4"]
    every = runs.train(classification, tmp_path / "1", *options)
    pairs = runs.train(classification, tmp_path / "2", *options, "--log-interval", "2")
    single = [float(log["sharpness"]) for log in every.updates if "sharpness" in log]
    assert [float(log["sharpness"]) for log in pairs.updates] == pytest.approx(single)


@pytest.mark.parametrize("log_format", ["simple", "tqdm", "json"])
def test_every_format_can_be_written(classification, tmp_path, log_format):
    options = ["--optimizer", "delta_sam_adam", "--sam-every", "3", "--log-format", log_format]
    found = runs.train(classification, tmp_path, *options, "--max-update", "4").messages
    assert not any("None" in message or "null" in message for message in found)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_at_once(classification, tmp_path, optimizer):
    options = ["--optimizer", optimizer, "--sam-ascent-fraction", "0.25", "--sam-every", "2"]
    options += ["--sam-only", "layer_norm", "--update-freq", "2", "--max-update", "4"]
    run = runs.train(classification, tmp_path, *options)
    with_ascent = [log["num_updates"] for log in run.updates if "sam_loss" in log]
    assert with_ascent == ["1", "3"]
    assert ("sharpness" in run.updates[0]) == (optimizer == "delta_sam_adam")
    assert [float(log["bsz"]) for log in run.updates] == [16.0] * 4


def test_pattern_that_matches_nothing_ends_the_program(classification, tmp_path):
    argv = tiny.arguments(classification, tmp_path / "run", "--optimizer", "sam_adam")
    result = tiny.train([*argv, "--sam-only", "norm_layer"], check=False)
    assert result.returncode == 1
    assert "--sam-only norm_layer: no name of a trained weight matches" in result.stdout
    assert "encoder.sentence_encoder" in result.stdout  # some names that there are
    assert "begin training" not in result.stdout.lower()
    assert not list((tmp_path / "run").glob("*.pt"))


def test_pattern_in_the_log(classification, tmp_path):
    argv = tiny.arguments(classification, tmp_path / "run", "--optimizer", "sam_adam")
    result = tiny.train([*argv, "--sam-only", "layer_norm", "--max-update", "1"])
    assert "--sam-only layer_norm: 160 of " in result.stdout
    assert json.loads(result.stdout[result.stdout.index('{"epoch"') :].splitlines()[0])
