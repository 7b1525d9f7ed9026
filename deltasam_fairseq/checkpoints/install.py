"""Where the readers and :func:`literal_eval` go into fairseq."""

import contextlib
import functools
import re
import sys
from typing import Any

from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils

from deltasam_fairseq.checkpoints.literal import literal_eval
from deltasam_fairseq.checkpoints.reading import Reader, read_from_peer, read_safely, torch_load_as
from deltasam_fairseq.fairseq_patches import fused_layers, linear_heads, spectral_norm


def install() -> None:
    """Make fairseq read checkpoints safely, in training, validation and the hub.

    Idempotent. Rebinds ``load_checkpoint_to_cpu`` and ``load_ema_from_checkpoint``, through
    which fairseq reads every checkpoint; ``_broadcast_object_slow``, with which rank 0 hands
    it to the other ranks (a peer, not a file: read as before torch 2.6); and gives those of
    fairseq's modules that call ``eval`` :func:`literal_eval` for it. Spectrally normalised
    classification heads (R4F), and heads of span prediction, are read as they were written, and
    fairseq 0.12's fused layers do not evaluate on what was read.

    Under data parallelism: on every rank, before the first checkpoint is read.
    """
    _rebind(checkpoint_utils, "load_checkpoint_to_cpu", read_safely)
    _rebind(checkpoint_utils, "load_ema_from_checkpoint", read_safely)
    _rebind(distributed_utils, "_broadcast_object_slow", read_from_peer)
    for name, module in list(sys.modules.items()):
        if name.startswith("fairseq.") and _calls_eval(module):
            vars(module).setdefault("eval", literal_eval)
    spectral_norm.install()
    linear_heads.install()
    fused_layers.install()


def _rebind(module: Any, name: str, reader: Reader) -> None:
    """Let a function of fairseq, where this version has it, read through a reader."""
    original = getattr(module, name, None)
    if original is None or hasattr(original, "_deltasam_reader"):
        return

    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with torch_load_as(reader):
            return original(*args, **kwargs)

    guarded._deltasam_reader = reader  # type: ignore[attr-defined]
    setattr(module, name, guarded)


def _calls_eval(module: Any) -> bool:
    """Whether the source of a module has the builtin ``eval(`` in it."""
    path = getattr(module, "__file__", None) or ""
    if not path.endswith(".py"):
        return False
    with contextlib.suppress(OSError):
        with open(path, encoding="utf-8") as source:
            return re.search(r"(?<![\w.])eval\(", source.read()) is not None
    return True
