"""TRAM's radius: how far noise on the inputs, or the last update, moves the outputs."""

from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.algorithms import copy_lists_, trust_region_radius
from deltasam_fairseq.core.parts import Radius

# Keys of the state, of pairs of a name and a weight: before the last update, in the last backward.
PREVIOUS, LAST = "before_update", "in_backward"


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
    under the ascent's dropout masks; one reduction of two float64 numbers; one copy of the weights,
    two in a loop that sees no steps, one more while it is made. Before the first update there are
    no such weights, and d is 0.

    Args:
        rho: radius of a probe, if there is one.
    """

    varies = True
    needs_outputs = True

    def __init__(self, rho: float) -> None:
        super().__init__(rho)
        self._previous: List[Tuple[str, Tensor]] = []  # never written to: a state shares them
        self._last: List[Tuple[str, Tensor]] = []

    def in_force(self, update: int, passes: Any, perturber: Any = None) -> Tensor:
        params = list(perturber.trained)
        previous = _fitting(self._previous, perturber.trained)
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

    def before_step(self, params: Dict[Parameter, str]) -> None:
        self._previous = _copy(params)

    def before_backward(self, params: Dict[Parameter, str]) -> None:
        last = _fitting(self._last, params)
        if not last or not all(torch.equal(v, p.data) for v, p in zip(last, params)):
            self._previous = self._last
            self._last = _copy(params)

    def state_dict(self) -> Dict[str, Any]:
        return {k: v for k, v in ((PREVIOUS, self._previous), (LAST, self._last)) if v}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._previous, self._last = state.get(PREVIOUS, []), state.get(LAST, [])

    def describe(self) -> str:
        return "radius of a trust region (TRAM-theta)"


def _copy(params: Dict[Parameter, str]) -> List[Tuple[str, Tensor]]:
    return [(name, p.data.clone()) for p, name in params.items()]


def _fitting(copy: List[Tuple[str, Tensor]], params: Dict[Parameter, str]) -> List[Tensor]:
    """Return a copy in place and precision of the weights; none if it is of others."""
    own = [(name, p.shape) for p, name in params.items()]
    same = own == [(name, v.shape) for name, v in copy]
    return [v.to(p.data) for (_, v), p in zip(copy, params)] if same else []
