"""The ascent of an update, in any training loop: move the weights along the gradient at w.

    SAM         gradient of the batch loss
    delta-SAM   clean losses, losses at the probe, weights of the sentences (Eq. 3 to 6), gradient
                of the weighted loss
    both        reduced over ranks; w -> w + eps*

This module orders the steps; `Passes` has the loop's forwards and backwards, `Parts` the method,
`Perturber` moves the weights.
"""

from dataclasses import dataclass, field
from typing import Callable, List, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.algorithms import Reweighting, guardedness
from deltasam_fairseq.core.passes import Forward, Passes
from deltasam_fairseq.core.perturber import Perturber


@dataclass
class AscentFigures:
    """What an ascent found.

    Attributes:
        reweighting: the weights of the sentences, None for SAM.
        probe_radius: of the probe, 0-dim float64; None for SAM.
        weights_divisor: by which the backward divided the sentences' weights.
        gnorm: norm of the summed ascent gradient, without loss scale.
        realised: share of the ascent that survived rounding, None without rounding.
        mask_share: share of the weights that moved, where a mask chooses them.
        rho: in force, where it is not the same in every update.
    """

    reweighting: Optional[Reweighting] = None
    probe_radius: Optional[Tensor] = None
    weights_divisor: Union[float, Tensor] = 1.0
    gnorm: Tensor = field(init=False)
    realised: Optional[Tensor] = None
    mask_share: Optional[Tensor] = None
    rho: Optional[Union[float, Tensor]] = None


class Ascent:
    """Moves a model to ``w + eps*`` of a batch; all forwards see the same dropout masks.

    Args:
        perturber: moves the weights.
        parameters: returns the weights to perturb, in the same order on every process.
    """

    def __init__(self, perturber: Perturber, parameters: Callable[[], List[Parameter]]) -> None:
        self._perturber = perturber
        self._parameters = parameters

    def run(self, passes: Passes[Forward], seed: int, update: int) -> AscentFigures:
        """``w -> w + eps*``, along the reduced gradient of the (reweighted) batch loss at w.

        Args:
            passes: over this process's micro-batches; no weight holds a gradient.
            seed, update: what the random numbers of an update depend on.
        """
        perturber, params = self._perturber, self._parameters()
        parts, figures = perturber.parts, AscentFigures()
        with passes.freeze_others():
            parts.mask.begin(update, passes, params)
            if parts.weighting.probes:
                self._backward_weighted(passes, (seed, update), figures)
            else:
                self._backward_uniform(passes)
        passes.average_grads()
        parts.descent.keep(params, figures.weights_divisor)
        perturber.rho = parts.radius.in_force(update, passes, perturber)
        ascent = perturber.ascend(params, seed, update)
        figures.mask_share = parts.mask.share
        figures.rho = perturber.rho if parts.radius.varies else None
        figures.gnorm = ascent.norm * figures.weights_divisor / passes.scale
        figures.realised = ascent.realised if perturber.half_dtype is not None else None
        return figures

    def _backward_uniform(self, passes: Passes[Forward]) -> None:
        """Gradient of the batch loss, as the loop computes it."""
        passes.replay()
        for i in range(passes.count):
            with passes.no_sync_unless_last(last=i == passes.count - 1):
                passes.backward_batch_loss(i)

    def _backward_weighted(
        self, passes: Passes[Forward], draw: Tuple[int, int], figures: AscentFigures
    ) -> None:
        """Gradient of ``sum_j p_j l_j``."""
        perturber = self._perturber
        if passes.count == 1 or passes.partial or not perturber.probes_centrally:
            # A clean forward comes first: otherwise the probe would wait for the one thread.
            perturber.draw_ahead(self._parameters(), *draw)
        if passes.partial:
            self._backward_of_chosen(passes, draw, figures)
        elif passes.count == 1:
            self._backward_through_clean_forward(passes, draw, figures)
        else:
            self._backward_after_reweighting(passes, draw, figures)

    def _backward_through_clean_forward(
        self, passes: Passes[Forward], draw: Tuple[int, int], figures: AscentFigures
    ) -> None:
        """One micro-batch: the clean forward of Eq. 3 keeps its graph, for the backward."""
        passes.replay()
        with passes.no_sync_unless_last(last=True):
            clean = passes.forward(0)
            losses = passes.losses(clean)
            (weights,) = self._reweight(passes, [losses], draw, figures)
            passes.backward((weights.to(losses) * losses).sum())
        passes.log(0, clean)

    def _backward_after_reweighting(
        self, passes: Passes[Forward], draw: Tuple[int, int], figures: AscentFigures
    ) -> None:
        """Several: the weights of the first depend on the last, and are known before any graph."""
        clean = None if self._perturber.probes_centrally else _losses(passes, _forwards(passes))
        weights_of = self._reweight(passes, clean, draw, figures)
        passes.replay()
        for i, weights in enumerate(weights_of):
            with passes.no_sync_unless_last(last=i == passes.count - 1):
                found = passes.forward(i)
                losses = passes.losses(found)
                passes.backward((weights.to(losses) * losses).sum())
            passes.log(i, found)

    def _backward_of_chosen(
        self, passes: Passes[Forward], draw: Tuple[int, int], figures: AscentFigures
    ) -> None:
        """The same over some sentences of every micro-batch, known after the probe.

        The weights are those among all sentences, and so are the figures for the log.
        """
        clean = _forwards(passes)
        weights_of = self._reweight(passes, _losses(passes, clean), draw, figures)
        passes.replay()
        for i, weights in enumerate(weights_of):
            kept = passes.chosen(weights)
            with passes.no_sync_unless_last(last=i == passes.count - 1):
                losses = passes.losses(passes.forward(i, kept))
                passes.backward((weights[kept].to(losses) * losses).sum())
            passes.log(i, clean[i])

    def _reweight(
        self,
        passes: Passes[Forward],
        clean: Optional[List[Tensor]],
        draw: Tuple[int, int],
        figures: AscentFigures,
    ) -> List[Tensor]:
        """Probe (Eq. 3), then weigh this process's sentences in the global batch (Eq. 4 to 6).

        Args:
            clean: losses at w, one tensor a micro-batch; a central difference does not need them.
            figures: receive the `Reweighting` and the radius of the probe.

        Returns:
            ``N p_j / figures.weights_divisor``, one tensor a micro-batch; 0 for a dummy.
        """
        perturber = self._perturber
        rises, radius = self._probe(passes, clean, draw)
        with torch.autograd.profiler.record_function("sam-reweight"):
            real = [rise[: 0 if passes.is_dummy(i) else None] for i, rise in enumerate(rises)]
            a = torch.cat(real) * (perturber.parts.radius.rho / radius)
            found = perturber.parts.weighting.weigh(a, passes.reduce)
            figures.reweighting, figures.probe_radius = found, radius
            if perturber.half_dtype is not None:
                # eps* does not depend on the size of the weights; fp16 gradients overflow by it.
                figures.weights_divisor = found.divisor
            weights = (found.weights / figures.weights_divisor).split([len(x) for x in real])
            return [w if len(w) else torch.zeros_like(rise) for w, rise in zip(weights, rises)]

    def _probe(
        self, passes: Passes[Forward], clean: Optional[List[Tensor]], draw: Tuple[int, int]
    ) -> Tuple[List[Tensor], Tensor]:
        """Guardedness ``a_j`` at the probe's radius, one tensor a micro-batch; the radius."""
        perturber, probed = self._perturber, []
        for sign in perturber.probe_signs:
            radius = perturber.probe(self._parameters(), *draw, sign)
            try:
                probed.append(_losses(passes, _forwards(passes)))
            finally:
                perturber.weights.restore()
        if perturber.probes_centrally:
            ahead, behind = probed
            rises = [guardedness(b, a) / 2 for a, b in zip(ahead, behind)]
        else:
            assert clean is not None
            rises = [guardedness(c, p) for c, p in zip(clean, probed[0])]
        return rises, radius


@torch.no_grad()
def _forwards(passes: Passes[Forward]) -> List[Forward]:
    """Return a forward of every micro-batch, without graph."""
    passes.replay()
    return [passes.forward(i) for i in range(passes.count)]


def _losses(passes: Passes[Forward], forwards: List[Forward]) -> List[Tensor]:
    return [passes.losses(forward) for forward in forwards]
