"""Checkpoints that load on every torch, and that cannot run code.

fairseq reads checkpoints with a bare ``torch.load``. Up to torch 2.5 this runs
whatever the file asks for; from torch 2.6 it refuses fairseq's own files. Here
``torch.load`` is replaced, only while fairseq reads a checkpoint, by a reader with
``weights_only=True`` and a list of the classes that fairseq checkpoints really hold.

    import deltasam_fairseq.checkpoints as checkpoints
    checkpoints.install()                  # done by importing the plugin
    checkpoints.allow("my_task.MyState")   # a class of your own in extra_state

Nothing of fairseq is copied or changed on disk. docs/checkpoints.md says what was
measured, and why no class on the list is a way in.
"""

import ast
import builtins
import codecs
import contextlib
import errno
import functools
import importlib
import io
import pickle
import re
import sys
import threading
import types
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager

__all__ = [
    "CheckpointDamagedError",
    "CheckpointRefusedError",
    "RestrictedUnpickler",
    "allow",
    "allowed_globals",
    "install",
    "literal_eval",
    "require_restore_file",
    "restricted_pickle",
]


class CheckpointRefusedError(pickle.UnpicklingError):
    """The file asks for something that is not on the allow-list; nothing of it was run."""


class CheckpointDamagedError(RuntimeError):
    """The file is cut short, corrupt, or no checkpoint at all."""


# --- The allow-list -----------------------------------------------------------------

# The name in the file -> the name to resolve here. Classes only, and none of them
# does more with what a file gives it than to store it.
_ALLOWED: Dict[str, str] = {
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
# numpy's own unpickling is C code that trusts its input; a scalar needs little of it.
_ALLOWED.update(
    {
        "numpy.dtype": f"{__name__}._ScalarType",
        "numpy.core.multiarray.scalar": f"{__name__}._scalar",  # numpy 1
        "numpy._core.multiarray.scalar": f"{__name__}._scalar",  # numpy 2
    }
)

# Never to be allowed, not even by name: what torch blocks too.
_BLOCKED_MODULES = ("nt", "os", "posix", "sys")

_allowed_by_user: Dict[str, Any] = {}


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
        name = item if isinstance(item, str) else f"{item.__module__}.{item.__qualname__}"
        module = name.rpartition(".")[0]
        if not module:
            raise ValueError(f'allow({name!r}): give the full name, as in "package.module.Class"')
        if module in _BLOCKED_MODULES:
            raise ValueError(f"allow({name!r}): nothing in {', '.join(_BLOCKED_MODULES)} can be allowed")
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
        installed versions do not have is left out.
    """
    # Resolved here and not on import: this module's own classes are among them.
    table = {name: _resolve(target) for name, target in _ALLOWED.items()}
    for name, item in _allowed_by_user.items():
        table[name] = _resolve(item) if isinstance(item, str) else item
    return {name: found for name, found in table.items() if found is not None}


class _ScalarType:
    """Stands for ``numpy.dtype`` while a file is read: plain numbers only.

    ``numpy.dtype.__setstate__`` takes field offsets and object flags on trust, and
    with them ``scalar`` reads bytes as pointers. This takes a code such as "f8".
    """

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufc](1|2|4|8|16|32)", code):
            raise pickle.UnpicklingError(f"only plain numpy numbers can be loaded, not dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
        order, subtype, names, fields = state[1:5]
        if order not in ("<", ">", "=", "|") or (subtype, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("only plain numpy numbers can be loaded, not structured ones")
        self.dtype = self.dtype.newbyteorder(order)


def _scalar(kind: Any, data: bytes) -> Any:
    """One numpy number from its bytes, in place of ``numpy.core.multiarray.scalar``."""
    dtype = kind.dtype if isinstance(kind, _ScalarType) else kind
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biufc" or len(data) != dtype.itemsize:
        raise pickle.UnpicklingError("only plain numpy numbers can be loaded")
    return np.frombuffer(data, dtype=dtype)[0]


# --- Reading with torch >= 2.6: torch's own weights_only unpickler --------------------

_version = re.match(r"(\d+)\.(\d+)", torch.__version__)
# Before 2.6 it takes no aliases (numpy 1 and 2, fairseq.meters), and before 2.4 no list.
_HAS_SAFE_GLOBALS = _version is not None and tuple(map(int, _version.groups())) >= (2, 6)


def _full_name(entry: Any) -> str:
    """The name under which torch finds an entry of its list of safe globals."""
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def _user_safe_globals() -> Dict[str, Any]:
    """What was given to ``torch.serialization.add_safe_globals``, by full name."""
    get = getattr(torch.serialization, "get_safe_globals", list)
    return {_full_name(e): e[0] if isinstance(e, tuple) else e for e in get()}


@contextlib.contextmanager
def _safe_globals() -> Iterator[None]:
    """Lend the allow-list to torch, and take back exactly what was lent.

    A name that is there already (the user's, or an outer call's) stays as it is.
    """
    present = _user_safe_globals()
    lent: List[Any] = [(v, name) for name, v in allowed_globals().items() if name not in present]
    with torch.serialization.safe_globals(lent):
        yield


# --- Reading with torch < 2.6: a restricted pickle module ----------------------------

_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class RestrictedUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """An unpickler that reaches only the allow-list and what tensors need.

    What it guards are the four ways in which a pickle acts: to look up a global, to
    call (REDUCE, INST, OBJ), to create (NEWOBJ) and to set state (BUILD). The last
    three take nothing but listed objects, so attributes of a class cannot be set.

    Args:
        file: a binary file that is open for reading.
        kwargs: as for ``pickle.Unpickler``.

    Raises:
        pickle.UnpicklingError: the pickle wants anything else; it names what.
    """

    dispatch = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: Any, **kwargs: Any) -> None:
        super().__init__(file, **kwargs)
        self._globals: Dict[str, Any] = {
            **torch._weights_only_unpickler._get_allowed_globals(),
            "_codecs.encode": codecs.encode,  # bytes in protocol 2; torch lists it since 2.4
            "builtins.set": set,
            **allowed_globals(),
            **_user_safe_globals(),
        }
        self._trusted = {id(found) for found in self._globals.values()}

    def find_class(self, module: str, name: str) -> Any:
        """The listed object of this name; nothing is imported, no attribute is followed."""
        import _compat_pickle  # protocol 2 writes the names of Python 2

        if self.proto < 3:
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[(module, name)]
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full_name = f"{module}.{name}"
        if module in _BLOCKED_MODULES or full_name not in self._globals:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {full_name} was not allowed")
        return self._globals[full_name]

    def _require(self, found: Any, action: str) -> None:
        if id(found) not in self._trusted:
            raise pickle.UnpicklingError(f"may not {action} {found!r}")

    def _instantiate(self, klass: Any, args: Any) -> None:
        self._require(klass, "create")
        super()._instantiate(klass, args)

    def _reduce(self) -> None:
        self._require(self.stack[-2], "call")
        self.load_reduce()

    def _newobj(self) -> None:
        self._require(self.stack[-2], "create")
        self.load_newobj()

    def _newobj_ex(self) -> None:
        self._require(self.stack[-3], "create")
        self.load_newobj_ex()

    def _build(self) -> None:
        self._require(type(self.stack[-2]), "set the state of")
        self.load_build()

    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.NEWOBJ[0]] = _newobj
    dispatch[pickle.NEWOBJ_EX[0]] = _newobj_ex
    dispatch[pickle.BUILD[0]] = _build


def _restricted_load(file: Any, **kwargs: Any) -> Any:
    """As ``pickle.load``, through :class:`RestrictedUnpickler`."""
    return RestrictedUnpickler(file, **kwargs).load()


def _restricted_loads(data: bytes, **kwargs: Any) -> Any:
    """As ``pickle.loads``, through :class:`RestrictedUnpickler`."""
    return RestrictedUnpickler(io.BytesIO(data), **kwargs).load()


# What torch.load wants of its pickle_module.
restricted_pickle: Any = types.ModuleType("restricted_pickle")
restricted_pickle.Unpickler = RestrictedUnpickler
restricted_pickle.UnpicklingError = pickle.UnpicklingError
restricted_pickle.load = _restricted_load
restricted_pickle.loads = _restricted_loads


def _refuse_torchscript(f: Any) -> None:
    """Stop before torch < 2.6 hands a TorchScript archive to its interpreter."""
    with torch.serialization._open_file_like(f, "rb") as opened:
        start = opened.tell()
        try:
            if torch.serialization._is_zipfile(opened):
                with torch.serialization._open_zipfile_reader(opened) as archive:
                    if torch.serialization._is_torchscript_zip(archive):
                        raise pickle.UnpicklingError("it is a TorchScript program")
        finally:
            opened.seek(start)


# --- torch.load, replaced while fairseq reads -----------------------------------------


def _refusal(name: str, reason: str) -> str:
    """The message for a file that wanted what it may not have."""
    wanted = re.search(r"GLOBAL (\S+)", reason)
    if wanted is None:
        return (
            f"{name} was not loaded: no checkpoint of fairseq looks like this, and nothing of it "
            f"was run. It may be damaged, hostile, or written with another pickle protocol than "
            f"torch.save's own (2). {_last_line(reason)}"
        )
    full_name = wanted.group(1)
    module, _, short = full_name.rpartition(".")
    if module in _BLOCKED_MODULES:
        advice = "No checkpoint needs this: treat the file as hostile."
    else:
        if not module:  # torch leaves builtins out
            full_name = f"builtins.{short}"
        advice = (
            "If you trust both the file and this class, call "
            f'deltasam_fairseq.checkpoints.allow("{full_name}")'
        )
        if hasattr(torch.serialization, "add_safe_globals"):
            advice += f" or torch.serialization.add_safe_globals([{full_name}])"
        advice += " before loading."
    return (
        f"{name} was not loaded: it asks for {full_name}, which is not among the classes that "
        f"fairseq checkpoints hold, and could run code of whoever wrote the file. Nothing of it "
        f"was run. {advice}"
    )


def _last_line(reason: str) -> str:
    """torch's own words without its advice to load without protection."""
    text = reason.split("WeightsUnpickler error:")[-1].split("\n\nCheck the documentation")[0]
    lines = [line for line in text.strip().splitlines() if line]
    return f"(torch: {lines[-1]})" if lines else ""


def _read_safely(load: Callable[..., Any], owner: int, f: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.load`` with the allow-list, whatever the caller says of weights_only.

    Raises:
        CheckpointRefusedError: the file wants a global that is not allowed.
        CheckpointDamagedError: the file cannot be read at all.
    """
    if threading.get_ident() != owner:  # another thread's own torch.load
        return load(f, *args, **kwargs)
    map_location = kwargs.pop("map_location", args[0] if args else None)
    kwargs.pop("pickle_module", None)
    kwargs.pop("weights_only", None)
    name = getattr(f, "name", f if isinstance(f, str) else None) or "the checkpoint"
    try:
        if _HAS_SAFE_GLOBALS:
            with _safe_globals():
                return load(f, map_location=map_location, weights_only=True, **kwargs)
        _refuse_torchscript(f)
        return load(
            f,
            map_location=map_location,
            pickle_module=restricted_pickle,
            weights_only=False,
            **kwargs,
        )
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise CheckpointDamagedError(_damage(name, error)) from error
        raise CheckpointRefusedError(_refusal(str(name), str(error))) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the disk's fault; EINVAL is a seek before the start of a short file
        if "TorchScript" in str(error):
            raise CheckpointRefusedError(_refusal(str(name), "it is a TorchScript program")) from error
        raise CheckpointDamagedError(_damage(name, error)) from error


def _damage(name: Any, error: Exception) -> str:
    """The message for a file that cannot be read."""
    reason = str(error).strip().splitlines() or [""]
    return (
        f"{name} could not be read as a checkpoint ({type(error).__name__}: {reason[0]}). It is cut "
        f"short, corrupt, or no torch file: copy it again, or take an earlier checkpoint."
    )


def _read_from_peer(load: Callable[..., Any], owner: int, f: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.load`` for what rank 0 of the same run has sent, not for files."""
    if threading.get_ident() == owner:
        kwargs["weights_only"] = False
    return load(f, *args, **kwargs)


_lock = threading.RLock()


@contextlib.contextmanager
def _torch_load_as(reader: Callable[..., Any]) -> Iterator[None]:
    """Replace ``torch.load`` in this thread; nested or failing, it comes back."""
    with _lock:
        before = torch.load
        original = before
        if isinstance(before, functools.partial) and before.func in (_read_safely, _read_from_peer):
            original = before.args[0]
        torch.load = functools.partial(reader, original, threading.get_ident())
        try:
            yield
        finally:
            torch.load = before


# --- Strings that fairseq evaluates ------------------------------------------------------

_ARITHMETIC = (
    ast.Expression,
    ast.Constant,
    ast.Tuple,
    ast.List,
    ast.Dict,
    ast.Set,
    ast.Load,
    ast.BinOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.UnaryOp,
    ast.UAdd,
    ast.USub,
)


def literal_eval(source: str) -> Any:
    """``eval`` for options such as "(0.9, 0.98)" or "[(512, 3)] * 20": no names, no calls.

    fairseq passes strings of a checkpoint's configuration to ``eval`` when it builds the
    model (decoder_attention, encoder_layers, adaptive_softmax_cutoff, ...), so a file could
    run code from there, after a perfectly safe load.

    Args:
        source: an expression of literals, lists, tuples, dicts and + - * /.

    Returns:
        Its value.

    Raises:
        TypeError: not a string (fairseq relies on it).
        ValueError: the expression names, calls or indexes something.
    """
    if not isinstance(source, str):
        raise TypeError(f"eval() arg 1 must be a string, not {type(source).__name__}")
    tree = ast.parse(source.strip(), mode="eval")
    if not all(isinstance(node, _ARITHMETIC) for node in ast.walk(tree)):
        raise ValueError(
            f"refused to evaluate the option value {source!r}: only literals, lists, tuples, dicts "
            f"and + - * / are allowed. If it comes from a checkpoint, treat the file as hostile."
        )
    return builtins.eval(compile(tree, "<option>", "eval"), {"__builtins__": {}})


# --- Into fairseq ----------------------------------------------------------------------


def _rebind(module: Any, name: str, reader: Callable[..., Any]) -> None:
    """Let a function of fairseq, where this version has it, read through a reader."""
    original = getattr(module, name, None)
    if original is None or hasattr(original, "_deltasam_reader"):
        return

    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with _torch_load_as(reader):
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


def install() -> None:
    """Make fairseq read checkpoints safely, in training, validation and the hub.

    Idempotent. Rebinds ``load_checkpoint_to_cpu`` and ``load_ema_from_checkpoint``, through
    which fairseq reads every checkpoint; ``_broadcast_object_slow``, with which rank 0 hands
    it to the other ranks (a peer, not a file: read as before torch 2.6); and gives those of
    fairseq's modules that call ``eval`` :func:`literal_eval` for it.

    Under data parallelism: on every rank, before the first checkpoint is read.
    """
    _rebind(checkpoint_utils, "load_checkpoint_to_cpu", _read_safely)
    _rebind(checkpoint_utils, "load_ema_from_checkpoint", _read_safely)
    _rebind(distributed_utils, "_broadcast_object_slow", _read_from_peer)
    for name, module in list(sys.modules.items()):
        if name.startswith("fairseq.") and _calls_eval(module):
            vars(module).setdefault("eval", literal_eval)


# --- A --restore-file that is not there ------------------------------------------------

_DEFAULT_RESTORE_FILE = "checkpoint_last.pt"


def require_restore_file(cfg: Any, suffix: Optional[str] = None) -> None:
    """Stop when the checkpoint to start from is not there.

    fairseq only logs a --restore-file that it does not find, and trains from scratch. Which
    file it will look for, and how (``PathManager.isfile``, remote addresses included), is as
    in ``fairseq.checkpoint_utils.load_checkpoint`` and ``Trainer.load_checkpoint``.

    Args:
        cfg: the ``checkpoint`` part of fairseq's configuration.
        suffix: ``trainer.checkpoint_suffix``; by default cfg.checkpoint_suffix, which is the
            same but for sharded FSDP.

    Raises:
        FileNotFoundError: a --restore-file other than the default, or on a first launch a
            --finetune-from-model or checkpoint.continue_once, is not a file.

    Under data parallelism: call it on every rank; each must see the file, or fairseq's
    broadcast of it hangs. Limiting case: all three at their defaults, nothing is required.
    """
    if suffix is None:
        suffix = getattr(cfg, "checkpoint_suffix", None) or ""
    wanted: List[Tuple[str, str, str]] = []
    if cfg.restore_file != _DEFAULT_RESTORE_FILE:
        # As fairseq does it, every ".pt" and not only the last.
        wanted.append(("--restore-file", cfg.restore_file, cfg.restore_file.replace(".pt", suffix + ".pt")))
    elif not PathManager.exists(f"{cfg.save_dir}/checkpoint_last{suffix}.pt"):
        continue_once = getattr(cfg, "continue_once", None)
        finetune = getattr(cfg, "finetune_from_model", None)
        if continue_once is not None:
            wanted.append(("--continue-once", continue_once, continue_once))
        elif finetune is not None:
            wanted.append(("--finetune-from-model", finetune, finetune))
    for option, value, path in wanted:
        if not PathManager.isfile(path):
            looked_for = "" if path == value else f" (looked for {path})"
            raise FileNotFoundError(
                f"{option} {value}{looked_for} does not exist or is not a file, and fairseq would "
                f"start from scratch without it. Give the path of a checkpoint file, as seen from "
                f"every rank, or leave {option} out to start from scratch on purpose."
            )
