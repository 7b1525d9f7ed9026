"""GLUE's metrics on two ranks are those on one: predictions are gathered, not summed."""

import json

import pytest

from tests.helpers import tiny

METRICS = {
    "--report-mcc --report-acc-and-f1": ["valid_mcc", "valid_f1", "valid_accuracy"],
    "--report-pearson-and-spearman --regression-target --num-classes 1": [
        "valid_pearson",
        "valid_spearman",
    ],
}


@pytest.mark.parametrize("options", METRICS)
def test_two_ranks_validate_as_one(classification, tmp_path, options):
    """With a learning rate of 0, after one update; 16 sentences in batches of 3."""
    found = []
    for ranks in ("1", "2"):
        argv = tiny.arguments(
            classification,
            tmp_path / ranks,
            *options.split(),
            *("--lr", "0", "--max-update", "1", "--batch-size-valid", "3", "--dropout", "0"),
            *("--distributed-world-size", ranks, "--ddp-backend", "legacy_ddp", "--no-save"),
            "--data-buffer-size=0",
            criterion="plain",
        )
        output = tiny.train(argv).stdout
        (line,) = [x for x in output.splitlines() if '"valid_loss"' in x]
        stats = json.loads(line[line.index("{") :])
        found.append({key: float(stats[key]) for key in METRICS[options]})
    assert found[1] == pytest.approx(found[0], abs=0.051)
    assert any(value != 0 for value in found[0].values())
