"""Checkpoints with a head of one linear layer (span prediction).

fairseq's RoBERTa takes every head in a checkpoint for one of its own, which have a layer ``dense``:
KeyError, when such a run is resumed, evaluated, or the start of another task.
"""

import functools
import logging
from typing import Any, Dict, List

from fairseq.models.roberta import RobertaModel

logger = logging.getLogger(__name__)

_HEADS, _DENSE = "classification_heads.", ".dense.weight"


def _of_linear_heads(state_dict: Dict[str, Any], prefix: str) -> List[str]:
    """The keys of the heads that have no layer ``dense``."""

    def head(key: str) -> str:
        return prefix + key[len(prefix) :].split(".")[0]

    keys = [key for key in state_dict if key.startswith(prefix)]
    return [key for key in keys if head(key) + _DENSE not in state_dict]


def _reading_linear_heads(upgrade: Any) -> Any:
    """``upgrade_state_dict_named`` that sees only heads with a layer ``dense``.

    The others are put back afterwards if the model has them, and left out with a warning if not,
    as fairseq does it.
    """

    @functools.wraps(upgrade)
    def wrapper(self: Any, state_dict: Dict[str, Any], name: str) -> None:
        begin = f"{name}." if name else ""
        keys = _of_linear_heads(state_dict, begin + _HEADS)
        found = {key: state_dict.pop(key) for key in keys}
        upgrade(self, state_dict, name)
        own = self.state_dict()
        for key, value in found.items():
            wanted = own.get(key[len(begin) :])
            if wanted is not None and wanted.shape == value.shape:
                state_dict[key] = value
            else:
                logger.warning(f"leaving {key} of the checkpoint out: the model has no such head")

    wrapper._deltasam_linear = True  # type: ignore[attr-defined]
    return wrapper


def install() -> None:
    """Let RoBERTa read such checkpoints; does nothing the second time."""
    if not hasattr(RobertaModel.upgrade_state_dict_named, "_deltasam_linear"):
        RobertaModel.upgrade_state_dict_named = _reading_linear_heads(
            RobertaModel.upgrade_state_dict_named
        )
