"""Checkpoints of a spectrally normalised classification head (R4F).

With --spectral-norm-classification-head the head's weight is stored as ``weight_orig``. fairseq
looks for ``weight`` when it reads a checkpoint, so that no such run could be resumed or evaluated:
KeyError. The other way round, a head without the norm can be the start of one with it.
"""

import functools
from typing import Any, Dict

from fairseq.models.bart import BARTModel
from fairseq.models.roberta import RobertaModel

_HEADS, _PLAIN, _NORMALISED = "classification_heads.", ".out_proj.weight", ".out_proj.weight_orig"


def _reading_normalised_heads(upgrade: Any) -> Any:
    """``upgrade_state_dict_named`` that knows both names of the weight."""

    @functools.wraps(upgrade)
    def wrapper(self: Any, state_dict: Dict[str, Any], name: str) -> None:
        stood_in = []
        for key in [k for k in state_dict if _HEADS in k and k.endswith(_NORMALISED)]:
            plain = key[: -len(_NORMALISED)] + _PLAIN
            state_dict[plain] = state_dict[key]
            stood_in.append(plain)
        upgrade(self, state_dict, name)
        own = self.state_dict().keys()
        for key in [k for k in state_dict if _HEADS in k and k.endswith(_PLAIN)]:
            normalised = key[: -len(_PLAIN)] + _NORMALISED
            if key in stood_in:
                del state_dict[key]
            elif normalised[len(name) + 1 if name else 0 :] in own:
                state_dict[normalised] = state_dict.pop(key)

    wrapper._deltasam = True  # type: ignore[attr-defined]
    return wrapper


def install() -> None:
    """Let RoBERTa and BART read such checkpoints; does nothing the second time."""
    for model in (RobertaModel, BARTModel):
        if not hasattr(model.upgrade_state_dict_named, "_deltasam"):
            model.upgrade_state_dict_named = _reading_normalised_heads(
                model.upgrade_state_dict_named
            )
