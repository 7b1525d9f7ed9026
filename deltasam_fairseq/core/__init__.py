"""Move the weights and order an ascent, for fairseq's trainer and a plain PyTorch loop."""

from deltasam_fairseq.core.ascent import Ascent, AscentFigures
from deltasam_fairseq.core.fisher import FisherMask
from deltasam_fairseq.core.functional import Functional
from deltasam_fairseq.core.gibbs import GibbsWeighting
from deltasam_fairseq.core.gsam import GSAM
from deltasam_fairseq.core.parts import (
    DeltaWeighting,
    Descent,
    Mask,
    Parts,
    Radius,
    Reduce,
    Weighting,
)
from deltasam_fairseq.core.passes import Passes
from deltasam_fairseq.core.perturber import Perturber
from deltasam_fairseq.core.rho_schedule import RhoAlongLR, RhoWarmup
from deltasam_fairseq.core.rng_replay import RngReplay
from deltasam_fairseq.core.trust_region import TrustRegion, TrustRegionTheta
from deltasam_fairseq.core.weights import OverwrittenWeights, SwappedWeights

__all__ = [
    "GSAM",
    "FisherMask",
    "Functional",
    "Ascent",
    "AscentFigures",
    "DeltaWeighting",
    "Descent",
    "GibbsWeighting",
    "Mask",
    "OverwrittenWeights",
    "Parts",
    "Passes",
    "Perturber",
    "Radius",
    "Reduce",
    "RhoAlongLR",
    "RhoWarmup",
    "RngReplay",
    "SwappedWeights",
    "TrustRegion",
    "TrustRegionTheta",
    "Weighting",
]
