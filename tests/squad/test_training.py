"""Span prediction through fairseq's programs: training, resuming, validating, other checkpoints."""

import json
import re
import subprocess
import sys

import pytest
import torch
from fairseq import options, tasks

from deltasam_fairseq.squad.head import register_span_head
from deltasam_fairseq.trainer.checkpoint_state import WEIGHT_AVERAGE
from tests.cli.test_resume import assert_resumed_with_validation
from tests.helpers import runs, tiny

HEAD = "classification_heads.span_prediction_head.out_proj.weight"
BEST = ["--best-checkpoint-metric", "f1", "--maximize-best-checkpoint-metric"]


def train(data, save_dir, *more):
    return runs.train(data, save_dir, *more, criterion="span_prediction")


def validations(output):
    lines = [line for line in output.splitlines() if '"valid_f1"' in line]
    return [json.loads(line[line.index("{") :]) for line in lines]


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


def test_learns(tmp_path):
    """24 questions by heart."""
    data = tiny.write_span_prediction(tmp_path / "data", seen_in_validation=True)
    argv = ["--optimizer", "delta_sam_adam", "--lr", "0.01", "--dropout", "0"]
    argv += ["--max-update", "250", "--max-epoch", "100", "--validate-interval", "10"]
    argv = tiny.arguments(
        data, tmp_path, *argv, "--data-buffer-size=0", criterion="span_prediction"
    )
    scores = [float(log["valid_f1"]) for log in validations(tiny.train(argv).stdout)]
    assert scores[-1] > 90 > 70 > scores[0]


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


def test_resumed_after_a_validation(span_prediction, tmp_path):
    assert_resumed_with_validation(
        *(span_prediction, tmp_path, "--optimizer", "delta_sam_adam", "--lr", "0.02"),
        criterion="span_prediction",
        metric="valid_f1",
    )


def test_with_averaged_weights(span_prediction, tmp_path):
    """Validation and the best checkpoint are those of the average, the head's included."""
    argv = tiny.arguments(
        span_prediction,
        tmp_path,
        *("--optimizer", "delta_sam_adam", "--max-update", "8", "--lr", "0.02", *BEST),
        *("--lr-scheduler", "swa_fixed", "--swa-start", "0.25", "--swa-lr", "0.01"),
        "--data-buffer-size=0",
        criterion="span_prediction",
    )
    found = validations(tiny.train(argv).stdout)
    assert len(found) >= 2 and found[-1]["valid_swa_n"] == "7"  # of the updates 2 to 8
    best = max(found, key=lambda log: float(log["valid_f1"]))
    for name, n in (("last", 7), ("best", int(best.get("valid_swa_n", 0)))):
        state = runs.load(tmp_path / f"checkpoint_{name}.pt")
        own = state["extra_state"][WEIGHT_AVERAGE]
        assert own["n"] == n > 0
        assert torch.equal(state["model"][HEAD], own["averages"][f"model.{HEAD}"])
        assert n == 1 or not torch.equal(state["model"][HEAD], own["raw"][f"model.{HEAD}"])


@pytest.mark.parametrize("optimizer", ["sgd", "sam_sgd", "delta_sam_sgd"])
def test_micro_batches_are_one_batch(span_prediction, tmp_path, optimizer):
    """The weights of the windows in delta-SAM's ascent do not depend on how a batch is split."""
    ends = []
    for sizes in ([9], [4, 5], [1, 6, 2]):
        more = ["--optimizer", optimizer, "--lr", "1.0", "--dropout", "0"]
        more += ["--attention-dropout", "0"]
        argv = tiny.arguments(span_prediction, tmp_path, *more, criterion="span_prediction")
        trainer = tiny.build_trainer(argv, dtype=torch.float64)
        dataset, start = trainer.task.dataset("train"), tiny.weights(trainer)
        items = iter(range(9))
        micro = [dataset.collater([dataset[next(items)] for _ in range(n)]) for n in sizes]
        trainer.reset_dummy_batch(micro[0])
        trainer.train_step(micro)
        ends.append(tiny.weights(trainer))
        assert not all(torch.equal(a, b) for a, b in zip(start, ends[-1]))
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=0, atol=1e-9)


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
    """It is dropped with a warning, like fairseq's own heads; the encoder is loaded."""
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
    (found,) = validations(result.stdout)
    for name, bound in (("valid_f1", 0.011), ("valid_exact_match", 0.011), ("valid_loss", 0.0011)):
        assert float(found[name]) == pytest.approx(float(last[name]), abs=bound)


YAML = """
common: {{user_dir: {user_dir}, seed: 3}}
checkpoint: {{save_dir: {save_dir}, no_epoch_checkpoints: true}}
task: {{_name: span_prediction, data: {data}, max_positions: 64}}
criterion: {{_name: span_prediction, max_answer_length: 5}}
dataset: {{batch_size: 8, num_workers: 0, data_buffer_size: 0}}
optimizer: {{_name: delta_sam_adam}}
lr_scheduler: {{_name: fixed}}
optimization: {{max_update: 2, lr: [0.001]}}
model:
  _name: roberta
  encoder_layers: 2
  encoder_embed_dim: 16
  encoder_ffn_embed_dim: 32
  encoder_attention_heads: 2
  max_positions: 64
"""


def test_through_hydra(span_prediction, tmp_path):
    values = {"user_dir": tiny.USER_DIR, "save_dir": tmp_path / "run", "data": span_prediction}
    (tmp_path / "qa.yaml").write_text(YAML.format(**values))
    words = ["--config-dir", str(tmp_path), "--config-name", "qa"]
    program = [sys.executable, "-m", "fairseq_cli.hydra_train"]
    output = tiny.train(words, program=program, cwd=tmp_path).stdout
    assert "valid_f1" in output or (tmp_path / "run" / "checkpoint_best.pt").exists()
    state = runs.load(tmp_path / "run" / "checkpoint_last.pt")
    assert HEAD in state["model"] and state["cfg"]["criterion"]["max_answer_length"] == 5


@pytest.mark.parametrize(
    "more, message",
    [
        (["--max-answer-length", "0"], "--max-answer-length 0: must be at least 1"),
        (["--task", "masked_lm"], "--task masked_lm: use --task span_prediction"),
        (["--max-positions", "8"], "--max-positions 8.*--max-seq-length 8"),
        (["--criterion", "plain"], "use --task sentence_prediction"),
    ],
)
def test_wrong_options(span_prediction, tmp_path, more, message):
    argv = tiny.arguments(span_prediction, tmp_path, *more, criterion="span_prediction")
    result = tiny.train(argv, check=False)
    assert result.returncode != 0
    assert re.search(message, result.stdout.replace("\n", " ")), result.stdout[-3000:]


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="--arch of Linear.*use --arch roberta_base"):
        register_span_head(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda path: None, "make it with python -m deltasam_fairseq.squad.prepare"),
        (lambda path: (path / "task.json").write_text('{"task": "RTE"}'), "squad.prepare"),
    ],
)
def test_folders_of_other_data(tmp_path, prepare, message):
    prepare(tmp_path)
    parser = options.get_training_parser()
    argv = [str(tmp_path), "--task", "span_prediction", *tiny.MODEL]
    with pytest.raises(ValueError, match=message):
        tasks.setup_task(options.parse_args_and_arch(parser, argv))


def test_predictions_are_those_of_validation(span_prediction, tmp_path):
    """python -m deltasam_fairseq.squad.predict has the exact match and F1 that training logged."""
    argv = tiny.arguments(
        span_prediction,
        tmp_path,
        *("--max-update", "9", "--lr", "0.02", "--data-buffer-size=0"),
        criterion="span_prediction",
    )
    last = validations(tiny.train(argv).stdout)[-1]
    out = tmp_path / "out"
    words = ["--data", span_prediction, "--path", tmp_path / "checkpoint_last.pt", "--out", out]
    command = [sys.executable, "-m", "deltasam_fairseq.squad.predict", *map(str, words)]
    subprocess.run([*command, "--batch-size", "3"], check=True)
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("f1", "exact_match"):
        assert metrics[name] == pytest.approx(float(last[f"valid_{name}"]), abs=0.0051)
