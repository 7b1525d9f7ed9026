"""Checkpoints of every style, and what hostile ones hold."""

import argparse
import contextlib
import os
import pickle
import sys

import torch
from omegaconf import OmegaConf

from deltasam_fairseq.checkpoints import reading


@contextlib.contextmanager
def argv(*args):
    before, sys.argv = sys.argv, ["fairseq", *map(str, args)]
    try:
        yield
    finally:
        sys.argv = before


TRAIN = (
    "--task sentence_prediction --num-classes 2 --arch roberta --encoder-layers 1 "
    "--encoder-embed-dim 8 --encoder-ffn-embed-dim 8 --encoder-attention-heads 2 "
    "--max-positions 32 --init-token 0 --separator-token 2 --criterion sentence_prediction "
    "--optimizer adam --lr 1e-3 --batch-size 4 --best-checkpoint-metric accuracy "
    "--maximize-best-checkpoint-metric --num-workers 0 --cpu --lr-scheduler polynomial_decay "
    "--total-num-update 8 --no-progress-bar"
).split()


def official(state):
    """As in the published archives: args is a Namespace, cfg is not there yet."""
    cfg = state["cfg"]
    args = argparse.Namespace(**vars(cfg["model"]))
    args.arch, args.optimizer = "roberta", "adam"
    args.task = args.criterion = "sentence_prediction"
    return {**state, "args": args, "cfg": None}


def hydra(state):
    """As fairseq 0.10 wrote them from hydra: cfg is a DictConfig."""
    cfg = dict(state["cfg"])
    cfg["model"] = {
        k: v
        for k, v in vars(cfg["model"]).items()
        if isinstance(v, (int, float, str, list, type(None)))
    }
    cfg["model"]["_name"] = "roberta"
    return {**state, "cfg": OmegaConf.create(cfg)}


def save(path, obj, **kwargs):
    torch.save(obj, str(path), **kwargs)
    return str(path)


def checkpoint_load(tmp_path, raw):
    """Read a bare pickle as the data of a legacy torch file."""
    head = b"".join(
        pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    (tmp_path / "legacy.pt").write_bytes(head + raw + pickle.dumps([], 2))
    with reading.torch_load_as(reading.read_safely), open(tmp_path / "legacy.pt", "rb") as f:
        return torch.load(f)


class Payload:
    """Creates the marker file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class ActsInSetState:
    ran = False

    def __setstate__(self, state):
        type(self).ran = True
