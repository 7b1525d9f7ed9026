"""The files of examples/ are valid, and the commands in them are what their READMEs say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq import options

from tests.helpers import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
DISTRIBUTED = EXAMPLES / "distributed"
CONFIG = DISTRIBUTED / "hydra_submitit" / "config"
SCRIPTS = sorted(p for p in EXAMPLES.rglob("*") if p.suffix in (".sh", ".sbatch"))
WORKFLOWS = sorted(p for p in DISTRIBUTED.iterdir() if p.is_dir())


def name(path):
    return str(path.relative_to(EXAMPLES))


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_shell_syntax(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", str(script)], check=True)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=name)
def test_readme_begins_with_a_command_of_files_that_exist(workflow):
    readme = (workflow / "README.md").read_text()
    heading, command = re.match(r"# (.+)\n\n```bash\n(.+?)```\n", readme, re.S).groups()
    root = EXAMPLES.parent
    files = re.findall(r"examples/\S+", command)
    assert heading and files and all((root / f).exists() for f in files)
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert all((workflow / link).exists() for link in links if "://" not in link)


STUB = '#!/bin/sh\nprintf "%s\\n" "$@" > "$SEEN"\n'


@pytest.mark.parametrize(
    "script, launcher, processes",
    [
        ("one_node/train.sh", "torchrun", 8),
        ("several_nodes/train.sh", "torchrun", 16),
        ("slurm/train.sbatch", "srun", 16),
    ],
)
def test_what_a_script_starts(script, launcher, processes, tmp_path):
    """Its own values reach fairseq-train: the table for RTE, 16 sentences an update in all."""
    (tmp_path / launcher).write_text(STUB)
    (tmp_path / launcher).chmod(0o755)
    (tmp_path / "model.pt").write_text("")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("DATA", "DEVICE", "SAVE_DIR", "BATCH")},
        "PATH": path,
        "SEEN": str(tmp_path / "seen"),
        "CHECKPOINT": str(tmp_path / "model.pt"),
        "USER_DIR": tiny.USER_DIR,
        "RENDEZVOUS": "first:29400",
        "SLURM_JOB_ID": "1",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "8",
    }
    subprocess.run(["bash", str(DISTRIBUTED / script), "--seed", "7"], env=environment, check=True)
    words = (tmp_path / "seen").read_text().splitlines()
    at = next(i for i, word in enumerate(words) if word.endswith("fairseq-train"))
    parsed = options.parse_args_and_arch(options.get_training_parser(), words[at + 1 :])
    assert parsed.batch_size * processes == 16
    assert (parsed.optimizer, parsed.sam_rho, parsed.delta_sam_beta) == ("delta_sam_adam", 0.02, 5)
    assert (parsed.lr, parsed.max_update, parsed.warmup_updates) == ([2e-5], 2036, 122)
    assert (parsed.arch, parsed.fp16, parsed.seed) == ("roberta_large", True, 7)
    if launcher == "srun":
        assert parsed.distributed_world_size == processes


COMPOSE = """
import sys
from fairseq.dataclass.initialize import hydra_init
from hydra import compose, initialize_config_dir
hydra_init("rte")  # with fairseq's own fields: an unknown one is an error
with initialize_config_dir(config_dir=sys.argv[1]):
    cfg = compose("rte", overrides=sys.argv[2:], return_hydra_config=True)
assert cfg.optimizer.delta_sam_beta == 5 and cfg.optimization.max_update == 2036
assert cfg.distributed_training.distributed_world_size == 16
assert cfg.distributed_training.distributed_rank == 3
launcher = cfg.hydra.launcher
assert launcher.get("nodes", 2) * launcher.get("tasks_per_node", 8) == 16
"""
RANK = {
    "torchrun": {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3"},
    "submitit_slurm": {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "16",
        "SLURM_LOCALID": "3",
        "MASTER_ADDR": "first",
        "MASTER_PORT": "29500",
    },
}


@pytest.mark.parametrize("run", RANK)
def test_hydra_files_compose(run):
    pytest.importorskip("hydra", minversion="1.1")
    overrides = [f"+run={run}"]
    if run.startswith("submitit"):
        pytest.importorskip("submitit", reason="needs pip install hydra-submitit-launcher")
        overrides.append(f"hydra/launcher={run}")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPOSE, str(CONFIG), *overrides],
        env={**os.environ, **RANK[run]},
        check=True,
    )
