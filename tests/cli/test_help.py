"""--help shows the options of this plugin, which fairseq alone never shows of any optimizer."""

import pytest
from fairseq import options

from tests.helpers import tiny

SHARED = ["--sam-rho", "--sam-adaptive", "--sam-eta", "--sam-start-update", "--sam-scope"]
SHARED += ["--sam-rho-schedule", "--sam-gsam-alpha", "--sam-functional", "--sam-mask"]
SHARED += ["--sam-radius", "--sam-micro"]
SWA = ["--swa-start", "--swa-every", "--swa-decay", "--swa-lr", "--swa-validate-both"]
DELTA = ["--delta-sam-beta", "--delta-sam-probe-radius", "--delta-sam-weights"]
DELTA += ["--delta-sam-lambda"]


def help_of(capsys, *argv):
    parser = options.get_training_parser()
    with pytest.raises(SystemExit) as stop:
        options.parse_args_and_arch(parser, [*argv, "--user-dir", tiny.USER_DIR, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, shown, hidden",
    [
        (["--optimizer", "delta_sam_adam"], [*SHARED, *DELTA, "--adam-betas"], []),
        (["--optimizer", "sam_sgd"], [*SHARED, "--momentum"], ["--adam-betas"]),
        (["--optimizer", "adam"], [*SHARED, *DELTA, "--adam-betas"], []),
        ([], [*SHARED, *DELTA, *SWA], ["--adam-betas"]),
        (["--lr-scheduler", "swa_cosine"], [*SWA, "--lr-period-updates"], ["--power"]),
        (["--criterion", "sentence_prediction"], [*SHARED, "--regression-target"], []),
    ],
)
def test_help_shows_the_options(capsys, argv, shown, hidden):
    found = {word.rstrip(",") for word in help_of(capsys, *argv).split() if word.startswith("--")}
    assert set(shown) <= found and not set(hidden) & found


def test_help_says_range_default_and_the_papers_values(capsys):
    text = " ".join(help_of(capsys, "--optimizer", "delta_sam_adam").split())
    words = ("(default: 0.05)", "0.02 for RoBERTa large", "(default: 3)", "{3, 5, 10, 20, 50, 70}")
    choices = ("constant (default)", "rho (default)", "none (default)", "global batch (default)")
    for part in (*words, *choices):
        assert part in text
    assert text.count("at least 0") >= 4
