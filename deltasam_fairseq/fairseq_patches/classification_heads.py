"""Checkpoints with classification heads that fairseq writes but cannot read.

As fairseq is, both are a KeyError when such a run is resumed, evaluated, or the start of another:

- with --spectral-norm-classification-head (R4F) the head's weight is stored as ``weight_orig``,
  and fairseq looks for ``weight``;
- a head of one linear layer (span prediction): fairseq's RoBERTa takes every head in a checkpoint
  for one of its own, which have a layer ``dense``.
"""

import logging
from typing import Any, Dict

from fairseq.models.bart import BARTModel
from fairseq.models.roberta import RobertaModel

from deltasam_fairseq.fairseq_patches.patching import patch

logger = logging.getLogger(__name__)

_HEADS, _DENSE = "classification_heads.", ".dense.weight"
_PLAIN, _NORMALISED = ".out_proj.weight", ".out_proj.weight_orig"


def _read_normalised_heads(upgrade: Any, self: Any, state_dict: Dict[str, Any], name: str) -> None:
    """``upgrade_state_dict_named`` that knows both names of the output weight.

    A head without the norm can be the start of one with it.
    """
    added = []
    for key in [k for k in state_dict if _HEADS in k and k.endswith(_NORMALISED)]:
        plain = key[: -len(_NORMALISED)] + _PLAIN
        state_dict[plain] = state_dict[key]
        added.append(plain)
    upgrade(self, state_dict, name)
    own = self.state_dict().keys()
    for key in [k for k in state_dict if _HEADS in k and k.endswith(_PLAIN)]:
        normalised = key[: -len(_PLAIN)] + _NORMALISED
        if key in added:
            del state_dict[key]
        elif normalised[len(name) + 1 if name else 0 :] in own:
            state_dict[normalised] = state_dict.pop(key)


def _read_linear_heads(upgrade: Any, self: Any, state_dict: Dict[str, Any], name: str) -> None:
    """``upgrade_state_dict_named`` that sees only heads with a layer ``dense``.

    The others are put back afterwards if the model has them, and dropped with a warning if not, as
    fairseq does with its own.
    """
    begin = f"{name}." if name else ""
    prefix = begin + _HEADS
    linear = {}
    for key in [k for k in state_dict if k.startswith(prefix)]:
        head = prefix + key[len(prefix) :].split(".")[0]
        if head + _DENSE not in state_dict:
            linear[key] = state_dict[key]
    for key in linear:
        del state_dict[key]
    upgrade(self, state_dict, name)
    own = self.state_dict()
    for key, value in linear.items():
        wanted = own.get(key[len(begin) :])
        if wanted is not None and wanted.shape == value.shape:
            state_dict[key] = value
        else:
            logger.warning(f"dropping {key} of the checkpoint: the model has no such head")


def install() -> None:
    """Let RoBERTa and BART read such checkpoints."""
    for model in (RobertaModel, BARTModel):
        patch(model, "upgrade_state_dict_named", _read_normalised_heads)
    patch(RobertaModel, "upgrade_state_dict_named", _read_linear_heads)
