"""A run that was stopped, or killed, and resumed is the run that never stopped, bit for bit."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import runs, tiny

OPTIMIZERS = {
    "adam": ["--optimizer", "adam"],
    "sam_adam": ["--optimizer", "sam_adam"],
    "delta_sam_adam": ["--optimizer", "delta_sam_adam"],
    "delta_sam_adam, accumulated": ["--optimizer", "delta_sam_adam", "--update-freq", "2"],
    "adaptive": ["--optimizer", "delta_sam_adam", "--sam-adaptive", "--sam-rho", "0.5"],
    "half precision": ["--optimizer", "delta_sam_adam", "--memory-efficient-fp16"],
    "half precision with float32 copies": [
        *("--optimizer", "delta_sam_adam", "--fp16", "--fp16-no-flatten-grads"),
        *("--fp16-init-scale", "4", "--fp16-scale-window", "2"),
    ],
    "half precision with flat float32 copies": ["--optimizer", "delta_sam_adam", "--fp16"],
    "a fraction": ["--optimizer", "sam_adam", "--sam-ascent-fraction", "0.3"],
    "a fraction, accumulated": [
        *("--optimizer", "delta_sam_adam", "--sam-ascent-fraction", "0.3", "--update-freq", "2"),
    ],
    "every other update": ["--optimizer", "delta_sam_adam", "--sam-every", "2"],
    "some weights, half precision": [
        *("--optimizer", "delta_sam_adam", "--sam-only", "layer_norm", "--memory-efficient-bf16"),
        *("--sam-ascent-fraction", "0.5"),
    ],
    "GSAM, rho along the learning rate": [
        *("--optimizer", "sam_adam", "--sam-gsam-alpha", "0.4", "--sam-rho-schedule", "lr"),
        *("--warmup-updates", "5", "--update-freq", "2"),
    ],
    "RW-SAM": ["--optimizer", "delta_sam_adam", "--delta-sam-weights", "gibbs"],
    "RW-SAM, half precision, accumulated": [
        *("--optimizer", "delta_sam_adam", "--delta-sam-weights", "gibbs"),
        *("--memory-efficient-fp16", "--update-freq", "2"),
    ],
    "groups, half precision with float32 copies": [
        *("--optimizer", "sam_adam", "--sam-micro", "3", "--fp16", "--fp16-no-flatten-grads"),
        *("--fp16-init-scale", "4", "--fp16-scale-window", "2"),
    ],
    "functional": ["--optimizer", "sam_adam", "--sam-functional", "--update-freq", "2"],
    "Fisher mask": [
        *("--optimizer", "sam_adam", "--sam-mask", "fisher", "--sam-mask-every", "2"),
    ],
    "trust region": [
        *("--optimizer", "sam_adam", "--sam-radius", "trust_region", "--sam-trust-sigma", "1"),
    ],
    "trust region of the last update": [
        *("--optimizer", "sam_adam", "--sam-radius", "trust_region_theta"),
        *("--fp16", "--fp16-no-flatten-grads"),
    ],
    "rho warms up, half precision": [
        *("--optimizer", "delta_sam_adam", "--memory-efficient-fp16"),
        *("--sam-rho-schedule", "warmup", "--sam-rho-warmup-updates", "5"),
    ],
    "begins after the stop": ["--optimizer", "sam_adam", "--sam-start-update", "4"],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stopped_in_the_middle_of_an_epoch_and_resumed(classification, tmp_path, name):
    """Four updates are an epoch, two with --update-freq 2; the stop is after three."""
    options = [*OPTIMIZERS[name], "--lr-scheduler", "polynomial_decay", "--total-num-update", "20"]
    whole = runs.train(classification, tmp_path / "whole", *options, "--max-update", "7")
    runs.train(classification, tmp_path / "parts", *options, "--max-update", "3")
    parts = runs.train(classification, tmp_path / "parts", *options, "--max-update", "7")
    assert [log["num_updates"] for log in parts.updates] == ["4", "5", "6", "7"]
    runs.assert_same_end(parts, whole)


def validations(run):
    """What a run logged of its validations, by the number of updates, without speed and time."""
    logs = [json.loads(m) for m in run.messages if m[:1] == "{" and '"valid_loss"' in m]
    timed = ("valid_wps", "valid_wall")
    return {
        int(log["valid_num_updates"]): {k: v for k, v in log.items() if k not in timed}
        for log in logs
    }


def assert_resumed_with_validation(data, folder, *options, criterion, metric):
    """Stopped after two updates of an epoch, each followed by a validation, and resumed.

    Args:
        metric: what must be among the metrics of each validation.
    """

    def train(name, updates):
        # the best value so far, in the log, is that of the checkpoints: both save after two updates
        more = ["--validate-interval-updates", "1", "--save-interval-updates", "2", *options]
        more += ["--max-update", updates]
        return runs.train(data, folder / name, *more, criterion=criterion, validate=True)

    whole, stopped = train("whole", "5"), train("parts", "2")
    metrics = stopped.checkpoint["extra_state"]["metrics"]
    assert {meter_class for _, _, meter_class, _ in metrics["valid"]} == {
        "AverageMeter",
        "TimeMeter",
    }
    parts = train("parts", "5")
    runs.assert_same_end(parts, whole)
    expected, found = validations(whole), {**validations(stopped), **validations(parts)}
    assert found == expected and list(validations(parts)) == [3, 4, 5]
    assert all(metric in log for log in expected.values())


def test_with_averaged_weights_and_validation(classification, tmp_path):
    """The average is validated: from the first update on, also across the stop."""
    options = ["--optimizer", "delta_sam_adam", "--lr-scheduler", "swa_fixed", "--swa-start", "1"]
    assert_resumed_with_validation(
        *(classification, tmp_path, *options, "--report-mcc"), criterion="plain", metric="valid_mcc"
    )


def test_the_comparison_can_fail(classification, tmp_path):
    """One update with another seed, and the ends are not the same."""
    one, other = (
        runs.train(classification, tmp_path / seed, "--seed", seed, "--max-update", "1")
        for seed in ("3", "4")
    )
    with pytest.raises(AssertionError):
        runs.assert_same_end(one, other)


def kill_after_a_checkpoint(argv, checkpoint):
    """SIGKILL for a training process as soon as it has written a whole checkpoint.

    Returns:
        what the checkpoint holds.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "fairseq_cli.train", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        deadline = time.time() + 90
        while time.time() < deadline:
            assert process.poll() is None, process.communicate()[0].decode()
            if checkpoint.exists():
                # fairseq copies the file to this name: held still, it is whole or it is not.
                os.kill(process.pid, signal.SIGSTOP)
                try:
                    return runs.load(checkpoint)
                except RuntimeError:
                    os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.005)
        raise AssertionError(f"{checkpoint} was not written")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam"])
def test_killed_by_force_and_resumed(classification, tmp_path, optimizer):
    options = ["--optimizer", optimizer, "--update-freq", "2", "--max-epoch", "1000"]
    saving = ["--save-interval-updates", "3", "--max-update", "1500"]
    argv = tiny.arguments(
        classification, tmp_path / "killed", *runs.SHORT, *options, *saving, "--log-interval", "100"
    )
    left = kill_after_a_checkpoint(argv, tmp_path / "killed" / "checkpoint_last.pt")
    updates = left["optimizer_history"][-1]["num_updates"]
    assert 0 < updates < 1500 and not (tmp_path / "killed" / "crash.pt").exists()
    until = ["--max-update", str(updates + 3)]
    whole = runs.train(classification, tmp_path / "whole", *options, *until)
    resumed = runs.train(classification, tmp_path / "killed", *options, *until)
    assert len(resumed.updates) == 3
    runs.assert_same_end(resumed, whole)


def test_goes_on_with_and_without_sam(classification, tmp_path, caplog):
    """The state is the base optimizer's; the meters of an ascent go with it. An epoch is four
    updates, and every update is logged."""
    caplog.set_level(logging.INFO)
    ends = {}
    for last, name in ((1, "adam"), (2, "sam_adam"), (3, "delta_sam_adam"), (5, "adam")):
        options = ["--optimizer", name, "--max-update", str(last), "--log-interval", "1"]
        ends[last] = runs.train(classification, tmp_path, *options)
    assert caplog.text.count("from the optimizer state of") == 3
    for last in (2, 3, 5):
        assert [log["num_updates"] for log in ends[last].updates][-1] == str(last)
    assert "sam_loss" in ends[3].updates[-1] and "delta_sam_r" in ends[3].updates[-1]
    for log in ends[5].updates:
        assert not any("sam" in key or key == "sharpness" for key in log)
    with pytest.raises(AssertionError, match="Optimizer does not match"):
        runs.train(classification, tmp_path, "--optimizer", "sam_sgd", "--max-update", "7")
