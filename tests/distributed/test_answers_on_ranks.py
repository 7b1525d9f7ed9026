"""Exact match and F1 on two ranks are those on one: windows of a question meet from both."""

import json

import pytest
from fairseq import checkpoint_utils

from tests.helpers import tiny


def validated(data, folder, ranks, *more):
    argv = tiny.arguments(
        data,
        folder,
        *("--lr", "0", "--max-update", "1", "--batch-size-valid", "3", "--dropout", "0"),
        *("--distributed-world-size", str(ranks), "--ddp-backend", "legacy_ddp", "--no-save"),
        *("--data-buffer-size=0", *more),
        criterion="span_prediction",
    )
    output = tiny.train(argv).stdout
    (line,) = [x for x in output.splitlines() if '"valid_f1"' in x]
    stats = json.loads(line[line.index("{") :])
    return {key: float(stats[f"valid_{key}"]) for key in ("f1", "exact_match", "loss")}


@pytest.mark.parametrize("threshold", ["0", "100"])
def test_two_ranks_validate_as_one(span_prediction, tmp_path, threshold):
    """After an update with a learning rate of 0; 20 windows of 14 questions in batches of 3: 7, so
    that the second rank ends with a dummy."""
    more = ["--null-threshold", threshold]
    one, two = (validated(span_prediction, tmp_path / str(n), n, *more) for n in (1, 2))
    assert two == pytest.approx(one, abs=0.0011)
    assert one["f1"] > 0


@pytest.mark.parametrize("optimizer", ["adam", "delta_sam_adam"])
def test_two_ranks_choose_the_best_by_f1(span_prediction, tmp_path, optimizer):
    argv = tiny.arguments(
        span_prediction,
        tmp_path,
        *("--optimizer", optimizer, "--lr", "0.02", "--max-update", "4", "--batch-size", "6"),
        *("--distributed-world-size", "2", "--data-buffer-size=0"),
        *("--validate-interval-updates", "1", "--save-interval-updates", "1"),
        *("--best-checkpoint-metric", "f1", "--maximize-best-checkpoint-metric"),
        *("--find-unused-parameters", "--ddp-backend", "pytorch_ddp"),
        criterion="span_prediction",
    )
    lines = [x for x in tiny.train(argv).stdout.splitlines() if '"valid_f1"' in x]
    scores = [float(json.loads(line[line.index("{") :])["valid_f1"]) for line in lines]
    state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_best.pt"))
    assert len(scores) >= 3 and float(state["extra_state"]["best"]) == max(scores)
