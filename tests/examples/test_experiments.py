"""examples.glue.experiments, dry: a random MiniLM on a few rows, through the same program."""

import json

import pytest

from examples.glue import experiments
from tests.helpers.kit import write_kit
from tests.helpers.processes import run_module


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return write_kit(tmp_path_factory.mktemp("kit"))


def make(kit, tmp_path, *more, seconds=400, work=None):  # it ends when all is done
    work = work or kit / "work"  # the model is converted once
    argv = ["--device", "cpu", "--dry-run", "--seconds", seconds, "--kit", kit, "--jobs", 2, *more]
    argv += ["--work", work, "--out", tmp_path / "out"]
    result = run_module("examples.glue.experiments", argv, tmp_path / "said")
    record = json.loads((tmp_path / "out" / "trainings.json").read_text())
    return result, record, (work / "trainings.md").read_text()


def test_wrong_labels(kit, tmp_path):
    """lr, rho and beta are chosen on the held-out rows; right and wrong labels have own counts."""
    more = ["--experiment", "wrong-labels", "--data", kit / "text"]
    result, record, page = make(kit, tmp_path, *more)
    assert result.returncode == 0, result.stdout
    assert set(record["chosen"]["TREC-40"]) == {"lr", "sam_rho", "delta_sam_beta"}
    assert sum(run["search"] for run in record["runs"]) == 3
    runs = {run["method"]: run for run in record["runs"] if not run["search"]}
    assert set(runs) == {"adam", "adam_2x"}
    assert [len(runs[method]["epochs"]) for method in ("adam", "adam_2x")] == [1, 2]
    splits = {f"{split}_accuracy" for split in ("train", "valid", "dev", "kept", "replaced")}
    assert splits <= set(runs["adam"]["epochs"][0])
    assert "replaced labels" in page and "| adam_2x " in page


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--seeds", "1"], "--seeds: not of glue, only of wrong-labels, few-labels"),
        (["--experiment", "few-labels", "--only", "RTE"], "--only RTE: not of few-labels"),
        (["--rho", "0.1"], "--rho: not of glue, only of wrong-labels, few-labels, mrpc"),
        (["--experiment", "few-labels", "--methods", "sma"], "--methods sma: 'sma' is not known"),
        (["--experiment", "few-labels", "--methods", "distill"], "no teacher here"),
        (["--jobs", "0"], "--jobs: must be at least 1, got 0"),
    ],
)
def test_wrong_options(tmp_path, capsys, more, expected):
    argv = ["--device", "cpu", "--seconds", "9", "--kit", tmp_path, "--work", tmp_path]
    with pytest.raises(SystemExit):
        experiments.main([str(word) for word in (*argv, "--out", tmp_path, *more)])
    assert expected in capsys.readouterr().err


def test_what_there_is_at_the_end_of_the_time_is_kept(kit, tmp_path):
    result, record, page = make(kit, tmp_path, seconds=experiments.ENDING + 1, work=tmp_path)
    assert result.returncode == 1 and "the time is over" in result.stdout
    assert record["runs"] == [] and "0 runs of MiniLM complete" in page


def test_readings_of_a_run():
    """valid is best at the second epoch, and again at the third: the earlier one is taken."""
    valid, dev, kept, replaced = (50, 60, 60), (70, 80, 90), (60, 70, 99), (10, 20, 30)
    epochs = [
        {
            "epoch": i,
            "valid_accuracy": v,
            "dev_accuracy": d,
            "kept_accuracy": k,
            "replaced_accuracy": r,
        }
        for i, (v, d, k, r) in enumerate(zip(valid, dev, kept, replaced), start=1)
    ]
    assert experiments.readings(epochs) == [90, 80, 90, 99, 30]
