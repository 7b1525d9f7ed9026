"""The paper's mathematics: pure functions on tensors, no fairseq, no configuration, no logging."""

from deltasam_fairseq.algorithms.adversary import (
    freelb_start,
    normalised,
    project,
    sentence_norm,
)
from deltasam_fairseq.algorithms.averaging import (
    STRATEGIES,
    annealed_rate,
    cyclical_rate,
    exponential_mean_,
    running_mean_,
)
from deltasam_fairseq.algorithms.divergence import (
    kl,
    softened_kl,
    squared_difference,
    symmetric_kl,
)
from deltasam_fairseq.algorithms.fisher import largest_mask, masked
from deltasam_fairseq.algorithms.functional import functional_loss
from deltasam_fairseq.algorithms.gibbs import gibbs_factors, gibbs_reweight, largest_size
from deltasam_fairseq.algorithms.gsam import gsam_correct_
from deltasam_fairseq.algorithms.m_sharpness import Part, groups_of
from deltasam_fairseq.algorithms.probe import (
    PROBE,
    ROUNDING,
    SENTENCES,
    TRUST_REGION,
    direction_sum,
    directions,
    draw_direction_,
    fill_direction_,
    probe_generator,
    resolvable_radius,
    update_generator,
)
from deltasam_fairseq.algorithms.reweighting import (
    Reweighting,
    guardedness,
    guardedness_sums,
    reweight,
    sum_tokens,
)
from deltasam_fairseq.algorithms.rho_schedule import rho_along_lr, rho_in_warmup
from deltasam_fairseq.algorithms.rounding import (
    OPERATIONS,
    Kernels,
    StochasticRounding,
    at_least_float32,
    copy_lists_,
    multiplied_in,
    multiplies_in_tf32,
    random_bits,
    unit_roundoff,
)
from deltasam_fairseq.algorithms.sam import (
    Perturbation,
    asam_ascent_,
    global_norm,
    move_along_,
    sam_ascent_,
)
from deltasam_fairseq.algorithms.trust_region import trust_region_radius, trust_region_sums

__all__ = [
    "OPERATIONS",
    "PROBE",
    "ROUNDING",
    "SENTENCES",
    "STRATEGIES",
    "TRUST_REGION",
    "Kernels",
    "Part",
    "Perturbation",
    "Reweighting",
    "StochasticRounding",
    "annealed_rate",
    "asam_ascent_",
    "at_least_float32",
    "copy_lists_",
    "cyclical_rate",
    "direction_sum",
    "directions",
    "draw_direction_",
    "exponential_mean_",
    "fill_direction_",
    "freelb_start",
    "functional_loss",
    "gibbs_factors",
    "gibbs_reweight",
    "global_norm",
    "groups_of",
    "gsam_correct_",
    "guardedness",
    "guardedness_sums",
    "kl",
    "largest_mask",
    "masked",
    "largest_size",
    "move_along_",
    "multiplied_in",
    "multiplies_in_tf32",
    "normalised",
    "probe_generator",
    "project",
    "random_bits",
    "resolvable_radius",
    "reweight",
    "rho_along_lr",
    "rho_in_warmup",
    "running_mean_",
    "sam_ascent_",
    "sentence_norm",
    "softened_kl",
    "squared_difference",
    "sum_tokens",
    "symmetric_kl",
    "trust_region_radius",
    "trust_region_sums",
    "unit_roundoff",
    "update_generator",
]
