"""A file to start from that is missing is an error."""

import types

import pytest

from deltasam_fairseq import checkpoints
from deltasam_fairseq.checkpoints import restore_file


def config(save_dir, **changes):
    return types.SimpleNamespace(
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
    checkpoints.require_restore_file(config(tmp_path / "not made yet"))


@pytest.mark.parametrize("option", ["restore_file", "finetune_from_model", "continue_once"])
def test_missing_file_is_an_error(tmp_path, option):
    path = tmp_path / "roberta.pt"
    flag = "--" + option.replace("_", "-")
    for missing in (path, tmp_path, "s3://bucket/roberta.pt"):  # a folder is no checkpoint either
        with pytest.raises(FileNotFoundError, match=f"{flag} {missing}.*leave {flag} out"):
            checkpoints.require_restore_file(config(tmp_path, **{option: str(missing)}))
    path.touch()
    checkpoints.require_restore_file(config(tmp_path, **{option: str(path)}))


def test_suffix_is_that_of_fairseq(tmp_path):
    (tmp_path / "m.pt").touch()
    cfg = config(tmp_path, restore_file=str(tmp_path / "m.pt"), checkpoint_suffix="-shard1")
    with pytest.raises(FileNotFoundError, match=r"looked for .*m-shard1\.pt"):
        checkpoints.require_restore_file(cfg)
    checkpoints.require_restore_file(cfg, suffix="")
    (tmp_path / "m-shard1.pt").touch()
    checkpoints.require_restore_file(cfg)


def test_finetune_is_needed_on_the_first_launch_only(tmp_path):
    cfg = config(tmp_path, finetune_from_model=str(tmp_path / "gone.pt"))
    with pytest.raises(FileNotFoundError, match="--finetune-from-model"):
        checkpoints.require_restore_file(cfg)
    (tmp_path / "checkpoint_last.pt").touch()
    checkpoints.require_restore_file(cfg)


def test_remote_files_are_left_to_path_manager(monkeypatch):
    asked = []
    monkeypatch.setattr(
        restore_file.PathManager, "isfile", staticmethod(lambda p: asked.append(p) or True)
    )
    checkpoints.require_restore_file(config("s3://out", restore_file="s3://bucket/m.pt"))
    assert asked == ["s3://bucket/m.pt"]
