"""The paper's mathematics: pure functions on tensors, no fairseq, no configuration, no logging."""

from deltasam_fairseq.algorithms.probe import (
    PROBE,
    ROUNDING,
    draw_direction_,
    probe_generator,
    resolvable_radius,
    update_generator,
)
from deltasam_fairseq.algorithms.reweighting import (
    Reweighting,
    guardedness,
    guardedness_sums,
    reweight,
)
from deltasam_fairseq.algorithms.rounding import round_stochastically, unit_roundoff
from deltasam_fairseq.algorithms.sam import (
    Ascent,
    Rounding,
    asam_ascent_,
    global_norm,
    move_along_,
    sam_ascent_,
)

__all__ = [
    "PROBE",
    "ROUNDING",
    "Ascent",
    "Rounding",
    "Reweighting",
    "asam_ascent_",
    "draw_direction_",
    "global_norm",
    "guardedness",
    "guardedness_sums",
    "move_along_",
    "probe_generator",
    "resolvable_radius",
    "reweight",
    "round_stochastically",
    "sam_ascent_",
    "unit_roundoff",
    "update_generator",
]
