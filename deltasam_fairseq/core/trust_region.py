"""TRAM's radius: how far the outputs move when the inputs are noised."""

from typing import Any

import torch
from torch import Tensor

from deltasam_fairseq.algorithms import trust_region_radius
from deltasam_fairseq.core.parts import Radius


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

    def in_force(self, update: int, passes: Any) -> Tensor:
        sums: Tensor = sum(passes.divergence(i, self.sigma) for i in range(passes.count))
        passes.reduce(sums)
        return trust_region_radius(torch.as_tensor(sums))

    def describe(self) -> str:
        return f"radius of a trust region (TRAM), noise {self.sigma:g}"
