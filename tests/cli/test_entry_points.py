"""Every way to start fairseq's training really trains with SAM; and no other way trains without.

All programs run from another working directory, with the plugin reached by --user-dir alone: the
path that ``python -m deltasam_fairseq`` prints. They are started together, two at a time.
"""

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fairseq.trainer
import fairseq_cli.train
import pytest
from fairseq.dataclass.configs import FairseqConfig
from fairseq_cli import hydra_train
from omegaconf import OmegaConf

import deltasam_fairseq
from tests.helpers import runs, tiny

PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
SAM = ["--optimizer", "sam_adam"]
DELTA_SAM = ["--optimizer", "delta_sam_adam"]

YAML = """\
# @package _global_
common: {{cpu: true, user_dir: {user_dir}, log_format: json, log_interval: 1, seed: 3}}
checkpoint: {{save_dir: {save_dir}, no_epoch_checkpoints: true}}
task: {{_name: sentence_prediction, data: {data}, num_classes: 2, init_token: 0}}
dataset: {{batch_size: 8, num_workers: 0, disable_validation: true}}
criterion: {criterion}
optimization: {{max_update: 2, lr: [0.001]}}
lr_scheduler: fixed
optimizer: {{_name: {optimizer}, sam_rho: 0.1}}
model:
  _name: roberta
  encoder_layers: 1
  encoder_embed_dim: 16
  encoder_ffn_embed_dim: 32
  encoder_attention_heads: 2
  max_positions: 64
"""

# The task takes these two from the criterion, before fairseq-hydra-train imports the plugin.
SMART = (
    "{_name: smart, regression_target: false, "
    "classification_head_name: sentence_classification_head}"
)


def script(name):
    """A program that pip installed beside this Python, or on the PATH."""
    return shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)


def without_pythonpath():
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


@pytest.fixture(scope="module")
def user_dir(tmp_path_factory):
    """What $(python -m deltasam_fairseq) is in a shell: stdout, and nothing but the path."""
    parent = str(Path(deltasam_fairseq.__file__).parent.parent)
    result = subprocess.run(
        [*PYTHON, "deltasam_fairseq"],
        stdout=subprocess.PIPE,
        check=True,
        universal_newlines=True,
        env={**os.environ, "PYTHONPATH": parent, "LOGLEVEL": "DEBUG"},
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )
    return result.stdout[:-1]


def start(program, argv, folder):
    elsewhere = folder / "working directory"
    elsewhere.mkdir(parents=True)
    return subprocess.run(
        [*program, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        env={**without_pythonpath(), "OMP_NUM_THREADS": "1"},
        cwd=elsewhere,
        timeout=180,
    )


@pytest.fixture(scope="module")
def programs(classification, tmp_path_factory, user_dir):
    """name -> a future with the finished process."""
    root = tmp_path_factory.mktemp("programs")

    def command_line(name, *more):
        argv = tiny.arguments(classification, root / name / "run", *runs.SHORT, *more)
        return [*argv, "--max-update", "2", "--user-dir", user_dir]

    def hydra(name, optimizer, criterion="sentence_prediction"):
        config = root / name / "config"
        config.mkdir(parents=True)
        values = {"user_dir": user_dir, "save_dir": root / name / "run", "data": classification}
        (config / "tiny.yaml").write_text(
            YAML.format(optimizer=optimizer, criterion=criterion, **values)
        )
        return ["--config-dir", config, "--config-name", "tiny"]

    two = ["--distributed-world-size", "2", "--ddp-backend", "legacy_ddp"]
    cases = {
        "spawned": ([*PYTHON, "fairseq_cli.train"], command_line("spawned", *two, *DELTA_SAM)),
        "fairseq-train": ([script("fairseq-train")], command_line("fairseq-train", *SAM)),
        "module": ([*PYTHON, "fairseq_cli.train"], command_line("module", *DELTA_SAM)),
        "torchrun": ([*TORCHRUN, "-m", "fairseq_cli.train"], command_line("torchrun", *DELTA_SAM)),
        "hydra": ([script("fairseq-hydra-train")], hydra("hydra", "delta_sam_adam")),
        "hydra with a criterion of ours": (
            [script("fairseq-hydra-train")],
            [
                *hydra("hydra with a criterion of ours", "delta_sam_adam", SMART),
                *("+criterion.smart_lambda=3", "+criterion.smart_momentum=0.9"),
            ],
        ),
        "hydra with a cheaper ascent": (
            [script("fairseq-hydra-train")],
            [
                *hydra("hydra with a cheaper ascent", "sam_adam"),
                *("+optimizer.sam_only=classification_heads", "+optimizer.sam_every=1"),
            ],
        ),
        "hydra with a legacy base": (
            [*PYTHON, "fairseq_cli.hydra_train"],
            hydra("hydra with a legacy base", "delta_sam_adafactor"),
        ),
    }
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(start, program, argv, root / name)
            for name, (program, argv) in cases.items()
        }


TRAINS = ["spawned", "fairseq-train", "module", "torchrun", "hydra", "hydra with a legacy base"]
TRAINS += ["hydra with a criterion of ours", "hydra with a cheaper ascent"]


@pytest.mark.parametrize("name", TRAINS)
def test_trains_with_sam(programs, name):
    result = programs[name].result()
    assert result.returncode == 0, result.stdout[-3000:]
    updates = [log for log in runs.json_lines(result.stdout) if "num_updates" in log]
    assert [log["num_updates"] for log in updates[:2]] == ["1", "2"]
    assert all(float(log["sharpness"]) > 0 for log in updates[:2])


# Node of the optimizer in a yaml file, and what the run says of it.
NODES = {
    "_name: sam_adam, sam_micro: 4": "one ascent for every 4 sentences",
    "_name: delta_sam_adam, delta_sam_weights: gibbs": "RW-SAM on adam: rho 0.05, lambda 2",
    "_name: delta_sam_adam, sam_rho_schedule: lr, sam_rho_min: 0.01": "down to 0.01 along the lear",
    "_name: sam_adam, sam_rho_schedule: warmup, sam_rho_warmup_updates: 9, sam_rho_min: 0.01": (
        "from 0.01 on in 9 updates"
    ),
    "_name: sam_adam, sam_gsam_alpha: 0.4": "GSAM, alpha 0.4",
    "_name: sam_adam, sam_functional: true": "output gradients at w",
    "_name: sam_adam, sam_mask: fisher, sam_mask_share: 0.2": "Fisher mask of 0.2 of the weights",
    "_name: sam_adam, sam_radius: trust_region, sam_trust_sigma: 1": "trust region (TRAM), noise 1",
    "_name: sam_adam, sam_radius: trust_region_theta": "trust region (TRAM-theta)",
}


@pytest.mark.parametrize("node", NODES)
def test_methods_through_hydra(classification, tmp_path, monkeypatch, caplog, node):
    """An update of each, in this process. The program does not know the optimizer while it adds
    defaults: it imports the plugin after that."""
    values = {"user_dir": tiny.USER_DIR, "save_dir": tmp_path, "data": classification}
    text = YAML.format(optimizer="", criterion="sentence_prediction", **values)
    cfg = OmegaConf.merge(OmegaConf.structured(FairseqConfig), OmegaConf.create(text))
    add_defaults = hydra_train.add_defaults

    def without_the_optimizer(cfg):
        del cfg.optimizer
        add_defaults(cfg)
        cfg.optimizer = OmegaConf.create(f"{{{node}}}")

    monkeypatch.setattr(hydra_train, "add_defaults", without_the_optimizer)
    cfg.optimization.max_update = 1
    with caplog.at_level(logging.INFO):
        hydra_train._hydra_main(cfg)
    assert NODES[node] in caplog.text
    (update,) = (log for log in runs.json_lines(caplog.text) if "train_loss" not in log)
    assert update["num_updates"] == "1" and float(update["sam_loss"]) > 0


def test_spawned_processes_are_one_run(programs):
    """Two ranks, and every update logged once."""
    result = programs["spawned"].result()
    updates = [log for log in runs.json_lines(result.stdout) if "ups" in log]
    assert [log["num_updates"] for log in updates] == ["1", "2"]
    assert "'distributed_world_size': 2" in result.stdout


def test_the_path_is_that_of_the_package(user_dir):
    assert user_dir == str(Path(deltasam_fairseq.__file__).parent)


@pytest.mark.parametrize("optimizer", ["sam_adam", "delta_sam_adam", "delta_sam_adafactor"])
def test_fairseqs_own_trainer_refuses_to_step(classification, tmp_path, monkeypatch, optimizer):
    """The seam not in place: an error with a remedy, and no weight has moved."""
    monkeypatch.setattr(fairseq_cli.train, "Trainer", fairseq.trainer.Trainer)
    argv = tiny.arguments(classification, tmp_path, "--optimizer", optimizer)
    trainer = tiny.build_trainer(argv)
    assert type(trainer) is fairseq.trainer.Trainer
    before = tiny.weights(trainer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"--optimizer {optimizer}.*SharpnessAwareTrainer"):
            trainer.train_step(tiny.batches(trainer)[:1])
    assert all((a == b).all() for a, b in zip(before, tiny.weights(trainer)))


def test_install_twice_is_install_once():
    names = ("Trainer", "add_defaults")
    before = [getattr(fairseq_cli.train, name) for name in names]
    deltasam_fairseq.install()
    assert [getattr(fairseq_cli.train, name) for name in names] == before
    assert fairseq_cli.train.Trainer is deltasam_fairseq.SharpnessAwareTrainer
