"""TRAM's radius: how far noise on the inputs, or the last update, moves the outputs."""

from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.algorithms import copy_lists_, trust_region_radius
from deltasam_fairseq.core.parts import Radius

PREVIOUS = "previous"  # key of the state: the weights before the last update


class TrustRegion(Radius):
    """d of TRAM-x in place of rho, see `deltasam_fairseq.algorithms.trust_region`.

    One more forward of every micro-batch without graph, and one reduction of two float64 numbers.

    Args:
        rho: radius of a probe, if there is one.
        sigma: standard deviation of the noise, in units of an embedding's entries.
    """

    varies = True
    needs_outputs = True

    def __init__(self, rho: float, sigma: float) -> None:
        super().__init__(rho)
        self.sigma = sigma

    def in_force(self, update: int, passes: Any, perturber: Any = None) -> Tensor:
        sums: Tensor = sum(passes.divergence(i, self.sigma) for i in range(passes.count))
        passes.reduce(sums)
        return trust_region_radius(torch.as_tensor(sums))

    def describe(self) -> str:
        return f"radius of a trust region (TRAM), noise {self.sigma:g}"


class TrustRegionTheta(Radius):
    """d of TRAM-theta in place of rho, see `deltasam_fairseq.algorithms.trust_region`.

    One more forward of every micro-batch without graph, at the weights before the last update and
    under the ascent's dropout masks; one reduction of two float64 numbers; one copy of the weights.
    Before the first update there are no such weights, and d is 0.

    Args:
        rho: radius of a probe, if there is one.
    """

    varies = True
    needs_outputs = True

    def __init__(self, rho: float) -> None:
        super().__init__(rho)
        self._previous: List[Tensor] = []

    def _previous_of(self, params: Sequence[Parameter]) -> List[Tensor]:
        """Return the copy, in place and precision of the weights; none if it is of others."""
        shapes = [v.shape for v in self._previous]
        same = shapes == [p.shape for p in params]
        self._previous = [v.to(p.data) for v, p in zip(self._previous, params)] if same else []
        return self._previous

    def in_force(self, update: int, passes: Any, perturber: Any = None) -> Tensor:
        params = perturber.trained
        previous = self._previous_of(params)
        sums = torch.zeros(2, dtype=torch.float64, device=params[0].device)
        if previous:
            perturber.weights.move(params, lambda out: copy_lists_(out, previous))
            try:
                passes.replay()
                sums = torch.as_tensor(sum(passes.divergence(i) for i in range(passes.count)))
            finally:
                perturber.weights.restore()
            passes.reduce(sums)
        return trust_region_radius(sums)

    def before_step(self, params: Sequence[Parameter]) -> None:
        values = [p.data for p in params]
        if self._previous_of(params):
            copy_lists_(self._previous, values)
        else:
            self._previous = [v.clone() for v in values]

    def state_dict(self) -> Dict[str, Any]:
        return {PREVIOUS: self._previous} if self._previous else {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._previous = state.get(PREVIOUS, [])

    def describe(self) -> str:
        return "radius of a trust region (TRAM-theta)"
