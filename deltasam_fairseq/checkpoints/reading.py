"""``torch.load``, replaced while fairseq reads."""

import contextlib
import errno
import pickle
import re
import threading
from typing import Any, Callable, Iterator, List

import torch

from deltasam_fairseq.checkpoints.allow_list import allowed_globals, torch_safe_globals
from deltasam_fairseq.checkpoints.errors import damaged, refused
from deltasam_fairseq.checkpoints.unpickler import refuse_torchscript, restricted_pickle
from deltasam_fairseq.fairseq_patches.patching import replaced

# reader(torch.load, *what torch.load was called with)
Reader = Callable[..., Any]

_version = re.match(r"(\d+)\.(\d+)", torch.__version__)
# Whether torch's own weights_only unpickler takes a list, with aliases.
HAS_SAFE_GLOBALS = _version is not None and tuple(map(int, _version.groups())) >= (2, 6)


def read_from_peer(load: Callable[..., Any], f: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.load`` for what rank 0 of the same run has sent, not for files."""
    kwargs["weights_only"] = False
    return load(f, *args, **kwargs)


def read_safely(load: Callable[..., Any], f: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.load`` with the allow-list, whatever the caller says of weights_only.

    Raises:
        CheckpointRefusedError: the file wants a global that is not allowed.
        CheckpointDamagedError: the file cannot be read at all.
    """
    kwargs.setdefault("map_location", args[0] if args else None)
    kwargs.pop("pickle_module", None)
    kwargs.pop("weights_only", None)
    name = str(getattr(f, "name", f if isinstance(f, str) else None) or "the checkpoint")
    try:
        return _read(load, f, **kwargs)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise damaged(name, error) from error
        raise refused(name, str(error)) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the disk's fault; EINVAL is a seek before the start of a short file
        if "TorchScript" in str(error):
            raise refused(name, "it is a TorchScript program") from error
        raise damaged(name, error) from error


def _read(load: Callable[..., Any], f: Any, **kwargs: Any) -> Any:
    """With torch's own weights_only unpickler, or before 2.6 with ours."""
    if HAS_SAFE_GLOBALS:
        with _allow_list_lent_to_torch():
            return load(f, weights_only=True, **kwargs)
    refuse_torchscript(f)
    return load(f, weights_only=False, pickle_module=restricted_pickle, **kwargs)


@contextlib.contextmanager
def _allow_list_lent_to_torch() -> Iterator[None]:
    """Lend the allow-list to torch, and take back exactly what was lent.

    A name that is there already (the user's, or an outer call's) stays as it is.
    """
    present = torch_safe_globals()
    lent: List[Any] = [(v, name) for name, v in allowed_globals().items() if name not in present]
    with torch.serialization.safe_globals(lent):
        yield


class _Load:
    """Stands for ``torch.load``: a reader in the thread that made it, the original in others."""

    def __init__(self, original: Callable[..., Any], reader: Reader) -> None:
        if isinstance(original, _Load):  # nested
            original = original.original
        self.original: Callable[..., Any] = original
        self.reader = reader
        self.owner = threading.get_ident()

    def __call__(self, f: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.owner:
            return self.original(f, *args, **kwargs)
        return self.reader(self.original, f, *args, **kwargs)


_lock = threading.RLock()


@contextlib.contextmanager
def torch_load_as(reader: Reader) -> Iterator[None]:
    """Replace ``torch.load`` in this thread; nested or failing, it comes back."""
    with _lock, replaced(torch, "load", _Load(torch.load, reader)):
        yield
