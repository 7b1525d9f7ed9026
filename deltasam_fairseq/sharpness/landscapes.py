"""The figures of ``algorithms.sharpness`` for a fairseq model, batch after batch."""

import random
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from fairseq.criterions import FairseqCriterion
from torch import Tensor

from deltasam_fairseq.algorithms import draw_direction_, probe_generator
from deltasam_fairseq.algorithms.sharpness import (
    Landscape,
    Writer,
    clean_losses,
    cosine,
    delta_sam_direction,
    loss_curve,
    mean_rise,
    per_instance_rises,
    sam_direction,
)
from deltasam_fairseq.core import SwappedWeights
from deltasam_fairseq.criterions import has_per_sentence_losses, per_sentence_losses
from deltasam_fairseq.sharpness.options import UsageError

Sample = Dict[str, Any]

# A sentence's loss may differ this much, relative, between its batch and alone: other padding,
# other order of summation.
_ALONE_TOLERANCE = 1e-2


class ModelLandscapes:
    """Makes a `Landscape` of a batch: model and criterion in eval mode, losses in nats.

    The weights are those that an optimizer of this package perturbs: all trainable ones of
    model and criterion. They are never written to, see `SwappedWeights`. Every forward starts
    from the same random state, for criterions that draw noise.

    Args:
        model: on its device, in float32; put in eval mode here.
        criterion: with per-sentence losses or without; put in eval mode here.
        seed: of the random state.
    """

    def __init__(self, model: torch.nn.Module, criterion: FairseqCriterion, seed: int) -> None:
        self.model = model.eval()
        self.criterion = criterion.eval()
        self.per_sentence = has_per_sentence_losses(type(criterion))
        module: Any
        for module in model.modules():
            # fairseq 0.12: fused layers in eval mode, on second copies of the weights and
            # without gradients.
            if getattr(module, "can_use_fastpath", False):
                module.can_use_fastpath = False
        self.parameters = [
            p for module in (model, criterion) for p in module.parameters() if p.requires_grad
        ]
        self._moved = SwappedWeights()
        self._seed = seed

    def direction(self) -> List[Tensor]:
        """New memory for a direction; what it holds is arbitrary."""
        return [torch.empty_like(p) for p in self.parameters]

    def of(self, sample: Sample) -> Landscape:
        """Landscape of a batch of N sentences.

        Without per-sentence losses it has one entry: the batch's loss over its sample_size.
        """
        return Landscape(
            weights=self._moved.values(self.parameters),
            losses=partial(self._losses_at, sample),
            gradient=partial(self._gradient, sample),
        )

    def _forward(self, sample: Sample) -> Tensor:
        torch.manual_seed(self._seed)
        random.seed(self._seed)
        np.random.seed(self._seed % 2**32)
        if self.per_sentence:
            return per_sentence_losses(self.criterion, self.model, sample).losses
        loss, sample_size, _ = self.criterion(self.model, sample)
        return (loss / sample_size).reshape(1)

    def _losses_at(self, sample: Sample, write: Optional[Writer]) -> Tensor:
        try:
            if write is not None:
                self._moved.move(self.parameters, write)
            with torch.no_grad():
                return self._forward(sample)
        finally:
            self._moved.restore()

    def _gradient(self, sample: Sample, c: Tensor) -> List[Tensor]:
        with torch.enable_grad():
            losses = self._forward(sample)
            (c.to(losses) * losses).sum().backward()
        grads = []
        for p in self.parameters:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads.append(grad.to_dense() if grad.is_sparse else grad)
            p.grad = None
        return grads


class Batch(NamedTuple):
    """One batch of the split.

    Attributes:
        number: its place in the split, on which its probe's draw depends.
        sentences: how many it holds.
        sample: all of them, on the device.
        alone: the same sentences as batches of one, on the device, made when asked for.
    """

    number: int
    sentences: int
    sample: Sample
    alone: Callable[[], Iterator[Sample]]


class Curves(NamedTuple):
    """Mean loss of a batch along lines through the weights; R distances.

    Attributes:
        sam: along ``eps*``, shape (R,).
        delta_sam: along ``eps'``, shape (R,); None without per-sentence losses.
        random: along k Gaussian directions, the same for all batches, shape (k, R).
    """

    sam: Tensor
    delta_sam: Optional[Tensor]
    random: Tensor


class Sharpness(NamedTuple):
    """Figures of one batch, on the CPU in float64; R radii rho.

    Attributes:
        sentences: how many the batch holds.
        loss: clean mean loss, 0-dim.
        per_batch: SAM's sharpness, shape (R,).
        reweighted: delta-SAM's, shape (R,); None without per-sentence losses.
        cosine: between ``eps*`` and ``eps'``, shape (R,); None without per-sentence losses.
        per_instance: of Eq. 2, shape (R,); None unless asked for.
        curves: None unless asked for.
    """

    sentences: int
    loss: Tensor
    per_batch: Tensor
    reweighted: Optional[Tensor]
    cosine: Optional[Tensor]
    per_instance: Optional[Tensor]
    curves: Optional[Curves]


def measure(
    landscapes: ModelLandscapes,
    batches: Iterable[Batch],
    rhos: Sequence[float],
    beta: float,
    seed: int,
    per_instance: bool = False,
    radii: Sequence[float] = (),
    random_directions: int = 0,
) -> Iterator[Sharpness]:
    """Measure one batch after the other.

    Args:
        landscapes: of the model.
        batches: of the split.
        rhos: radii, each above 0.
        beta: of delta-SAM.
        seed: of probe and random directions.
        per_instance: whether to measure Eq. 2 too, N backward passes a batch.
        radii: distances for the curves; none, no curves.
        random_directions: number of random directions for the curves.

    Returns:
        an iterator over the figures, one a batch.

    Raises:
        UsageError: if per-instance sharpness makes no sense for the criterion.
    """
    direction = landscapes.direction()
    for batch in batches:
        landscape = landscapes.of(batch.sample)
        clean = clean_losses(landscape)
        sam = sam_direction(landscape, clean)
        per_batch = torch.stack([mean_rise(landscape, clean, sam, rho) for rho in rhos])

        delta_sam: List[Tensor] = []
        reweighted, cosines = [], []
        if landscapes.per_sentence:
            for rho in rhos:
                draw_direction_(direction, probe_generator(seed, batch.number, clean.device))
                delta_sam = delta_sam_direction(landscape, clean, direction, rho, beta)
                reweighted.append(mean_rise(landscape, clean, delta_sam, rho))
                cosines.append(cosine(sam, delta_sam))

        curves = None
        if radii:
            lines = []
            for k in range(random_directions):
                # Negative: no batch has this number, so that no probe is drawn again.
                draw_direction_(direction, probe_generator(seed, -1 - k, clean.device))
                lines.append(loss_curve(landscape, direction, radii))
            curves = Curves(
                sam=loss_curve(landscape, sam, radii).cpu(),
                delta_sam=loss_curve(landscape, delta_sam, radii).cpu() if delta_sam else None,
                random=torch.stack(lines).cpu() if lines else torch.zeros(0, len(radii)),
            )
        del sam, delta_sam

        yield Sharpness(
            sentences=batch.sentences,
            loss=clean.mean().cpu(),
            per_batch=per_batch.cpu(),
            reweighted=torch.stack(reweighted).cpu() if reweighted else None,
            cosine=torch.stack(cosines).cpu() if cosines else None,
            per_instance=_per_instance(landscapes, batch, clean, rhos) if per_instance else None,
            curves=curves,
        )


def _per_instance(
    landscapes: ModelLandscapes, batch: Batch, clean: Tensor, rhos: Sequence[float]
) -> Tensor:
    """Mean over a batch's sentences of `per_instance_rises`, shape (R,), on the CPU."""
    alone: List[float] = []
    rises = per_instance_rises(_alone(landscapes, batch, alone), rhos)
    # Sorted: some data sets order the sentences of a batch by length.
    for in_batch, by_itself in zip(sorted(clean.tolist()), sorted(alone)):
        if abs(by_itself - in_batch) > _ALONE_TOLERANCE * max(abs(in_batch), 1.0):
            raise UsageError(
                f"--per-instance: with criterion {type(landscapes.criterion).__name__} a sentence "
                f"has loss {in_batch:g} in its batch and {by_itself:g} alone, so its loss depends "
                "on the others and has no sharpness of its own; drop --per-instance"
            )
    return rises.mean(dim=0).cpu()


def _alone(landscapes: ModelLandscapes, batch: Batch, losses: List[float]) -> Iterator[Landscape]:
    """Landscapes of the sentences alone; appends their clean losses to ``losses``."""
    for sample in batch.alone():
        landscape = landscapes.of(sample)
        losses.append(clean_losses(landscape).sum().item())
        yield landscape
