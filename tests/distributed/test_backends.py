"""Ways of data parallelism: those that work, bit for bit, and those that are refused."""

import json

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.processes import free_port, run_together

SHARDED = {
    "sam_adam": ["--optimizer", "sam_adam"],
    "delta_sam_adam": ["--optimizer", "delta_sam_adam"],
    "delta_sam_adam, fp16": ["--optimizer", "delta_sam_adam", "--memory-efficient-fp16"],
    "delta_sam_adam, foreach": ["--optimizer", "delta_sam_adam", "--adam-step", "foreach"],
    "sam_adam, fused": ["--optimizer", "sam_adam", "--adam-step", "fused"],
}

REFUSED = {
    "--use-bmuf": "--use-bmuf cannot be combined with --optimizer sam_adam: each rank would",
    "--ddp-backend slowmo": "--ddp-backend slowmo cannot be combined with --optimizer sam_adam: "
    "use --ddp-backend legacy_ddp or pytorch_ddp",
    "--ddp-backend fully_sharded": "--ddp-backend fully_sharded cannot be combined with",
    "--model-parallel-size 2": "--model-parallel-size cannot be combined with",
    "--pipeline-model-parallel": "--pipeline-model-parallel cannot be combined with",
}


@pytest.mark.parametrize("options", REFUSED)
def test_refused_at_the_command_line(classification, tmp_path, capsys, options):
    from fairseq import options as fairseq_options

    argv = tiny.arguments(classification, tmp_path, "--optimizer", "sam_adam", *options.split())
    parser = fairseq_options.get_training_parser()
    with pytest.raises(SystemExit) as exit_:
        fairseq_options.parse_args_and_arch(parser, argv)
    assert exit_.value.code == 2
    assert REFUSED[options] in capsys.readouterr().err


@pytest.mark.parametrize("options", REFUSED)
def test_not_refused_for_other_optimizers(classification, tmp_path, options):
    from fairseq import options as fairseq_options

    argv = tiny.arguments(classification, tmp_path, *options.split())
    fairseq_options.parse_args_and_arch(fairseq_options.get_training_parser(), argv)


@pytest.fixture(scope="module")
def sharded(classification, tmp_path_factory):
    """Runs with two ranks: plain, --zero-sharding os, and the latter stopped and resumed."""
    pytest.importorskip("fairscale", reason="--zero-sharding os needs fairscale (0.4.13 was tried)")
    folder = tmp_path_factory.mktemp("sharded")
    specs = []

    def add(name, *more):
        group = ["--distributed-world-size", "2", "--distributed-no-spawn", "--distributed-backend"]
        group += ["gloo", "--distributed-init-method", f"tcp://127.0.0.1:{free_port()}"]
        save = folder / name.replace(", begun", ", resumed")
        argv = [
            *tiny.arguments(classification, save, "--batch-size", "4", "--max-update", "5"),
            *("--find-unused-parameters", "--ddp-backend", "legacy_ddp", "--disable-validation"),
            *(*more, *group, "--distributed-rank"),
        ]
        ranks = [[*argv, str(rank)] for rank in (0, 1)]
        out = str(folder / name)
        specs.append({"ranks": ranks, "env": {}, "out": out, "timeout": 60, "hanging": 0})

    for name, options in SHARDED.items():
        sharding = [*options, "--zero-sharding", "os"]
        add(name, *options)
        add(f"{name}, sharded", *sharding)
        add(f"{name}, begun", *sharding, "--max-update", "3")
        add(f"{name}, resumed", *sharding)
    for spec in specs:
        run_together(spec)
        with open(spec["out"] + ".json") as f:
            assert json.load(f)["status"] == [0, 0], open(spec["out"] + ".0.log").read()[-4000:]
    return folder


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("how", ["sharded", "resumed"])
def test_sharded_optimizer_state_changes_no_bit(sharded, name, how):
    plain = tiny.checkpoint_weights(sharded / name / "checkpoint_last.pt")
    other = tiny.checkpoint_weights(sharded / f"{name}, {how}" / "checkpoint_last.pt")
    assert all(torch.equal(plain[key], other[key]) for key in plain)
