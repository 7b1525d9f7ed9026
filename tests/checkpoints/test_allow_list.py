"""The allow-list: no way to run code, and what a user adds to it."""

import argparse

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from omegaconf import DictConfig

from deltasam_fairseq import checkpoints
from deltasam_fairseq.checkpoints import allow_list, numpy_scalars
from tests.checkpoints.saved import ActsInSetState, save


def test_allow_list_has_no_way_to_run_code():
    """Every entry is a class that stores what it is given, or ours."""
    table = checkpoints.allowed_globals()
    assert {
        "argparse.Namespace",
        "omegaconf.dictconfig.DictConfig",
        "fairseq.meters.AverageMeter",
    } <= set(table)
    for name, found in table.items():
        module = name.rpartition(".")[0]
        assert module not in allow_list.BLOCKED_MODULES
        assert isinstance(found, type) or name == "typing.Any" or found is numpy_scalars.scalar
    assert np.dtype not in table.values()


@pytest.mark.parametrize("name", ["Namespace", "os.system", "posix.system", "sys.exit"])
def test_allow_rejects(name):
    with pytest.raises(ValueError, match="allow"):
        checkpoints.allow(name)


def test_message_names_the_remedy_and_the_remedy_works(tmp_path, state, mode, monkeypatch):
    monkeypatch.setattr(allow_list, "_allowed_by_user", {})
    path = save(tmp_path / "extra.pt", {**state, "mine": ActsInSetState()})
    name = f"{ActsInSetState.__module__}.ActsInSetState"
    with pytest.raises(checkpoints.CheckpointRefusedError) as error:
        checkpoint_utils.load_checkpoint_to_cpu(path)
    assert f'checkpoints.allow("{name}")' in str(error.value)
    assert (f"add_safe_globals([{name}])" in str(error.value)) == hasattr(
        torch.serialization, "add_safe_globals"
    )
    checkpoints.allow(name)
    assert isinstance(checkpoint_utils.load_checkpoint_to_cpu(path)["mine"], ActsInSetState)


@pytest.mark.skipif(not hasattr(torch.serialization, "add_safe_globals"), reason="torch < 2.4")
def test_torchs_own_list_is_honoured_and_left_as_it_was(tmp_path, state, mode):
    path = save(tmp_path / "extra.pt", {**state, "mine": ActsInSetState()})
    before = list(torch.serialization.get_safe_globals())
    mine = {ActsInSetState, argparse.Namespace}
    if mode == "torch":  # under the very name that the plugin lends
        mine.add((DictConfig, "omegaconf.dictconfig.DictConfig"))
    torch.serialization.add_safe_globals(list(mine))
    try:
        checkpoint_utils.load_checkpoint_to_cpu(path)
        now = torch.serialization.get_safe_globals()
        assert set(now) == {*before, *mine}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
