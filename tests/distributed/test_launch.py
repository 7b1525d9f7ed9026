"""Every documented way of starting two processes trains the same model, bit for bit.

All on CPUs over gloo, through the files of examples/distributed. SLURM is played by slurm_here.py;
two hosts are two network namespaces, where this user may make them.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import slurm_here, tiny
from tests.helpers.processes import free_port

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"
CONFIG = EXAMPLES / "hydra_submitit" / "config"
ARGUMENTS = [*tiny.MODEL, "--max-update", "4", "--num-workers", "0", "--seed", "3"]
ARGUMENTS += ["--log-format", "json"]


@pytest.fixture(scope="module")
def settings(classification, language_modelling, tmp_path_factory):
    """The user's values at the top of the scripts."""
    folder = tmp_path_factory.mktemp("launch")
    trainer = tiny.build_trainer(tiny.arguments(language_modelling, folder, criterion="masked_lm"))
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(folder / "pretrained.pt"), {})
    return {
        "DATA": str(classification),
        "CHECKPOINT": str(folder / "pretrained.pt"),
        "DEVICE": "--cpu",
        "USER_DIR": tiny.USER_DIR,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


@contextlib.contextmanager
def started(*commands, **variables):
    """Processes that are gone afterwards, with all that they started."""
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **{k: str(v) for k, v in variables.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            start_new_session=True,
        )
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(*commands, **variables):
    """Run commands side by side to their end; returns their outputs."""
    with started(*commands, **variables) as processes:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-6000:]
    return outputs


def weights(save_dir):
    return tiny.without_fused(tiny.checkpoint_weights(save_dir / "checkpoint_last.pt"))


@pytest.fixture(scope="module")
def expected(settings, tmp_path_factory):
    """The weights that two processes of one machine arrive at, started by the first example."""
    save_dir = tmp_path_factory.mktemp("one_node")
    (output,) = run(
        ["bash", EXAMPLES / "one_node" / "train.sh", *ARGUMENTS],
        **dict(settings, SAVE_DIR=save_dir, PROCESSES=2),
    )
    assert "training on 2 devices" in output and "Loaded checkpoint" in output
    return weights(save_dir)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def finetune(settings, save_dir):
    """fairseq-train's part of the first example, with nothing that starts processes."""
    script = (EXAMPLES / "one_node" / "train.sh").read_text()
    call = "fairseq-train" + script.split('$(command -v fairseq-train)"')[1]
    environment = dict(os.environ, **settings, SAVE_DIR=str(save_dir), BATCH="16", PROCESSES="2")
    words = subprocess.check_output(
        ["bash", "-c", f'printf "%s\\0" {call}', "-", *ARGUMENTS], env=environment
    )
    return words.decode().rstrip("\0").split("\0")


def test_fairseqs_own_spawning(settings, expected, tmp_path):
    run([*finetune(settings, tmp_path), "--distributed-world-size", 2], **settings)
    assert_same(weights(tmp_path), expected)


def test_one_process_a_rank(settings, expected, tmp_path):
    command = [*finetune(settings, tmp_path), "--distributed-world-size", 2]
    command += ["--distributed-init-method", f"tcp://127.0.0.1:{free_port()}"]
    command += ["--distributed-no-spawn", "--distributed-rank"]
    run([*command, 0], [*command, 1], **settings)
    assert_same(weights(tmp_path), expected)


def test_torchrun_over_two_nodes_on_loopback(settings, expected, tmp_path):
    """With fairseq's own option for the world size, which torchrun's must not contradict."""
    command = ["bash", EXAMPLES / "several_nodes" / "train.sh", *ARGUMENTS]
    command += ["--distributed-world-size", 2]
    values = dict(settings, SAVE_DIR=tmp_path, PROCESSES=1, RENDEZVOUS=f"localhost:{free_port()}")
    run(command, command, **values)
    assert_same(weights(tmp_path), expected)


@pytest.fixture
def two_hosts(tmp_path):
    """Commands that run what follows on host a and on host b, joined by a network cable."""
    mark = f"dsam{os.getpid()}"
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.201.7.1 hosta\n10.201.7.2 hostb\n")
    commands = [f"ip netns add {mark}{n}" for n in "ab"]
    commands.append(f"ip link add va netns {mark}a type veth peer name vb netns {mark}b")
    enter = []
    for n, address in (("a", "10.201.7.1/24"), ("b", "10.201.7.2/24")):
        inside = f"ip netns exec {mark}{n}"
        commands.append(f"{inside} ip addr add {address} dev v{n}")
        commands += [f"{inside} ip link set {device} up" for device in (f"v{n}", "lo")]
        setup = f'hostname host{n} && mount --bind {hosts} /etc/hosts && exec "$@"'
        enter.append([*inside.split(), "unshare", "--uts", "--mount", "sh", "-c", setup, "host"])
    for program in ("ip", "unshare", "hostname", "mount"):
        if shutil.which(program) is None:
            pytest.skip(f"two hosts need the program {program}")
    try:
        for command in [c.split() for c in commands] + [[*e, "true"] for e in enter]:
            made = subprocess.run(command, stderr=subprocess.PIPE, universal_newlines=True)
            if made.returncode:
                pytest.skip(f"no privilege for network namespaces: {made.stderr.strip()}")
        yield enter
    finally:
        for n in "ab":  # the cable goes with its ends
            subprocess.run(["ip", "netns", "del", f"{mark}{n}"], stderr=subprocess.DEVNULL)


def test_torchrun_over_two_hosts(two_hosts, settings, expected, tmp_path):
    script = ["bash", EXAMPLES / "several_nodes" / "train.sh", *ARGUMENTS]
    save_dir = tmp_path / "checkpoints"
    outputs = run(
        *([*host, *script] for host in two_hosts),
        **dict(settings, SAVE_DIR=save_dir, PROCESSES=1, RENDEZVOUS="hosta:29400"),
    )
    ranks = {f"initialized host {host} as rank" in "".join(outputs) for host in ("hosta", "hostb")}
    assert ranks == {True}
    assert_same(weights(save_dir), expected)


def sbatch(*options):
    return ["sbatch", "--wait", *options, EXAMPLES / "slurm" / "train.sbatch", *ARGUMENTS]


def test_slurm_and_requeued(settings, expected, tmp_path):
    """Two tasks of one node are stopped half-way; one task on each of two nodes goes on."""
    values = dict(settings, SAVE_DIR=tmp_path / "save", **slurm_here.install(tmp_path, settings))
    run([*sbatch("--nodes=1", "--ntasks-per-node=2"), "--max-update", 2], **values)
    run(sbatch("--nodes=2", "--ntasks-per-node=1"), **values)
    output = (tmp_path / "output").read_text()
    assert output.count("training on 2 devices") == 2
    assert "checkpoint_last.pt (epoch 2 @ 2 updates)" in output
    assert_same(weights(tmp_path / "save"), expected)


def test_slurm_job_asks_to_be_queued_again_before_its_time_is_up(settings, tmp_path):
    values = dict(settings, SAVE_DIR=tmp_path, SLURM_JOB_ID=7, SLURM_NNODES=1)
    values.update(slurm_here.install(tmp_path, settings), SLURM_NTASKS_PER_NODE=2)
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/sh\ntouch {tmp_path}/running\nexec sleep 60\n")
    with started(["bash", EXAMPLES / "slurm" / "train.sbatch"], **values) as (job,):
        deadline = time.monotonic() + 60
        while not (tmp_path / "running").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        while not (tmp_path / "requeued").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert (tmp_path / "requeued").read_text() == "7"


def hydra_overrides(settings):
    pytest.importorskip("hydra", minversion="1.1")  # older ones do not know oc.env
    model = [f"+model.{k[2:].replace('-', '_')}={v}" for k, v in zip(*[iter(tiny.MODEL[2:-2])] * 2)]
    return [
        *("--config-dir", CONFIG, "--config-name", "rte", *model, "model._name=roberta_base"),
        *("model.max_positions=64", "task.max_positions=64", f"task.data={settings['DATA']}"),
        *(f"common.user_dir={tiny.USER_DIR}", "common.fp16=false", "common.cpu=true"),
        *("common.seed=3", f"checkpoint.finetune_from_model={settings['CHECKPOINT']}"),
        *("dataset.num_workers=0", "dataset.batch_size=8", "optimization.max_update=4"),
        "distributed_training.distributed_backend=gloo",
    ]


def test_hydra_under_torchrun(settings, expected, tmp_path):
    program = shutil.which("fairseq-hydra-train", path=settings["PATH"])
    command = ["torchrun", "--standalone", "--nproc_per_node", 2, program]
    command += [*hydra_overrides(settings), "+run=torchrun", f"hydra.run.dir={tmp_path}"]
    run(command, **settings)
    assert_same(weights(tmp_path / "checkpoints"), expected)


@pytest.mark.parametrize("launcher", ["submitit_local", "submitit_slurm"])
def test_hydra_with_submitit(launcher, settings, expected, tmp_path):
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("needs pip install hydra-submitit-launcher")
    command = ["fairseq-hydra-train", "-m", *hydra_overrides(settings), f"+run={launcher}"]
    command += [f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path / 'runs'}"]
    values = dict(settings)
    if launcher == "submitit_slurm":
        command += ["hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=1"]
        values.update(slurm_here.install(tmp_path, settings))
    else:
        command += [f"distributed_training.distributed_port={free_port()}"]
    run(command, **values)
    assert_same(weights(tmp_path / "runs" / "0" / "checkpoints"), expected)
