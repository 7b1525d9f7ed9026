"""Save and load what a checkpoint needs beside fairseq's own for a resumed run to be the same."""

import contextlib
import logging
from typing import Any, Dict, Iterator, List, Optional

from fairseq import checkpoint_utils
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.trainer import Trainer

from deltasam_fairseq.checkpoints import DataRecord, fit_start
from deltasam_fairseq.criterions import RegularisedCriterion
from deltasam_fairseq.lr_schedulers import SWAScheduler
from deltasam_fairseq.optim import sharpness_aware

logger = logging.getLogger(__name__)

# Keys of a checkpoint's extra state.
LOSS_SCALER = "deltasam_loss_scaler"
CRITERION = "deltasam_criterion"
MASK = "deltasam_mask"
RADIUS = "deltasam_radius"
WEIGHT_AVERAGE = "deltasam_weight_average"
# Keys in WEIGHT_AVERAGE: number of weights in the average, averages by name, weights by name.
N, AVERAGES, RAW = "n", "averages", "raw"


def extra_checkpoint_state(trainer: Trainer) -> Dict[str, Any]:
    """State to save: counters of the loss scaler, averages of a criterion, a mask, TRAM's.

    Args:
        trainer: fairseq's, built.

    Returns:
        entries for the checkpoint's ``extra_state``: tensors and plain values.
    """
    state: Dict[str, Any] = {}
    if _keeps_scaler(trainer):
        state[LOSS_SCALER] = _scaler_counters(trainer)
    sam = sharpness_aware(trainer.optimizer)
    if sam is not None and not trainer.cfg.checkpoint.no_save_optimizer_state:
        parts = sam.core.parts
        found = {MASK: parts.mask.state_dict(), RADIUS: parts.radius.state_dict()}
        state.update((key, part) for key, part in found.items() if part)
    criterion = trainer.get_criterion()
    if isinstance(criterion, RegularisedCriterion):
        if not trainer.cfg.checkpoint.no_save_optimizer_state:
            state[CRITERION] = criterion.regulariser.state_dict()
    return state


def load_extra_checkpoint_state(trainer: Trainer, state: Dict[str, Any]) -> None:
    """Restore an `extra_checkpoint_state`; what it lacks keeps its value of a new run."""
    criterion = trainer.get_criterion()
    if isinstance(criterion, RegularisedCriterion):
        criterion.regulariser.load_state_dict(state.get(CRITERION) or {})
    sam = sharpness_aware(trainer.optimizer)
    if sam is not None:
        sam.core.parts.mask.load_state_dict(state.get(MASK) or {})
        sam.core.parts.radius.load_state_dict(state.get(RADIUS) or {})
    counters = state.get(LOSS_SCALER)
    scaler = getattr(trainer.optimizer, "scaler", None)
    # There is none where a run saved in fp16 is resumed in another precision.
    if not counters or scaler is None or not _keeps_scaler(trainer):
        return
    if trainer.cfg.common.amp:
        scaler.load_state_dict(counters)
    else:
        vars(scaler).update({k: counters[k] for k in vars(scaler) if k in counters})


@contextlib.contextmanager
def fitting_to_data(data: DataRecord, resumes: bool, store_ema: bool) -> Iterator[None]:
    """Let the checkpoint that fairseq loads meanwhile go through `fit_start`, on the rank it reads.

    fairseq gives a trainer no other place between reading a file and loading its weights. For
    --store-ema an average that the file does not have begins as its weights; fairseq says that it
    does so, and ends in KeyError.
    """
    load = checkpoint_utils.load_checkpoint_to_cpu

    def load_and_fit(path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        state = load(path, *args, **kwargs)
        fit_start(state, data, path, resumes)
        if store_ema:
            state["extra_state"].setdefault("ema", state["model"])
        return state

    checkpoint_utils.load_checkpoint_to_cpu = load_and_fit
    try:
        yield
    finally:
        checkpoint_utils.load_checkpoint_to_cpu = load


def _keeps_scaler(trainer: Trainer) -> bool:
    """Whether the run is one of this plugin's, which resume bit for bit."""
    return sharpness_aware(trainer.optimizer) is not None or isinstance(
        trainer.lr_scheduler, SWAScheduler
    )


def _scaler_counters(trainer: Trainer) -> Optional[Dict[str, Any]]:
    scaler = getattr(trainer.optimizer, "scaler", None)
    if scaler is None:
        return None
    if trainer.cfg.common.amp:
        return scaler.state_dict()
    return {name: value for name, value in vars(scaler).items() if name.startswith("_")}


def accept_same_base_optimizer(history: Optional[List[Dict[str, Any]]], optimizer: Any) -> None:
    """Let a run go on with or without SAM: the saved state is the base optimizer's either way.

    Args:
        history: fairseq's record of optimizers, whose last entry is changed; None or empty
            before a checkpoint is loaded.
        optimizer: with which the run goes on; fairseq compares the name of its class.
    """
    own = type(optimizer).__name__
    saved = history[-1].get("optimizer_name") if history else None
    if saved in (None, own) or _base_name(saved) != _base_name(own):
        return
    logger.info(f"going on with {own} from the optimizer state of {saved}: both are of one kind")
    history[-1]["optimizer_name"] = own  # type: ignore[index]


def _base_name(name: str) -> str:
    """Class name of the base optimizer of a class of fairseq's registry."""
    for found in OPTIMIZER_REGISTRY.values():
        if found.__name__ == name:
            return getattr(found, "base_class", found).__name__
    return name
