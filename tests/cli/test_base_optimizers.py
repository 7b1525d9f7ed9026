"""Every base optimizer of fairseq keeps its options and trains in a whole run."""

import argparse
import dataclasses
import re

import pytest
from fairseq import options
from fairseq.optim import OPTIMIZER_REGISTRY

from deltasam_fairseq.optim import DeltaSAMConfig, SAMConfig
from tests.helpers import runs, tiny

BASES = ["adadelta", "adafactor", "adagrad", "adam", "adamax", "nag", "sgd"]
LAMB = "lamb"
LEARNING_RATE = {"adadelta": "0.5", "sgd": "0.05", "nag": "0.005", "adafactor": "0.002"}


def parser_of(data, optimizer, monkeypatch):
    """The whole parser for an optimizer, as fairseq-train has it when it prints its help."""
    found = []

    def catch(parser, *_, **__):
        found.append(parser)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        parser = options.get_training_parser()
        with pytest.raises(SystemExit):
            options.parse_args_and_arch(
                parser, tiny.arguments(data, data, "--optimizer", optimizer)
            )
    return found[-1]


def options_of(parser):
    return {s: action for action in parser._actions for s in action.option_strings}


def shown(parser):
    """Options that --help speaks of."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", parser.format_usage()))


@pytest.mark.parametrize("base", [*BASES, LAMB])
@pytest.mark.parametrize("wrapper", ["sam", "delta_sam"])
def test_options_of_the_base_are_there(tmp_path, monkeypatch, base, wrapper):
    base_parser = parser_of(tmp_path, base, monkeypatch)
    parser = parser_of(tmp_path, f"{wrapper}_{base}", monkeypatch)
    plain, found = options_of(base_parser), options_of(parser)
    assert plain.keys() <= found.keys()
    fields = dataclasses.fields(SAMConfig if wrapper == "sam" else DeltaSAMConfig)
    own = {"--" + f.name.replace("_", "-") for f in fields if f.name != "_name"}
    own |= {"--adam-step"} if base == "adam" else set()
    assert {"--sam-rho", "--sam-adaptive", "--sam-start-update"} <= own
    assert ("--delta-sam-beta" in own) == (wrapper == "delta_sam")
    assert shown(parser) == shown(base_parser) | own
    hidden = {s for s in found.keys() - plain.keys() if found[s].help is argparse.SUPPRESS}
    assert found.keys() - plain.keys() - hidden == own
    for name, action in plain.items():
        if name != "--optimizer":
            assert found[name].default == action.default, name
            assert found[name].nargs == action.nargs, name


def test_no_base_is_forgotten():
    plain = {name for name in OPTIMIZER_REGISTRY if not name.startswith(("sam_", "delta_sam_"))}
    assert plain - {"composite", "cpu_adam"} == {*BASES, LAMB}


@pytest.mark.parametrize("base", BASES)
def test_trains(classification, tmp_path, base):
    """Two epochs on separable sentences: the loss at the end is below that of the beginning."""
    learning = ["--max-update", "8", "--dropout", "0", "--max-epoch", "20"]
    learning += ["--lr", LEARNING_RATE.get(base, "0.005")]
    for wrapper in ("sam", "delta_sam"):
        name = f"{wrapper}_{base}"
        run = runs.train(classification, tmp_path / name, "--optimizer", name, *learning)
        losses = [float(log["loss"]) for log in run.updates]
        assert len(losses) == 8
        assert sum(losses[6:]) < sum(losses[:2])
        assert all("sam_loss" in log for log in run.updates)


def test_an_option_of_the_base_takes_effect(classification, tmp_path):
    name, short = "delta_sam_sgd", ["--max-update", "3"]
    options_ = ([], ["--momentum", "0.5"], ["--weight-decay", "0.5"])
    ends = [
        runs.train(classification, tmp_path / str(i), "--optimizer", name, *more, *short)
        for i, more in enumerate(options_)
    ]
    assert not any(runs.same_weights(ends[0], end) for end in ends[1:])


@pytest.mark.parametrize("name", [LAMB, f"sam_{LAMB}", f"delta_sam_{LAMB}"])
def test_lamb_without_apex_fails_with_fairseqs_words(classification, tmp_path, name):
    try:
        import apex  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="Please install apex to use LAMB"):
            trainer = tiny.build_trainer(
                tiny.arguments(classification, tmp_path, "--optimizer", name)
            )
            trainer.optimizer  # noqa: B018
    else:
        pytest.skip("apex is there")
