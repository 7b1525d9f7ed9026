"""Ranges of options: every limit, what is not finite, and the same ranges on a command line."""

import argparse
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Optional

import pytest
from fairseq.dataclass import FairseqDataclass

from deltasam_fairseq.options import UsageError, check_options, check_range, option, ranged


@dataclass
class Config(FairseqDataclass):
    """Two options, one of which may be omitted."""

    the_share: float = option(0.5, "share of all", above=0, at_most=1)
    the_size: Optional[float] = option(None, "size", remedy="omit it", at_least=2)


@pytest.mark.parametrize(
    "limits, good, bad, words",
    [
        ({"at_least": 1}, (1, 2), (0, None), "must be at least 1"),
        ({"above": 0}, (0.1,), (0.0, float("nan"), float("inf")), "must be finite and above 0"),
        ({"above": 0, "below": 1}, (0.5,), (0.0, 1.0, float("nan")), "must be above 0 and below 1"),
        ({"at_least": 0, "at_most": 1}, (0, 1), (-1, 2), "must be at least 0 and at most 1"),
    ],
)
def test_range(limits, good, bad, words):
    for value in good:
        check_range("an_option", value, **limits)
    for value in bad:
        with pytest.raises(UsageError) as error:
            check_range("an_option", value, "give another", **limits)
        expected = words if isinstance(value, float) else words.replace("finite and ", "")
        assert str(error.value) == f"--an-option {value}: {expected}; give another"


def test_options_of_a_configuration():
    check_options(Config(), Config)
    check_options(SimpleNamespace(), Config)  # a default is in its range
    with pytest.raises(UsageError, match="--the-share 2.0: .* at most 1; it is the share of all"):
        check_options(SimpleNamespace(the_share=2.0), Config)
    with pytest.raises(UsageError, match="--the-size 1.0: must be finite .* omit it"):
        check_options(SimpleNamespace(the_size=1.0), Config)


def test_help_has_range_and_default():
    helps = {
        name: field.metadata["help"]
        for name, field in Config.__dataclass_fields__.items()
        if name != "_name"
    }
    assert helps["the_share"] == "share of all; above 0 and at most 1 (default: 0.5)"
    assert helps["the_size"] == "size; at least 2"


def test_argparse_says_the_range(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=ranged(int, at_least=1))
    assert parser.parse_args(["--n", "1"]).n == 1
    for text, words in (("0", "must be at least 1, got 0"), ("x", "invalid int value: 'x'")):
        with pytest.raises(SystemExit):
            parser.parse_args(["--n", text])
        assert words in capsys.readouterr().err
