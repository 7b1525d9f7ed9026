"""Limiting cases over whole runs with dropout, bit for bit."""

import pytest

from tests.helpers import runs

RUN = ["--max-update", "6", "--update-freq", "1"]


@pytest.mark.parametrize("base", ["adam", "sgd", "adafactor"])
@pytest.mark.parametrize("wrapper", ["sam", "delta_sam"])
def test_rho_zero_is_the_base_optimizer(classification, tmp_path, base, wrapper):
    plain = runs.train(classification, tmp_path / "plain", "--optimizer", base, *RUN)
    zero = ["--optimizer", f"{wrapper}_{base}", "--sam-rho", "0"]
    run = runs.train(classification, tmp_path / "zero", *zero, *RUN)
    runs.assert_same_end(run, plain)
    assert [log["loss"] for log in run.updates] == [log["loss"] for log in plain.updates]
    assert "sam_loss" not in run.updates[-1]
    if base != "adam":  # what the comparison would say otherwise is seen once
        return
    more = ["--optimizer", f"{wrapper}_{base}"]
    assert not runs.same_weights(runs.train(classification, tmp_path / "more", *more, *RUN), plain)


@pytest.mark.parametrize("update_freq", ["1", "2"])
def test_beta_zero_is_sam(classification, tmp_path, update_freq):
    options = ["--max-update", "6", "--update-freq", update_freq, "--sam-rho", "0.2"]
    sam = runs.train(classification, tmp_path / "sam", *options, "--optimizer", "sam_adam")
    delta = ["--optimizer", "delta_sam_adam", "--delta-sam-beta"]
    zero = runs.train(classification, tmp_path / "zero", *options, *delta, "0")
    runs.assert_same_end(zero, sam)
    for key in ("loss", "sam_loss", "sharpness", "ascent_gnorm"):
        assert [log[key] for log in zero.updates] == [log[key] for log in sam.updates]
    assert not runs.same_weights(
        runs.train(classification, tmp_path / "three", *options, *delta, "3"), sam
    )


def test_start_update(classification, tmp_path):
    """Up to update 3 the base optimizer's run, exactly, and not after it."""

    def ends(name, *options):
        return [
            runs.train(classification, tmp_path / name / n, *options, "--max-update", n)
            for n in ("3", "4")
        ]

    plain = ends("plain", "--optimizer", "adam")
    late = ends("late", "--optimizer", "sam_adam", "--sam-start-update", "3")
    runs.assert_same_end(late[0], plain[0])
    assert not runs.same_weights(late[1], plain[1])
    assert ["sam_loss" in log for log in late[1].updates] == [False, False, False, True]
