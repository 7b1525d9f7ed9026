"""The mean of checkpoints."""

import logging
from typing import Any, Dict, List, Optional, Sequence

import torch
from fairseq.file_io import PathManager
from torch import Tensor

from deltasam_fairseq.algorithms import running_mean_
from deltasam_fairseq.checkpoints import (
    CheckpointDamagedError,
    CheckpointRefusedError,
    DataMismatchError,
    DataRecord,
    fit_to_data,
)
from deltasam_fairseq.checkpoints.reading import read_safely
from deltasam_fairseq.options import UsageError
from deltasam_fairseq.trainer.checkpoint_state import CRITERION, RADIUS, RAW, WEIGHT_AVERAGE

logger = logging.getLogger("deltasam_fairseq.average")

# Entries of the extra state that hold weights of one run, averaged or those of its last update.
_OF_THE_LAST = {
    "ema": "--store-ema",
    "ema_fp32_params": "--store-ema",
    CRITERION: "--criterion smart",
    RADIUS: "--sam-radius trust_region_theta",
}


def read(path: str) -> Dict[str, Any]:
    """A checkpoint as it is in the file but for the optimizer's state, on the CPU.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with PathManager.open(path, "rb") as f:
            state = read_safely(torch.load, f, map_location="cpu")
    except (CheckpointDamagedError, CheckpointRefusedError, OSError) as e:
        raise UsageError(str(e)) from e  # names the file
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UsageError(f"{path}: not a checkpoint of fairseq, it holds no model")
    state.pop("last_optimizer_state", None)  # large, and belongs to other weights than the mean
    return state


def _weights(state: Dict[str, Any], path: str, raw: bool) -> Dict[str, Dict[str, Any]]:
    """State dicts of model and criterion, with --raw of the weights themselves."""
    modules = {
        owner: dict(state[owner])
        for owner in ("model", "criterion")
        if state.get(owner) is not None
    }
    saved = state.get("extra_state", {}).get(WEIGHT_AVERAGE)
    if raw and saved is not None:
        for name, value in saved[RAW].items():
            owner, key = name.split(".", 1)
            averages = modules[owner][key]
            for other, tensor in modules[owner].items():  # also the other names of a shared one
                if torch.is_tensor(tensor) and _same_storage(tensor, averages):
                    modules[owner][other] = value
    elif raw:
        raise UsageError(f"--raw: {path} holds no average of its weights; omit --raw")
    return modules


def _same_storage(some: Tensor, other: Tensor) -> bool:
    return some.data_ptr() == other.data_ptr() and some.shape == other.shape


def _names(state: Dict[str, Any]) -> Dict[str, str]:
    """Key of a floating tensor -> the first key under which that tensor stands."""
    first: Dict[Any, str] = {}
    names = {}
    for key, value in state.items():
        if torch.is_tensor(value) and value.is_floating_point():
            place = (value.data_ptr(), value.shape) if value.numel() else key
            names[key] = first.setdefault(place, key)
    return names


def _untied(names: Dict[str, str], state: Dict[str, Any]) -> List[str]:
    """Keys of ``names`` whose tensor has values other than its namesake's in ``state``."""
    pairs = [(key, state[key], state[name]) for key, name in names.items() if key != name]
    return [key for key, a, b in pairs if not (_same_storage(a, b) or torch.equal(a, b))]


class Averager:
    """Mean of state dicts in float32 or better, one at a time in memory.

    A tensor that stands under several names (shared weights) is averaged once and shared in the
    result. A file may hold such a tensor once per name (fairseq writes it so from a GPU): what is
    shared in one file must then be equal in the others. What is not floating (counters) is taken
    from the last.
    """

    def __init__(self) -> None:
        self.n = 0
        self._means: Dict[str, Tensor] = {}
        self._last: Dict[str, Any] = {}
        self._names: Dict[str, str] = {}

    def add(self, state: Dict[str, Any], path: str) -> None:
        """Add a state dict.

        Raises:
            UsageError: its tensors are not those of the first.
        """
        shapes = {k: getattr(v, "shape", None) for k, v in state.items()}
        names = _names(state)
        if self.n == 0:
            self._names = names
            self._means = {
                name: state[name].to(torch.promote_types(state[name].dtype, torch.float32)).clone()
                for name in dict.fromkeys(self._names.values())
            }
        else:
            known = {k: getattr(v, "shape", None) for k, v in self._last.items()}
            different = sorted(k for k in {**shapes, **known} if shapes.get(k) != known.get(k))
            different = different or _untied(self._names, state) + _untied(names, self._last)
            if different:
                raise UsageError(
                    f"{path}: another model than the first, different in {', '.join(different[:3])}"
                )
            running_mean_(list(self._means.values()), [state[n] for n in self._means], self.n)
        self._last = state
        self.n += 1

    def result(self) -> Dict[str, Any]:
        """The averaged state dict, in the precision and order of the last that was added."""
        means = {name: mean.to(self._last[name].dtype) for name, mean in self._means.items()}
        return {k: means[self._names[k]] if k in self._names else v for k, v in self._last.items()}


def average(paths: Sequence[str], raw: bool = False) -> Dict[str, Any]:
    """Mean of checkpoints: what is not weights is that of the last, without optimizer state
    and without averages of one file's weights (--store-ema, --criterion smart).

    Args:
        paths: at least one checkpoint, the newest last.
        raw: see --raw.

    Raises:
        UsageError: a file that cannot be read, or is of another model or other data.
    """
    averagers: Dict[str, Averager] = {}
    reference: Optional[DataRecord] = None
    for path in paths:
        state = read(path)
        modules = _weights(state, path, raw)
        record = DataRecord.of_checkpoint(state)
        if record.known and reference is not None:
            fitted = {**state, "model": modules["model"]}
            try:
                fit_to_data(fitted, reference, f"{path}, the first is {paths[0]}", rescales=False)
            except DataMismatchError as e:
                raise UsageError(str(e)) from e
        reference = reference or (record if record.known else None)
        for owner, module in modules.items():
            averagers.setdefault(owner, Averager()).add(module, path)
    for owner, averager in averagers.items():
        state[owner] = averager.result()
    state.get("extra_state", {}).pop(WEIGHT_AVERAGE, None)
    for key, option in _OF_THE_LAST.items():
        if state.get("extra_state", {}).pop(key, None):
            logger.info(f"{key} of {option} is dropped: it belongs to {paths[-1]}, not to the mean")
    return state
