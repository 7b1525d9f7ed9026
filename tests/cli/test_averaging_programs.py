"""Weight averaging through fairseq's programs: hydra, validate, generate, the hub; its errors."""

import json
import re
import sys

import fairseq
import fairseq_cli.train
import pytest
import torch
from fairseq.models.roberta import RobertaModel

from deltasam_fairseq.trainer.checkpoint_state import WEIGHT_AVERAGE
from tests.cli.test_errors import error_of
from tests.helpers import runs, tiny

YAML = """\
# @package _global_
common: {{cpu: true, user_dir: {user_dir}, log_format: json, log_interval: 1, seed: 3}}
checkpoint: {{save_dir: {save_dir}, no_epoch_checkpoints: true}}
task: {{_name: sentence_prediction, data: {data}, num_classes: 2, init_token: 0}}
dataset: {{batch_size: 8, num_workers: 0}}
criterion: sentence_prediction
optimization: {{max_update: 6, lr: [0.001]}}
lr_scheduler: {{_name: swa_polynomial_decay, total_num_update: 6, {swa}}}
optimizer: {{_name: delta_sam_adam}}
model: {{_name: roberta, encoder_layers: 1, encoder_embed_dim: 16, encoder_ffn_embed_dim: 32,
         encoder_attention_heads: 2, max_positions: 64}}
"""


@pytest.mark.parametrize(
    "swa, n",
    [("swa_start: 3, swa_every: 1", 4), ("swa_start: 0.5, swa_lr: 1e-4, swa_anneal: 2", 4)],
)
def test_hydra(classification, tmp_path, swa, n):
    values = {"user_dir": tiny.USER_DIR, "save_dir": tmp_path / "out", "data": classification}
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "run.yaml").write_text(YAML.format(swa=swa, **values))
    program = [sys.executable, "-m", "fairseq_cli.hydra_train"]
    argv = ["--config-dir", tmp_path / "config", "--config-name", "run"]
    output = tiny.train(argv, program=program, cwd=tmp_path).stdout
    last = runs.load(tmp_path / "out" / "checkpoint_last.pt")
    assert last["extra_state"][WEIGHT_AVERAGE]["n"] == n, output
    logs = list(tmp_path.glob("outputs/**/*.log"))
    text = output + "".join(log.read_text() for log in logs)
    assert f'"valid_swa_n": "{n}"' in text and "averaging of weights begins: update 3" in text


@pytest.fixture(scope="module")
def averaged(classification, tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    options = ["--lr-scheduler", "swa_fixed", "--swa-start", "1", "--lr", "3e-2"]
    run = runs.train(classification, folder, *options, validate=True)
    (valid,) = [json.loads(m) for m in run.messages if '"valid_swa_n": "6"' in m]
    return folder / "checkpoint_last.pt", valid


def test_fairseq_validate_finds_what_training_logged(classification, averaged):
    path, valid = averaged
    argv = [classification, "--path", path, "--valid-subset", "valid", "--batch-size", "8"]
    argv += ["--task", "sentence_prediction", "--criterion", "sentence_prediction"]
    argv += ["--user-dir", tiny.USER_DIR, "--cpu"]
    argv += ["--num-workers", "0", "--log-format", "json"]
    output = tiny.train(argv, program=[sys.executable, "-m", "fairseq_cli.validate"]).stdout
    assert re.search(r'"valid_loss": "([^"]+)"', output).group(1) == valid["valid_loss"], output


def test_from_pretrained(classification, averaged):
    path, _ = averaged
    hub = RobertaModel.from_pretrained(
        str(path.parent), path.name, str(classification), bpe=None, user_dir=tiny.USER_DIR
    )
    averages = runs.load(path)["extra_state"][WEIGHT_AVERAGE]["averages"]
    for name, p in tiny.without_fused(dict(hub.model.named_parameters())).items():
        assert torch.equal(p, averages[f"model.{name}"])


@pytest.mark.skipif(
    fairseq.__version__.startswith("0.12.2") and int(torch.__version__.split(".")[0]) >= 2,
    reason="the fused encoder of fairseq 0.12.2 does not run on torch 2",
)
def test_fairseq_generate(translation, tmp_path):
    options = ["--lr-scheduler", "swa_inverse_sqrt", "--swa-start", "2", "--swa-decay", "0.9"]
    runs.train(translation, tmp_path, *options, criterion="label_smoothed_cross_entropy")
    argv = [translation, "--path", tmp_path / "checkpoint_last.pt", "--gen-subset", "valid"]
    argv += ["--task", "translation", "-s", "aa", "-t", "bb", "--batch-size", "8", "--cpu"]
    argv += ["--beam", "2", "--max-len-b", "10", "--num-workers", "0"]
    argv += ["--user-dir", tiny.USER_DIR]
    output = tiny.train(argv, program=[sys.executable, "-m", "fairseq_cli.generate"]).stdout
    assert output.count("\nH-") + output.startswith("H-") == 16, output


SWA = ["--lr-scheduler", "swa_fixed"]
# options; what the message must name
ERRORS = {
    "every": ([*SWA, "--swa-every", "0"], ["--swa-every 0", "at least 1"]),
    "rate": ([*SWA, "--swa-lr", "-1"], ["--swa-lr -1.0", "above 0"]),
    "decay": ([*SWA, "--swa-decay", "1.5"], ["--swa-decay 1.5", "0.999"]),
    "start": ([*SWA, "--swa-start", "7"], ["--swa-start 7", "--max-update 6"]),
    "no length": (
        [*SWA, "--max-update", "0", "--max-epoch", "0"],
        ["--swa-start 0.5", "--max-update", "--max-epoch"],
    ),
    "strategy": ([*SWA, "--swa-anneal-strategy", "step"], ["--swa-anneal-strategy", "linear"]),
    "without the schedule": (
        ["--lr-scheduler", "fixed", "--swa-start", "3"],
        ["--swa-start", "--lr-scheduler swa_*"],
    ),
    "bmuf": ([*SWA, "--use-bmuf"], ["--use-bmuf", "--lr-scheduler swa_fixed"]),
    "quantization": (
        [*SWA, "--quantization-config-path", "pq.yaml"],
        ["--quantization-config-path", "--lr-scheduler swa_fixed", "average would be lost"],
    ),
    "fully sharded": (
        [*SWA, "--ddp-backend", "fully_sharded"],
        ["--ddp-backend fully_sharded", "--lr-scheduler swa_fixed", "legacy_ddp"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_option(tmp_path, monkeypatch, capfd, name):
    def fail(*_, **__):
        raise AssertionError("fairseq went on to train")

    monkeypatch.setattr(fairseq_cli.train.tasks, "setup_task", fail)
    options, expected = ERRORS[name]
    message = error_of(tiny.arguments(tmp_path, tmp_path, *options), monkeypatch, capfd)
    assert all(part in message for part in expected), message
