"""The paper's mathematics: pure functions on tensors, no fairseq, no configuration, no logging."""

from deltasam_fairseq.algorithms.probe import draw_direction_, probe_generator
from deltasam_fairseq.algorithms.reweighting import (
    Reweighting,
    guardedness,
    guardedness_sums,
    reweight,
)
from deltasam_fairseq.algorithms.sam import (
    asam_ascent_,
    global_norm,
    move_along_,
    sam_ascent_,
)

__all__ = [
    "Reweighting",
    "asam_ascent_",
    "draw_direction_",
    "global_norm",
    "guardedness",
    "guardedness_sums",
    "move_along_",
    "probe_generator",
    "reweight",
    "sam_ascent_",
]
