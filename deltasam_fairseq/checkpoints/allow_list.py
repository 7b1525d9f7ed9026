"""The classes that a checkpoint may hold: fairseq's own, and what the user allows."""

import importlib
from typing import Any, Dict, List

import torch

from deltasam_fairseq.checkpoints.numpy_scalars import ScalarType, scalar

# The name in the file -> the object, or the name to resolve here. Classes only, and none
# of them does more with what a file gives it than to store it.
_ALLOWED: Dict[str, Any] = {
    name: name
    for name in (
        "argparse.Namespace",  # args, and models that are configured by argparse
        "builtins.dict",  # types in the metadata of omegaconf, from here ...
        "builtins.int",
        "builtins.list",
        "typing.Any",
        "collections.defaultdict",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.nodes.AnyNode",  # ... to here
        "fairseq.logging.meters.AverageMeter",  # metrics, pickled whole by old versions
        "fairseq.logging.meters.StopwatchMeter",
        "fairseq.logging.meters.TimeMeter",
    )
}
_ALLOWED.update(
    {
        f"fairseq.meters.{name}": f"fairseq.logging.meters.{name}"
        for name in ("AverageMeter", "StopwatchMeter", "TimeMeter")
    }
)
_ALLOWED.update(
    {
        "numpy.dtype": ScalarType,
        "numpy.core.multiarray.scalar": scalar,  # numpy 1
        "numpy._core.multiarray.scalar": scalar,  # numpy 2
    }
)

# Never to be allowed, not even by name: what torch blocks too.
BLOCKED_MODULES = ("nt", "os", "posix", "sys")

_allowed_by_user: Dict[str, Any] = {}


def _full_name(item: Any) -> str:
    return f"{item.__module__}.{item.__qualname__}"


def allow(*classes: Any) -> None:
    """Let checkpoints hold further classes, for the rest of this process.

    Args:
        classes: classes or functions, or their full names ("package.module.Class").
            A name is imported only when a checkpoint is read. Allow only what does
            nothing harmful with arguments that the author of a file has chosen.

    Raises:
        ValueError: no full name, or a module (os, sys) that is never allowed.

    Under data parallelism: call it on every rank. Limiting case: without a call the
    list is what fairseq itself writes.
    """
    for item in classes:
        name = item if isinstance(item, str) else _full_name(item)
        module = name.rpartition(".")[0]
        if not module:
            raise ValueError(f'allow({name!r}): give the full name, as in "package.module.Class"')
        if module in BLOCKED_MODULES:
            raise ValueError(
                f"allow({name!r}): nothing in {', '.join(BLOCKED_MODULES)} can be allowed"
            )
        _allowed_by_user[name] = item


def _resolve(name: str) -> Any:
    """The object with a full name, or None where this version does not have it."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
            return found
        except (ImportError, AttributeError):
            continue
    return None


def allowed_globals() -> Dict[str, Any]:
    """What checkpoints may hold beside tensors and plain containers.

    Returns:
        From the full name in the file to the object that it stands for: the classes
        of fairseq checkpoints, then those of :func:`allow`, which win. A class that the
        installed versions do not have is dropped.
    """
    table = {
        name: _resolve(item) if isinstance(item, str) else item
        for name, item in {**_ALLOWED, **_allowed_by_user}.items()
    }
    return {name: found for name, found in table.items() if found is not None}


def torch_safe_globals() -> Dict[str, Any]:
    """What was given to ``torch.serialization.add_safe_globals``, by full name."""
    entries: List[Any] = getattr(torch.serialization, "get_safe_globals", list)()
    # torch takes an object, or from 2.6 an object with the name that files have for it.
    pairs = (e if isinstance(e, tuple) else (e, _full_name(e)) for e in entries)
    return {name: found for found, name in pairs}
