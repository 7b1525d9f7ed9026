"""Install the readers and :func:`literal_eval` in fairseq."""

import contextlib
import re
import sys
from typing import Any

from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils

from deltasam_fairseq.checkpoints.literal import literal_eval
from deltasam_fairseq.checkpoints.reading import read_from_peer, read_safely, torch_load_as
from deltasam_fairseq.fairseq_patches.patching import patch


def _read_safely(load: Any, *args: Any, **kwargs: Any) -> Any:
    with torch_load_as(read_safely):
        return load(*args, **kwargs)


def _read_from_peer(broadcast: Any, *args: Any, **kwargs: Any) -> Any:
    with torch_load_as(read_from_peer):
        return broadcast(*args, **kwargs)


def install() -> None:
    """Make fairseq read checkpoints safely, in training, validation and the hub.

    Idempotent. Patches ``load_checkpoint_to_cpu`` and ``load_ema_from_checkpoint``, through
    which fairseq reads every checkpoint; ``_broadcast_object_slow``, with which rank 0 hands
    it to the other ranks (a peer, not a file: read as before torch 2.6); and gives those of
    fairseq's modules that call ``eval`` :func:`literal_eval` for it.

    Under data parallelism: on every rank, before the first checkpoint is read.
    """
    patch(checkpoint_utils, "load_checkpoint_to_cpu", _read_safely)
    if hasattr(checkpoint_utils, "load_ema_from_checkpoint"):  # fairseq 0.12.2 has none
        patch(checkpoint_utils, "load_ema_from_checkpoint", _read_safely)
    patch(distributed_utils, "_broadcast_object_slow", _read_from_peer)
    for name, module in list(sys.modules.items()):
        if name.startswith("fairseq.") and _calls_eval(module):
            vars(module).setdefault("eval", literal_eval)


def _calls_eval(module: Any) -> bool:
    """Whether the source of a module has the builtin ``eval(`` in it."""
    path = getattr(module, "__file__", None) or ""
    if not path.endswith(".py"):
        return False
    with contextlib.suppress(OSError):
        with open(path, encoding="utf-8") as source:
            return re.search(r"(?<![\w.])eval\(", source.read()) is not None
    return True
