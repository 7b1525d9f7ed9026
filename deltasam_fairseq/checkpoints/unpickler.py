"""Reading with torch < 2.6: a pickle module that reaches only what is allowed.

Its own ``weights_only`` takes no aliases (numpy 1 and 2, fairseq.meters), and before
2.4 no list at all.
"""

import _compat_pickle
import codecs
import io
import pickle
import types
from typing import Any, Dict

import torch

from deltasam_fairseq.checkpoints.allow_list import (
    BLOCKED_MODULES,
    allowed_globals,
    torch_safe_globals,
)

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
            **torch_safe_globals(),
        }
        self._trusted = {id(found) for found in self._globals.values()}

    def find_class(self, module: str, name: str) -> Any:
        """The listed object of this name; nothing is imported, no attribute is followed."""
        if self.proto < 3:  # protocol 2 writes the names of Python 2
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[(module, name)]
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full_name = f"{module}.{name}"
        if module in BLOCKED_MODULES or full_name not in self._globals:
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


def refuse_torchscript(f: Any) -> None:
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
