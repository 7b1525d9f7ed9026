"""The quick start's commands and its report, without a training."""

import sys

import pytest

from examples.common import report
from examples.quickstart import run, settings


def commands(*words):
    """The commands of the quick start by the title of their stage."""
    args = run.parser().parse_args(list(words))
    wrong = run.check(args)
    if wrong:
        return wrong
    prepared, data = run.data_stages(args, args.out / "work")
    stages = [*prepared, *run.fine_tuning_stages(args, [], args.out / "work", data)]
    return {stage.title: " ".join(stage.command) for stage in stages}


def test_wrong_labels_are_the_default():
    found = commands()
    assert "--label-noise 0.3" in found["encode ORDER"]
    train = found["fine-tune sam_adam, seed 1"]
    assert "--valid-subset valid,kept,replaced" in train
    assert f"--sam-rho {settings.NOISY_RECIPE.rho}" in train


def test_without_wrong_labels():
    found = commands("--label-noise", "0")
    assert "--label-noise" not in found["encode ORDER"]
    train = found["fine-tune sam_adam, seed 1"]
    assert "--valid-subset valid --" in train
    assert f"--sam-rho {settings.SMALL_RECIPE.rho}" in train


def test_scores_have_no_wrong_labels(tmp_path):
    words = ("--task", "STS-B", "--glue-dir", str(tmp_path), "--label-noise", "0.3")
    assert commands(*words).startswith("--label-noise 0.3: STS-B has scores, not classes")


def line(epoch, **accuracies):
    found = [f'"{name}_accuracy": "{value}"' for name, value in accuracies.items()]
    updates = f'"train_ups": "10", "train_num_updates": "{10 * epoch}"'
    return f'{{"epoch": {epoch}, {updates}, {", ".join(found)}}}\n'


@pytest.mark.parametrize("better", ["sam_adam", "adam"])
def test_report_in_one_sentence(tmp_path, monkeypatch, better):
    """The sentence says which is ahead, whichever it is; the last epoch counts, not the best."""
    for method in ("adam", "sam_adam"):
        last = 80 if method == better else 70
        log = line(1, valid=90, kept=60, replaced=20) + line(2, valid=last, kept=95, replaced=85)
        (tmp_path / f"{method}-seed1").mkdir()
        (tmp_path / f"{method}-seed1" / "train.log").write_text(log)
    runs = [str(tmp_path / f"{method}-seed1") for method in ("adam", "sam_adam")]
    monkeypatch.setattr(sys, "argv", ["report", *runs, "--out", str(tmp_path / "out")])
    report.main()
    text = (tmp_path / "out" / "report.md").read_text()
    side = "ahead of" if better == "sam_adam" else "behind"
    assert f"sam_adam is 10.0 points {side} adam in accuracy" in text
    assert "of the wrong labels adam 85 %, sam_adam 85 % were learnt (one seed)." in text
    assert "| right labels | wrong labels |" in text
    assert (tmp_path / "out" / "curves.png").is_file()


def test_report_without_wrong_labels(tmp_path, monkeypatch):
    (tmp_path / "adam-seed1").mkdir()
    (tmp_path / "adam-seed1" / "train.log").write_text(line(1, valid=90))
    argv = ["report", str(tmp_path / "adam-seed1"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    report.main()
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("| method") and "wrong labels" not in text
