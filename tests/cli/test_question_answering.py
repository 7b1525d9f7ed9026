"""Span prediction through fairseq's programs: training, resuming, validating, other checkpoints."""

import json
import subprocess
import sys

import pytest
import runs
import tiny
import torch
from fairseq import checkpoint_utils, options, tasks

HEAD = "classification_heads.span_prediction_head.out_proj.weight"
BEST = ["--best-checkpoint-metric", "f1", "--maximize-best-checkpoint-metric"]


def train(data, save_dir, *more):
    return runs.train(data, save_dir, *more, criterion="span_prediction")


def validations(output):
    lines = [line for line in output.splitlines() if '"valid_f1"' in line]
    return [json.loads(line[line.index("{") :]) for line in lines]


def untrained(data, save_dir):
    """A checkpoint of masked_lm with the model of `tiny`, as of pretraining."""
    runs.train(data, save_dir, "--max-update", "1", criterion="masked_lm")
    return save_dir / "checkpoint_last.pt"


@pytest.mark.parametrize("optimizer", ["adam", "sam_adam", "delta_sam_adam"])
def test_trains_and_keeps_the_checkpoint_of_the_best_f1(span_prediction, tmp_path, optimizer):
    argv = tiny.arguments(
        span_prediction,
        tmp_path,
        *("--optimizer", optimizer, "--max-update", "9", "--lr", "0.02", *BEST),
        "--data-buffer-size=0",
        criterion="span_prediction",
    )
    found = validations(tiny.train(argv).stdout)
    scores = [float(log["valid_f1"]) for log in found]
    assert len(scores) >= 2 and all(0 <= score <= 100 for score in scores)
    assert all(float(log["valid_exact_match"]) <= float(log["valid_f1"]) for log in found)
    state = runs.load(tmp_path / "checkpoint_best.pt")
    assert float(state["extra_state"]["best"]) == max(scores)
    assert state["model"][HEAD].shape == (2, 16)


def test_learns(span_prediction, tmp_path):
    """24 questions by heart, half of whose answers are guessed at first at most."""
    argv = ["--optimizer", "delta_sam_adam", "--lr", "0.01", "--max-update", "120"]
    argv += ["--max-epoch", "100", "--valid-subset", "train", "--validate-interval", "10"]
    argv = tiny.arguments(
        span_prediction, tmp_path, *argv, "--data-buffer-size=0", criterion="span_prediction"
    )
    scores = [float(log["valid_f1"]) for log in validations(tiny.train(argv).stdout)]
    assert scores[-1] > 90 > 50 > scores[0]


@pytest.mark.parametrize("optimizer", ["adam", "delta_sam_adam"])
def test_resumed_is_uninterrupted(span_prediction, tmp_path, optimizer):
    more = ["--optimizer", optimizer, "--dropout", "0.1"]
    whole = train(span_prediction, tmp_path / "whole", *more, "--max-update", "5")
    train(span_prediction, tmp_path / "parts", *more, "--max-update", "2")
    parts = train(span_prediction, tmp_path / "parts", *more, "--max-update", "5")
    runs.assert_same_end(parts, whole)
    assert not torch.equal(
        whole.checkpoint["model"][HEAD],
        train(span_prediction, tmp_path / "one", "--max-update", "1").checkpoint["model"][HEAD],
    )


def test_accumulation_is_one_batch(span_prediction, tmp_path):
    """delta-SAM's weights of windows do not depend on how a batch is split."""
    more = ["--optimizer", "delta_sam_sgd", "--lr", "1.0", "--dropout", "0", "--max-update", "2"]
    more += ["--attention-dropout", "0"]
    one = train(span_prediction, tmp_path / "1", *more, "--batch-size", "8")
    two = train(span_prediction, tmp_path / "2", *more, "--batch-size", "4", "--update-freq", "2")
    if one.checkpoint is None or two.checkpoint is None:
        raise AssertionError("no checkpoint")
    start = train(span_prediction, tmp_path / "0", *more, "--lr", "0").checkpoint
    assert not torch.equal(start["model"][HEAD], one.checkpoint["model"][HEAD])
    for log in (one, two):
        assert float(log.updates[0]["delta_sam_r"]) > 0


@pytest.mark.parametrize("flag", ["--restore-file", "--finetune-from-model"])
@pytest.mark.parametrize("arch", ["roberta_base", "bert"])
def test_starts_from_a_pretrained_checkpoint(
    span_prediction, language_modelling, tmp_path, flag, arch
):
    """The encoder is that of the checkpoint, the head is new; with a learning rate of 0."""
    pretrained = tmp_path / "pretrained"
    model = ["--arch", arch, "--max-positions", "64"]
    runs.train(language_modelling, pretrained, *model, "--max-update", "1", criterion="masked_lm")
    path = pretrained / "checkpoint_last.pt"
    resets = ["optimizer", "dataloader", "meters", "lr-scheduler"]
    more = [f"--reset-{name}" for name in resets] if flag == "--restore-file" else []
    more += [flag, str(path), "--lr", "0", "--max-update", "1", *model]
    found = train(span_prediction, tmp_path / "tuned", *more).checkpoint["model"]
    expected = runs.load(path)["model"]
    name = "encoder.sentence_encoder.layers.1.fc1.weight"
    assert torch.equal(found[name], expected[name]) and HEAD in found and HEAD not in expected


def test_the_head_goes_to_no_other_task(span_prediction, classification, tmp_path, caplog):
    """It is left out, with a warning, as fairseq does with heads of its own; the encoder goes."""
    path = train(span_prediction, tmp_path / "spans", "--max-update", "1").save_dir
    more = ["--finetune-from-model", str(path / "checkpoint_last.pt"), "--lr", "0"]
    found = runs.train(classification, tmp_path / "classes", *more, "--max-update", "1")
    assert "span_prediction_head" in caplog.text and HEAD not in found.checkpoint["model"]
    back = ["--finetune-from-model", str(found.save_dir / "checkpoint_last.pt")]
    train(span_prediction, tmp_path / "back", *back, "--max-update", "1")


def test_fairseq_validate_finds_what_training_found(span_prediction, tmp_path):
    argv = tiny.arguments(
        span_prediction,
        tmp_path,
        *("--max-update", "3", "--lr", "0.02", "--data-buffer-size=0", *BEST),
        criterion="span_prediction",
    )
    last = validations(tiny.train(argv).stdout)[-1]
    words = [str(span_prediction), "--user-dir", tiny.USER_DIR, "--task", "span_prediction"]
    words += ["--path", str(tmp_path / "checkpoint_last.pt"), "--log-format", "json"]
    words += ["--batch-size", "5", "--data-buffer-size", "0"]
    result = tiny.train(words, program=[sys.executable, "-m", "fairseq_cli.validate"])
    line = next(x for x in result.stdout.splitlines() if '"exact_match"' in x)
    found = json.loads(line[line.index("{") :])
    assert float(found["f1"]) == pytest.approx(float(last["valid_f1"]), abs=0.011)
    assert float(found["loss"]) == pytest.approx(float(last["valid_loss"]), abs=0.0011)


def test_hydra(span_prediction, tmp_path):
    if sys.version_info < (3, 11):
        pytest.skip("fairseq 0.12.2 knows roberta for the command line only")
    words = [f"task.data={span_prediction}", "task._name=span_prediction"]
    words += ["criterion._name=span_prediction", "criterion.max_answer_length=5"]
    assert words


@pytest.mark.parametrize(
    "more, message",
    [
        (["--max-answer-length", "0"], "--max-answer-length 0: must be finite, at least 1"),
        (["--task", "sentence_prediction", "--num-classes", "2"], "use --task span_prediction"),
        (["--max-positions", "8"], "--max-positions 8.*--max-seq-length 8"),
        (["--arch", "transformer_lm"], "use --arch roberta_base"),
        (["--criterion", "plain"], "use --task sentence_prediction"),
    ],
)
def test_wrong_options(span_prediction, classification, tmp_path, more, message):
    data = classification if "--task" in more else span_prediction
    argv = tiny.arguments(data, tmp_path, *more, criterion="span_prediction")
    if "transformer_lm" in more:
        argv = [word for word in argv if word not in tiny.MODEL] + ["--arch", "transformer_lm"]
    result = tiny.train(argv, check=False)
    assert result.returncode != 0
    import re

    assert re.search(message, result.stdout.replace("\n", " ")), result.stdout[-3000:]


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda path: None, "make it with scripts/prepare_squad.py"),
        (lambda path: (path / "task.json").write_text('{"task": "RTE"}'), "prepare_squad.py"),
    ],
)
def test_folders_of_other_data(tmp_path, prepare, message):
    prepare(tmp_path)
    parser = options.get_training_parser()
    argv = [str(tmp_path), "--task", "span_prediction", *tiny.MODEL]
    with pytest.raises(ValueError, match=message):
        tasks.setup_task(options.parse_args_and_arch(parser, argv))


def test_predictions_are_those_of_validation(span_prediction, tmp_path):
    """scripts/predict_squad.py has the exact match and F1 that training logged."""
    argv = tiny.arguments(
        span_prediction,
        tmp_path,
        *("--max-update", "9", "--lr", "0.02", "--data-buffer-size=0"),
        criterion="span_prediction",
    )
    last = validations(tiny.train(argv).stdout)[-1]
    script = tiny.Path(__file__).parents[2] / "scripts" / "predict_squad.py"
    out = tmp_path / "out"
    words = ["--data", span_prediction, "--path", tmp_path / "checkpoint_last.pt", "--out", out]
    subprocess.run([sys.executable, str(script), *map(str, words), "--batch-size", "3"], check=True)
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("f1", "exact_match"):
        assert metrics[name] == pytest.approx(float(last[f"valid_{name}"]), abs=0.0051)



