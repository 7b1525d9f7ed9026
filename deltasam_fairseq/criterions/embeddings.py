"""Perturbed word embeddings, for any model whose encoder has an ``embed_tokens``.

fairseq's RoBERTa takes an argument token_embeddings and drops it; BART uses it, the transformer
does not take it. Here the perturbation is added where the embeddings come into being: by a hook
on the module that looks them up. It works for all of them, through data-parallel wrappers, and
leaves scaling, positions and dropout behind it as they are.
"""

import contextlib
import logging
from typing import Any, Iterator, List, Set

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

NAME = "embed_tokens"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of its data-parallel wrappers."""
    inner = getattr(model, "module", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


class WordEmbeddings:
    """The module that looks up the word embeddings of a model's encoder.

    Args:
        model: in whatever data-parallel wrapper.

    Raises:
        ValueError: for a model without one.
    """

    def __init__(self, model: nn.Module) -> None:
        model = unwrapped(model)
        encoder: Any = getattr(model, "encoder", None)
        named = () if encoder is None else encoder.named_modules()
        found = next((module for name, module in named if name.split(".")[-1] == NAME), None)
        if found is None:
            raise ValueError(
                f"{type(model).__name__} has no encoder with word embeddings ({NAME}) to perturb; "
                "r_drop needs none, the others work with RoBERTa, BART and the transformer"
            )
        self.module = found
        self.padding_idx: int = encoder.dictionary.pad()
        self._model_name = type(model).__name__

    def of(self, tokens: Tensor) -> Tensor:
        """The unperturbed embeddings, without graph.

        Args:
            tokens: shape (B, T).

        Returns:
            shape (B, T, C), in the dtype of the model.
        """
        with torch.no_grad():
            return self.module(tokens)

    @contextlib.contextmanager
    def perturbed(self, tokens: Tensor, delta: Tensor) -> Iterator[None]:
        """Within, a forward on ``tokens`` sees ``embeddings + delta``.

        Other uses of the module, as that of a decoder which shares it, see what they always do.

        Args:
            tokens: the model's src_tokens, the very tensor, shape (B, T).
            delta: shape (B, T, C), at least float32; added in its precision, then rounded to
                that of the model.

        Raises:
            RuntimeError: if the forward looked up other tokens, or none.
        """
        looked_up: List[bool] = []

        def add(_: nn.Module, inputs: Any, output: Tensor) -> Any:
            if inputs[0].data_ptr() != tokens.data_ptr() or inputs[0].shape != tokens.shape:
                return None
            looked_up.append(True)
            moved = (output + delta).to(output.dtype)
            _warn_if_rounded_away(output, moved, delta)
            return moved

        handle = self.module.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
        if not looked_up:
            raise RuntimeError(
                f"{self._model_name} did not look up its src_tokens in {NAME}: its word "
                "embeddings cannot be perturbed"
            )


_checked_dtypes: Set[torch.dtype] = set()


def _warn_if_rounded_away(before: Tensor, after: Tensor, delta: Tensor) -> None:
    """Once a run, in half precision: say so if less than half of the perturbation is left."""
    if before.element_size() >= 4 or before.dtype in _checked_dtypes:
        return
    with torch.no_grad():
        wanted = delta.float()
        square = wanted.square().sum()
        realised = ((after.float() - before.float()) * wanted).sum() / square
        if not square > 0:
            return
    _checked_dtypes.add(before.dtype)
    if realised < 0.5:
        logger.warning(
            f"the perturbation of the word embeddings (largest entry {wanted.abs().max():.1e}) is "
            f"too small for {before.dtype}: {realised:.0%} of it survives rounding. A larger one, "
            "or training in float32, makes it real"
        )
