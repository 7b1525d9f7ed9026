"""Keep fairseq 0.12's fused encoder layers out of evaluation.

A model that was read from a checkpoint, and not trained since, evaluates there through a fused
kernel on second copies of its weights. torch 2 refuses the call where there is padding: "Mask Type
should be defined". fairseq-generate and fairseq-validate fail by it. Later versions have no such
layers.

The copies are parameters of the model that nothing else reads. Each time a checkpoint is read they
are made again, so a probe that moved them, or a norm that counted them, would differ in a resumed
run.
"""

from typing import Any, Iterable, Set

from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch.nn import Module, Parameter

# Set by such a layer when it reads a checkpoint, and asked for in its forward.
_READ = "load_to_BT"
_COPIES = frozenset(
    f"{name}_{kind}"
    for name in ("in_proj", "out_proj", "fc1", "fc2")
    for kind in ("weight", "bias")
)


def copies(modules: Iterable[Module]) -> Set[Parameter]:
    """Return the parameters that only fused layers would read; none on versions without them."""
    return {
        p
        for module in modules
        for layer in module.modules()
        if isinstance(layer, TransformerEncoderLayerBase)
        for name, p in layer.named_parameters(recurse=False)
        if name in _COPIES
    }


def _never(layer: Any) -> bool:
    return False


def _stay(layer: Any, value: bool) -> None:
    """Reading a checkpoint changes nothing here."""


def install() -> None:
    """Let layers evaluate as they train; no effect on versions without fused ones."""
    setattr(TransformerEncoderLayerBase, _READ, property(_never, _stay))
