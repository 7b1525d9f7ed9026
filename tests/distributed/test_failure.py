"""Ranks that are killed, hang, or meet a NaN: what the others do, and what is left on disk.

fairseq-train with real processes, gloo over TCP. A --user-dir of the tests (faults) strikes at
the chosen moment.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.processes import HERE, PATH, free_port, run_together

FAULTS = str(HERE / "faults")
UPDATES = 7
# Seconds that a rank may take to see that another is gone; measured 0.02 to 0.06.
NOTICE = 10

# moment -> the rank that is killed, updates done by then. Saved after updates 2, 4, 6; 15
# batches an epoch, so an epoch has 4 updates of 2 ranks and 2 micro-batches.
KILLED = {
    "probe": (1, 3),
    "reduction": (0, 3),
    "ascended": (1, 3),
    "save": (0, 6),
    "copy": (0, 6),
}
PLACES = ["clean", "probe", "descent"]
OPTIMIZERS = ["sam_adam", "delta_sam_adam"]
SPLITS = {"1 x 4": (1, 4), "4 x 1": (4, 1)}
FP16 = ("--memory-efficient-fp16", "--fp16-init-scale", "4")


class Runs:
    """Collects runs, makes them all in one go, reads what they left."""

    def __init__(self, folder, data):
        self.folder, self.data, self.specs = folder, data, []

    def argv(self, save, *more):
        """Global batches of 8 sentences: of 2 a micro-batch."""
        return tiny.arguments(
            self.data,
            self.folder / save,
            *("--user-dir", FAULTS, "--optimizer", "delta_sam_adam", "--batch-size", "2"),
            *("--max-update", str(UPDATES), "--save-interval-updates", "2"),
            *("--find-unused-parameters", "--disable-validation", *more),
        )

    def add(self, name, world_size, *more, save=None, fault=None, hanging=0, **env):
        argv, port = self.argv(save or name, *more), free_port()
        group = [
            *("--distributed-world-size", str(world_size), "--distributed-no-spawn"),
            *("--distributed-init-method", f"tcp://127.0.0.1:{port}"),
            *("--distributed-backend", "gloo", "--distributed-rank"),
        ]
        ranks = [argv + [*group, str(r)] if world_size > 1 else argv for r in range(world_size)]
        seen = str(self.folder / f"{name}.seen")
        env.update(PYTHONPATH=PATH, SEEN=seen, FAULT=json.dumps(fault or {}))
        out = str(self.folder / name)
        spec = {"ranks": ranks, "env": env, "out": out, "timeout": 60, "hanging": hanging}
        self.specs.append(spec)

    def make(self):
        for spec in self.specs:
            run_together(spec)
        return self

    def ends(self, name):
        return json.loads((self.folder / f"{name}.json").read_text())

    def log(self, name, rank=0):
        return (self.folder / f"{name}.{rank}.log").read_text()

    def seen(self, name, rank=0):
        """What a rank saw, a dict an update."""
        lines = (self.folder / f"{name}.seen.{rank}").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def digests(self, name, rank=0):
        return {line["updates"]: line["weights"] for line in self.seen(name, rank)}

    def weights(self, name, checkpoint="checkpoint_last.pt"):
        return tiny.checkpoint_weights(self.folder / name / checkpoint)


@pytest.fixture(scope="module")
def runs(classification, tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("failure"), classification)
    accumulated = ("--update-freq", "2")
    runs.add("whole", 2, *accumulated)
    for moment, (rank, update) in KILLED.items():
        fault = {"moment": moment, "rank": rank, "update": update}
        runs.add(f"killed, {moment}", 2, *accumulated, save=moment, fault=fault)
        runs.add(f"restarted, {moment}", 2, *accumulated, save=moment)
    fault = {"moment": "ascended", "rank": 2, "update": 1}
    runs.add("one of three", 3, fault=fault)
    fault = {"moment": "stop", "rank": 1, "update": 1}
    runs.add("hanging", 2, "--heartbeat-timeout", "4", fault=fault, hanging=1)

    for place in PLACES:
        for optimizer in OPTIMIZERS if place == "clean" else OPTIMIZERS[1:]:
            fault = {"moment": f"nan {place}", "rank": 1, "update": 3}
            name = f"nan {place}, {optimizer}"
            saved = ("--save-interval-updates", "3")
            runs.add(name, 2, "--optimizer", optimizer, *saved, fault=fault)
        runs.add(f"nan {place}, fp16", 2, *FP16, fault=fault, CPU_OVERFLOW="1")

    plain = ("--dropout", "0", "--attention-dropout", "0", "--save-interval-updates", "3")
    runs.add("whole, no dropout", 2, *accumulated, *plain)
    for split, (ranks, update_freq) in SPLITS.items():
        runs.add(f"begun, {split}", 2, *accumulated, *plain, "--max-update", "3", save=split)
        runs.add(
            f"continued, {split}", ranks, *plain, "--update-freq", f"{update_freq}", save=split
        )
    return runs.make()


def test_a_run_without_faults(runs):
    assert runs.ends("whole")["status"] == [0, 0]
    assert runs.digests("whole") == runs.digests("whole", rank=1)
    assert len(runs.digests("whole")) == UPDATES


@pytest.mark.parametrize("moment", KILLED)
def test_the_other_rank_ends_with_a_message(runs, moment):
    killed, _ = KILLED[moment]
    other = 1 - killed
    ends = runs.ends(f"killed, {moment}")
    assert ends["status"][killed] == -signal.SIGKILL
    assert ends["status"][other] == 1 and ends["later"][other] < NOTICE
    log = runs.log(f"killed, {moment}", other)
    assert f"rank {other} of 2: another rank is gone or hangs" in log
    assert str(runs.folder / moment) in log  # where the checkpoints are


def test_all_of_three_ranks_end(runs):
    ends = runs.ends("one of three")
    assert ends["status"] == [1, 1, -signal.SIGKILL]
    assert max(ends["later"]) < NOTICE


def test_the_heartbeat_ends_a_rank_that_waits_for_one_that_hangs(runs):
    assert runs.ends("hanging")["status"] == [-signal.SIGTERM, None]
    assert "Killing job for not making progress in 4 seconds" in runs.log("hanging")


@pytest.mark.parametrize("moment", KILLED)
def test_restarted_run_is_the_uninterrupted_one_bitwise(runs, moment):
    """It reads the last checkpoint of the killed run, so that one is whole and unperturbed."""
    assert runs.ends(f"restarted, {moment}")["status"] == [0, 0]
    whole, restarted = runs.digests("whole"), runs.digests(f"restarted, {moment}")
    _, update = KILLED[moment]
    first = min(restarted)
    # "save" and "copy" of the checkpoint after update 6 fail: the one after update 4 is in force
    assert first == {3: 3, 6: 5}[update]
    assert all(restarted[n] == whole[n] for n in range(first, UPDATES + 1))
    for name, weight in runs.weights("whole").items():
        assert torch.equal(weight, runs.weights(moment)[name])


@pytest.mark.parametrize("split", SPLITS)
def test_continued_with_another_world_size(runs, split):
    """2 ranks x 2 micro-batches stop in the middle of an epoch; the global batches stay.

    float32, without dropout: masks belong to a micro-batch's place, which changes.
    """
    assert set(runs.ends(f"continued, {split}")["status"]) == {0}
    assert "12 batches of epoch 1 are done, 0 of them will be seen again" in runs.log(
        f"continued, {split}"
    )
    whole = {line["updates"]: line["log"] for line in runs.seen("whole, no dropout")}
    for line in runs.seen(f"continued, {split}"):
        assert line["log"]["loss"] == pytest.approx(whole[line["updates"]]["loss"], abs=2e-3)
    for name, weight in runs.weights("whole, no dropout").items():
        # measured 6e-8; Adam can magnify rounding of a gradient near zero up to its lr of 1e-3
        torch.testing.assert_close(runs.weights(split)[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case", ["nan clean, sam_adam", "nan clean, delta_sam_adam", "nan descent, delta_sam_adam"]
)
def test_nan_on_one_rank_stops_all_with_the_same_error(runs, case):
    ends = runs.ends(case)
    assert ends["status"] == [1, 1] and max(ends["later"]) < NOTICE
    for rank in (0, 1):
        last = runs.log(case, rank).strip().splitlines()[-1]
        assert last == "FloatingPointError: gradients are Nan/Inf"
    assert runs.digests(case) == runs.digests(case, rank=1)


@pytest.mark.parametrize("case", ["nan clean, delta_sam_adam", "nan descent, delta_sam_adam"])
def test_crash_checkpoint_holds_the_unperturbed_weights(runs, case):
    """Those after update 3, the last that was made; saved there with --save-interval-updates."""
    before = runs.weights(case, "checkpoint_1_3.pt")
    crash = runs.weights(case, "crash.pt")
    assert crash.keys() == before.keys()
    assert all(torch.equal(crash[name], before[name]) for name in crash)


def test_nan_in_the_probe_of_one_rank_gives_uniform_weights_on_all(runs):
    case = "nan probe, delta_sam_adam"
    assert runs.ends(case)["status"] == [0, 0]
    assert runs.digests(case) == runs.digests(case, rank=1)
    assert len(runs.digests(case)) == UPDATES
    lines = re.findall(r"train_inner \| (\{.*\})", runs.log(case))
    uniform = {line["num_updates"]: line for line in map(json.loads, lines)}
    counts = {n: float(line["delta_sam_uniform"]) for n, line in uniform.items()}
    assert counts == {str(n): float(n == 4) for n in range(1, UPDATES + 1)}
    assert float(uniform["4"]["delta_sam_effective"]) == pytest.approx(1)


@pytest.mark.parametrize("place", PLACES)
def test_overflow_on_one_rank_is_one_on_all(runs, place):
    """--memory-efficient-fp16: the batch is skipped and the loss scale halved, on both ranks."""
    case = f"nan {place}, fp16"
    assert runs.ends(case)["status"] == [0, 0]
    assert [s["weights"] for s in runs.seen(case)] == [s["weights"] for s in runs.seen(case, 1)]
    overflows = re.findall("setting loss scale to: 2.0", runs.log(case))
    assert len(overflows) == (place != "probe")


# Under torchrun


def torchrun(argv, *options, env):
    program = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "fairseq_cli.train"]
    return tiny.train(argv, program=program, env={"PYTHONPATH": PATH, **env})


def test_torchrun_restarts_a_killed_rank_by_itself(runs):
    """--max-restarts: both ranks start again from the last checkpoint, to the same end.

    The variable makes torchrun give each life a store of its own. With the shared one (torch
    2.13's default) a rank can read the address that its peer had before, and fails to connect.
    """
    fault = {"moment": "ascended", "rank": 1, "update": 3}
    result = torchrun(
        runs.argv("torchrun", "--update-freq", "2", "--ddp-backend", "legacy_ddp"),
        *("--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"),
        env={"FAULT": json.dumps(fault), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    assert "exitcode: -9" in result.stdout
    for name, weight in runs.weights("whole").items():
        assert torch.equal(weight, runs.weights("torchrun")[name])


def test_elastic_torchrun_goes_on_without_a_lost_node(runs, tmp_path):
    """--nnodes 1:2: two nodes of one rank; one is lost, the other goes on with twice the work.

    A shell works out --update-freq, since torchrun tells the number of ranks only to the ranks.
    """
    plain = ["--dropout", "0", "--attention-dropout", "0", "--save-interval-updates", "3"]
    train = [sys.executable, "-m", "fairseq_cli.train", *runs.argv("elastic", *plain)]
    script = f"exec {' '.join(map(shlex.quote, train))} --update-freq $((4 / WORLD_SIZE))"
    fault = {"moment": "node", "rank": 1, "update": 3}
    env = {"FAULT": json.dumps(fault), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    port = free_port()

    def node(number):
        waits = "join_timeout=60,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=2"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2"),
            *("--nproc-per-node", "1", "--max-restarts", "3", "--monitor-interval", "0.2"),
            *("--rdzv-backend", "c10d", "--rdzv-id", "elastic"),
            *("--rdzv-endpoint", f"127.0.0.1:{port}"),
            *("--rdzv-conf", f"{waits},is_host={int(number == 0)}"),
            *("--no-python", "bash", "-c", script),
        ]
        with open(tmp_path / f"{number}.log", "w") as log:
            return subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH, **env},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    nodes = [node(0), node(1)]
    try:
        statuses = [process.wait(timeout=120) for process in nodes]
    finally:
        for process in nodes:
            process.terminate()  # an agent ends its ranks
    log = (tmp_path / "0.log").read_text()
    assert statuses == [0, -signal.SIGKILL], log[-4000:]
    assert "training on 1 devices" in log and "what 2 ranks began" in log
    for name, weight in runs.weights("whole, no dropout").items():
        torch.testing.assert_close(runs.weights("elastic")[name], weight, rtol=0, atol=1e-5)
