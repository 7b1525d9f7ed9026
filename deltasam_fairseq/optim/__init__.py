"""fairseq optimizers that take an ascent step first, one for every base optimizer of fairseq."""

from deltasam_fairseq.optim.config import DeltaSAMConfig, SAMConfig
from deltasam_fairseq.optim.register import register_sharpness_aware_optimizers
from deltasam_fairseq.optim.sharpness_aware import (
    SharpnessAwareOptimizer,
    gradients_of_masters,
    gradients_to_step_along,
    masters_of,
    sharpness_aware,
)

__all__ = [
    "DeltaSAMConfig",
    "SAMConfig",
    "SharpnessAwareOptimizer",
    "gradients_of_masters",
    "gradients_to_step_along",
    "masters_of",
    "register_sharpness_aware_optimizers",
    "sharpness_aware",
]
