"""Checks of a configuration: the file to start from, and sentences that fairseq drops."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from fairseq.data import data_utils

from deltasam_fairseq import config_checks
from deltasam_fairseq.config_checks import (
    check_restore_file,
    drops_sentences,
    warn_about_dropped_sentences,
)


def checkpoint_config(save_dir, **changes):
    return SimpleNamespace(
        **{
            "save_dir": str(save_dir),
            "restore_file": "checkpoint_last.pt",
            "checkpoint_suffix": "",
            "finetune_from_model": None,
            "continue_once": None,
            **changes,
        }
    )


def test_defaults_require_nothing(tmp_path):
    check_restore_file(checkpoint_config(tmp_path / "not made yet"))


@pytest.mark.parametrize("option", ["restore_file", "finetune_from_model", "continue_once"])
def test_missing_file_is_an_error(tmp_path, option):
    path = tmp_path / "roberta.pt"
    flag = "--" + option.replace("_", "-")
    for missing in (path, tmp_path, "s3://bucket/roberta.pt"):  # a folder is no checkpoint either
        with pytest.raises(FileNotFoundError, match=f"{flag} {missing}.*omit {flag}"):
            check_restore_file(checkpoint_config(tmp_path, **{option: str(missing)}))
    path.touch()
    check_restore_file(checkpoint_config(tmp_path, **{option: str(path)}))


def test_suffix_is_that_of_fairseq(tmp_path):
    (tmp_path / "m.pt").touch()
    cfg = checkpoint_config(
        tmp_path, restore_file=str(tmp_path / "m.pt"), checkpoint_suffix="-shard1"
    )
    with pytest.raises(FileNotFoundError, match=r"looked for .*m-shard1\.pt"):
        check_restore_file(cfg)
    cfg.checkpoint_suffix = ""
    check_restore_file(cfg)
    cfg.checkpoint_suffix = "-shard1"
    (tmp_path / "m-shard1.pt").touch()
    check_restore_file(cfg)


def test_finetune_is_needed_on_the_first_launch_only(tmp_path):
    cfg = checkpoint_config(tmp_path, finetune_from_model=str(tmp_path / "gone.pt"))
    with pytest.raises(FileNotFoundError, match="--finetune-from-model"):
        check_restore_file(cfg)
    (tmp_path / "checkpoint_last.pt").touch()
    check_restore_file(cfg)


def test_remote_files_are_left_to_path_manager(monkeypatch):
    asked = []
    monkeypatch.setattr(
        config_checks.PathManager, "isfile", staticmethod(lambda p: asked.append(p) or True)
    )
    check_restore_file(checkpoint_config("s3://out", restore_file="s3://bucket/m.pt"))
    assert asked == ["s3://bucket/m.pt"]


def config(multiple, task="sentence_prediction"):
    return SimpleNamespace(
        dataset=SimpleNamespace(required_batch_size_multiple=multiple),
        task=SimpleNamespace(_name=task),
    )


@pytest.mark.parametrize("drops", [True, False])
def test_warns_if_a_batch_is_dropped(drops, monkeypatch, caplog):
    def batch_by_size(indices, max_sentences, required_batch_size_multiple, **_):
        batches = np.split(indices, range(max_sentences, len(indices), max_sentences))
        short = len(batches[-1]) % required_batch_size_multiple
        return batches[:-1] if drops and short else batches

    monkeypatch.setattr(data_utils, "batch_by_size", batch_by_size)
    with caplog.at_level(logging.WARNING):
        warn_about_dropped_sentences(config(1))
        warn_about_dropped_sentences(config(8, task="span_prediction"))  # has its own batches
        assert not caplog.records
        warn_about_dropped_sentences(config(8))
    assert ["up to 7 sentences" in record.message for record in caplog.records] == [True] * drops


def test_whether_this_fairseq_drops_sentences():
    """17 sentences in batches of 8."""
    batches = data_utils.batch_by_size(
        np.arange(17),
        num_tokens_fn=lambda _: 1,
        num_tokens_vec=np.ones(17, dtype=np.int64),
        max_sentences=8,
        required_batch_size_multiple=8,
    )
    assert drops_sentences(8) == (sum(map(len, batches)) == 16)
