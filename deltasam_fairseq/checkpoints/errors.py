"""The two ways in which a checkpoint cannot be read, and what to do about each."""

import pickle
import re

import torch

from deltasam_fairseq.checkpoints.allow_list import BLOCKED_MODULES


class CheckpointRefusedError(pickle.UnpicklingError):
    """The file asks for something that is not on the allow-list; nothing of it was run."""


class CheckpointDamagedError(RuntimeError):
    """The file is cut short, corrupt, or no checkpoint at all."""


def damaged(name: str, error: Exception) -> CheckpointDamagedError:
    """The error for a file that cannot be read."""
    reason = str(error).strip().splitlines() or [""]
    return CheckpointDamagedError(
        f"{name} could not be read as a checkpoint ({type(error).__name__}: {reason[0]}). It is "
        f"cut short, corrupt, or no torch file: copy it again, or take an earlier checkpoint."
    )


def refused(name: str, reason: str) -> CheckpointRefusedError:
    """The error for a file that wanted what it may not have; reason is in torch's words."""
    wanted = re.search(r"GLOBAL (\S+)", reason)
    if wanted is None:
        return CheckpointRefusedError(
            f"{name} was not loaded: no checkpoint of fairseq looks like this, and nothing of it "
            f"was run. It may be damaged, hostile, or written with another pickle protocol than "
            f"torch.save's own (2). {_last_line(reason)}"
        )
    full_name = wanted.group(1)
    if "." not in full_name:  # torch omits builtins
        full_name = f"builtins.{full_name}"
    return CheckpointRefusedError(
        f"{name} was not loaded: it asks for {full_name}, which is not among the classes that "
        f"fairseq checkpoints hold, and could run code of whoever wrote the file. Nothing of it "
        f"was run. {_advice(full_name)}"
    )


def _advice(full_name: str) -> str:
    """How to allow a global, unless nobody should."""
    if full_name.rpartition(".")[0] in BLOCKED_MODULES:
        return "No checkpoint needs this: treat the file as hostile."
    also = ""
    if hasattr(torch.serialization, "add_safe_globals"):
        also = f" or torch.serialization.add_safe_globals([{full_name}])"
    return (
        "If you trust both the file and this class, call "
        f'deltasam_fairseq.checkpoints.allow("{full_name}"){also} before loading.'
    )


def _last_line(reason: str) -> str:
    """torch's own words without its advice to load without protection."""
    text = reason.split("WeightsUnpickler error:")[-1].split("\n\nCheck the documentation")[0]
    lines = [line for line in text.strip().splitlines() if line]
    return f"(torch: {lines[-1]})" if lines else ""
