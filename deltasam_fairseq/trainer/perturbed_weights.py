"""Select the perturbed weights: all that are trained, or those whose name matches a pattern.

Mueller et al. 2023 ("Normalization Layers Are All That Sharpness-Aware Minimization Needs")
perturb the normalisation layers only. The ascent then computes, reduces and keeps the gradients of
these few weights only.
"""

import contextlib
import re
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from fairseq.distributed import utils as distributed_utils
from torch.nn import Module, Parameter

from deltasam_fairseq.fairseq_patches.fused_layers import copies

# How many names an error shows.
_SHOWN = 6


class PerturbedWeights:
    """The weights that probe and ascent move.

    Args:
        modules: model and criterion, without their wrappers.
        pattern: regular expression, searched in the names of their parameters; None for all
            weights.
        recomputes: whether the model recomputes activations in the backward
            (--checkpoint-activations). A checkpointed part gets no gradients if none of its inputs
            requires one, so that no weight may be frozen.

    Attributes:
        trained: all weights that the optimizer trains, except fairseq 0.12's second copies, and
            their names.
        partial: whether a pattern selects some of them.

    Raises:
        ValueError: if no name of a trained weight matches.
    """

    def __init__(
        self, modules: Sequence[Module], pattern: Optional[str], recomputes: bool = False
    ) -> None:
        unread = copies(modules)
        named = [
            (name, p)
            for module in modules
            for name, p in module.named_parameters()
            if p.requires_grad and p not in unread
        ]
        self.trained: Dict[Parameter, str] = {p: name for name, p in named}
        self.partial = pattern is not None
        self._pattern = pattern
        self._recomputes = recomputes
        self._chosen: Dict[Parameter, None] = dict.fromkeys(
            p for name, p in named if pattern is None or re.search(pattern, name)
        )
        if pattern is not None and not self._chosen:
            raise ValueError(_no_match(pattern, named))

    def parameters(self) -> List[Parameter]:
        """Return the perturbed weights, in the same order on every process."""
        return [p for p in self._chosen if p.requires_grad]

    def describe(self) -> str:
        """Return a line for the log: how many of how many weights."""
        some, all_ = (sum(p.numel() for p in ps) for ps in (self._chosen, self.trained))
        return (
            f"--sam-only {self._pattern}: {some:,} of {all_:,} weights are perturbed, "
            f"{len(self._chosen)} of {len(self.trained)} tensors"
        )

    @contextlib.contextmanager
    def freeze_others(self) -> Iterator[None]:
        """Within, a backward computes no gradients of other weights, unless it recomputes.

        Raises:
            ValueError: if the loss depends on none of the perturbed weights.
        """
        others = [p for p in self.trained if p not in self._chosen and p.requires_grad]
        others = [] if self._recomputes else others
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        except RuntimeError as e:
            if not self.partial or "does not require grad" not in str(e):
                raise
            raise ValueError(
                f"--sam-only {self._pattern}: the loss depends on none of the weights that match, "
                "so there is nothing to perturb; choose weights that take part, such as layer_norm"
            ) from e
        finally:
            for p in others:
                p.requires_grad_(True)

    def average_grads(self, world_size: int, group: Any) -> None:
        """Average their gradients over ranks, one all-reduce a dtype; a missing one counts as zero.

        Data-parallel wrappers do the same for the gradients of all weights.
        """
        by_dtype: Dict[torch.dtype, List[Parameter]] = {}
        for p in self.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            by_dtype.setdefault(p.dtype, []).append(p)
        for params in by_dtype.values():
            flat = torch.cat([p.grad.flatten() for p in params if p.grad is not None]) / world_size
            distributed_utils.all_reduce(flat, group=group)
            for p, grad in zip(params, flat.split([p.numel() for p in params])):
                p.grad = grad.view_as(p)


def _no_match(pattern: str, named: Sequence[Tuple[str, Parameter]]) -> str:
    """Return the error: it shows some names, of different kinds, to derive a pattern from."""
    kinds = {name.rsplit(".", 1)[0].rsplit(".", 1)[-1]: name for name, _ in named}
    names = list(kinds.values())[-_SHOWN:]
    return (
        f"--sam-only {pattern}: no name of a trained weight matches; they are such as "
        f"{', '.join(names)}; layer_norm perturbs all layer normalisations"
    )
