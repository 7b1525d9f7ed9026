"""RW-SAM's weights of the sentences, as a part of an update."""

from typing import List

from torch import Tensor

from deltasam_fairseq.algorithms import Reweighting, gibbs_factors, gibbs_reweight, largest_size
from deltasam_fairseq.core.parts import Reduce, Weighting


class GibbsWeighting(Weighting):
    """RW-SAM's (Luo et al. 2025): ``N p_i``, see `deltasam_fairseq.algorithms.gibbs`.

    Args:
        lambda_: log of the weight of the most sensitive sentence over that of one that is not
            sensitive, above 0.
    """

    probes = True
    name = "RW-SAM"

    def __init__(self, lambda_: float) -> None:
        self.lambda_ = lambda_

    def describe(self) -> str:
        return f"lambda {self.lambda_:g}"

    def shape_direction_(self, u: List[Tensor]) -> None:
        """Make a Rademacher vector: the signs of ``u``."""
        for tensor in u:  # _foreach_sign_ came with torch 2.1
            tensor.sign_()

    def weigh(self, a: Tensor, reduce: Reduce) -> Reweighting:
        """See `gibbs_reweight`; a reduction of one float64 number, by maximum, and one of two."""
        largest = largest_size(a)
        reduce(largest, op="max")
        factors, sums = gibbs_factors(a, largest, self.lambda_)
        reduce(sums)
        return gibbs_reweight(factors, sums)
