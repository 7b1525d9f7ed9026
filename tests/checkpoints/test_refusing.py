"""Hostile files are refused and do not run; damaged ones say so."""

import argparse
import io
import os
import pickle

import pytest
import torch
from fairseq import checkpoint_utils
from omegaconf import OmegaConf

from deltasam_fairseq import checkpoints
from tests.checkpoints.saved import ActsInSetState, Payload, checkpoint_load, save


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["alone", "extra_state", "cfg", "args"])
def test_hostile_file_is_refused_and_does_not_run(tmp_path, state, mode, zipped, where):
    payload = Payload(tmp_path / "ran")
    cfg = OmegaConf.create({})
    cfg.__dict__["_content"] = {"x": payload}
    hostile = {
        "alone": payload,
        "extra_state": {**state, "extra_state": {"train_iterator": {"deep": [payload]}}},
        "cfg": {**state, "cfg": cfg},
        "args": {**state, "args": argparse.Namespace(x=payload)},
    }[where]
    path = save(tmp_path / "hostile.pt", hostile, _use_new_zipfile_serialization=zipped)
    with pytest.raises(checkpoints.CheckpointRefusedError) as error:
        checkpoint_utils.load_checkpoint_to_cpu(path)
    assert "hostile.pt" in str(error.value) and f"{os.system.__module__}.system" in str(error.value)
    assert "weights_only" not in str(error.value)  # no advice to switch the protection off
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_bare_pickle_is_refused(tmp_path, mode, protocol):
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol))
    with pytest.raises(
        (checkpoints.CheckpointRefusedError, checkpoints.CheckpointDamagedError), match=r"bare\.pt"
    ):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "bare.pt"))
    assert not (tmp_path / "ran").exists()


GADGETS = {
    "eval": b"c__builtin__\neval\n(X\x01\x00\x00\x001tR.",
    "getattr": b"c__builtin__\ngetattr\n(cargparse\nNamespace\nX\x08\x00\x00\x00__init__tR.",
    "dotted name": b"cargparse\nNamespace.__init__.__globals__\n.",
    "factory": b"ccollections\ndefaultdict\n(cposix\nsystem\ntR.",
    "state of a class": b"cargparse\nNamespace\n(N}X\x04\x00\x00\x00evilK\x01stb.",
    "state of a function": b"c_codecs\nencode\n}X\x04\x00\x00\x00evilK\x01sb.",
    "call of an instance": b"cargparse\nNamespace\n)R)R.",
    "object scalar": b"cnumpy.core.multiarray\nscalar\n("
    b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8tRX\x01\x00\x00\x00xtR.",
    "void scalar": b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8tR.",
    "structured dtype": b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8tR"
    b"(K\x03X\x01\x00\x00\x00<N(X\x01\x00\x00\x00at}K\x08K\x01K\x1ftb.",
}


@pytest.mark.parametrize("name", GADGETS)
def test_no_way_round_through_listed_classes(tmp_path, mode, name):
    with pytest.raises((checkpoints.CheckpointRefusedError, checkpoints.CheckpointDamagedError)):
        checkpoint_load(tmp_path, b"\x80\x02" + GADGETS[name])
    assert not hasattr(argparse.Namespace, "evil")


def test_hostile_setstate_of_a_class_that_is_not_listed(tmp_path, mode):
    """BUILD is refused, not only REDUCE: this class would act in __setstate__."""
    raw = b"\x80\x02c" + ActsInSetState.__module__.encode() + b"\nActsInSetState\n)\x81}b."
    ActsInSetState.ran = False
    with pytest.raises(checkpoints.CheckpointRefusedError, match="ActsInSetState"):
        checkpoint_load(tmp_path, raw)
    assert not ActsInSetState.ran


def test_torchscript_is_refused(tmp_path, mode):
    path = str(tmp_path / "program.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    with pytest.raises(checkpoints.CheckpointRefusedError, match=r"program\.pt"):
        checkpoint_utils.load_checkpoint_to_cpu(path)


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "text", "zeros", "legacy cut"])
def test_damaged_file(tmp_path, state, mode, damage):
    data = io.BytesIO()
    torch.save(state, data, _use_new_zipfile_serialization=damage != "legacy cut")
    raw = data.getvalue()
    path = tmp_path / "damaged.pt"
    path.write_bytes(
        {
            "cut": raw[:-100],
            "half": raw[: len(raw) // 2],
            "empty": b"",
            "text": b"hello, world\n",
            "zeros": bytes(1000),
            "legacy cut": raw[:-100],
        }[damage]
    )
    with pytest.raises(
        (checkpoints.CheckpointDamagedError, checkpoints.CheckpointRefusedError)
    ) as error:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "damaged.pt" in str(error.value)
    if "cut" in damage or damage in ("half", "empty"):
        assert isinstance(error.value, checkpoints.CheckpointDamagedError)
