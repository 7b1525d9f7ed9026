"""fairseq 0.12's fused encoder layers, kept out of evaluation.

A model that was read from a checkpoint, and not trained since, evaluates there through a fused
kernel on second copies of its weights. torch 2 refuses the call where there is padding: "Mask Type
should be defined". fairseq-generate and fairseq-validate fail by it. Later versions have no such
layers.
"""

from typing import Any

from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

# Set by such a layer when it reads a checkpoint, and asked for in its forward.
_READ = "load_to_BT"


def _never(layer: Any) -> bool:
    return False


def _stay(layer: Any, value: bool) -> None:
    """Reading a checkpoint changes nothing here."""


def install() -> None:
    """Let layers evaluate as they train; no effect on versions without fused ones."""
    setattr(TransformerEncoderLayerBase, _READ, property(_never, _stay))
