"""The seam: torch.load is replaced while fairseq reads, in one thread, and comes back."""

import pickle
import threading

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils

from deltasam_fairseq import checkpoints
from deltasam_fairseq.checkpoints import reading
from tests.checkpoints.saved import ActsInSetState, official, save


def test_install_twice_is_harmless():
    names = ["load_checkpoint_to_cpu", "load_ema_from_checkpoint"]
    once = [getattr(checkpoint_utils, n) for n in names] + [
        distributed_utils._broadcast_object_slow
    ]
    checkpoints.install()
    assert once == [getattr(checkpoint_utils, n) for n in names] + [
        distributed_utils._broadcast_object_slow
    ]


def test_torch_load_is_back_even_after_an_error(tmp_path, state):
    before = torch.load
    safe = set(getattr(torch.serialization, "get_safe_globals", list)())  # torch keeps a set
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(checkpoints.CheckpointDamagedError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "empty.pt"))
    with pytest.raises(FileNotFoundError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "missing.pt"))
    checkpoint_utils.load_checkpoint_to_cpu(save(tmp_path / "good.pt", state))
    assert torch.load is before
    assert set(getattr(torch.serialization, "get_safe_globals", list)()) == safe


def test_nested_readers_and_other_threads(tmp_path):
    """The innermost reader counts, each comes back in turn, other threads are left alone."""
    path = save(tmp_path / "slow.pt", ActsInSetState())
    before = torch.load
    seen = []
    with reading.torch_load_as(reading.read_safely):
        outer = torch.load
        with reading.torch_load_as(reading.read_from_peer):
            assert isinstance(torch.load(path), ActsInSetState)
            with reading.torch_load_as(reading.read_safely), pytest.raises(pickle.UnpicklingError):
                torch.load(path, weights_only=False)
        assert torch.load is outer
        thread = threading.Thread(target=lambda: seen.append(torch.load(path, weights_only=False)))
        thread.start()
        thread.join()
    assert torch.load is before
    assert isinstance(seen[0], ActsInSetState)


def test_rank_0_hands_a_checkpoint_on(tmp_path, state, monkeypatch):
    """Two ranks: what rank 0 has read (a typed DictConfig among it) arrives on rank 1."""
    loaded = checkpoint_utils.load_checkpoint_to_cpu(save(tmp_path / "model.pt", official(state)))
    message = {
        "cfg": loaded["cfg"],
        "args": loaded["args"],
        "p": distributed_utils._TensorPlaceholder(3),
    }
    sent = []
    cpu = torch.device("cpu")
    monkeypatch.setattr(distributed_utils, "get_rank", lambda group: 0)
    monkeypatch.setattr(
        distributed_utils, "broadcast", lambda tensor, src, group: sent.append(tensor.clone())
    )
    distributed_utils._broadcast_object_slow(message, 0, None, cpu)
    monkeypatch.setattr(distributed_utils, "get_rank", lambda group: 1)
    monkeypatch.setattr(
        distributed_utils, "broadcast", lambda tensor, src, group: tensor.copy_(sent.pop(0))
    )
    received = distributed_utils._broadcast_object_slow(None, 0, None, cpu)
    assert str(received["cfg"]) == str(message["cfg"])  # == fails on a Namespace in omegaconf 2.0
    assert (received["args"], received["p"]) == (message["args"], message["p"])
