"""Choose the parts of a method (`deltasam_fairseq.core.parts`) by its options."""

from typing import Any, Callable, Dict

from deltasam_fairseq.core import (
    GSAM,
    DeltaWeighting,
    Descent,
    Parts,
    Radius,
    RhoAlongLR,
    RhoWarmup,
    Weighting,
)

Lr = Callable[[], float]


def _along_lr(cfg: Any, lr: Lr) -> Radius:
    highest = max(cfg.lr) if cfg.sam_rho_lr_max is None else cfg.sam_rho_lr_max
    return RhoAlongLR(cfg.sam_rho, cfg.sam_rho_min, highest, cfg.sam_rho_lr_min, lr)


# Value of --sam-rho-schedule -> radius, from options and the learning rate of the update to come.
RHO_SCHEDULES: Dict[str, Callable[[Any, Lr], Radius]] = {
    "constant": lambda cfg, lr: Radius(cfg.sam_rho),
    "lr": _along_lr,
    "warmup": lambda cfg, lr: RhoWarmup(
        cfg.sam_rho, cfg.sam_rho_min, cfg.sam_rho_warmup_updates, cfg.sam_start_update
    ),
}


def parts_of(cfg: Any, lr: Lr) -> Parts:
    """Return the parts that the options choose.

    Args:
        cfg: a `SAMConfig` or `DeltaSAMConfig`, checked, with the base optimizer's ``lr``.
        lr: returns the learning rate of the update to come.
    """
    beta = getattr(cfg, "delta_sam_beta", 0.0)
    return Parts(
        RHO_SCHEDULES[str(cfg.sam_rho_schedule)](cfg, lr),
        DeltaWeighting(beta) if beta else Weighting(),
        descent=GSAM(cfg.sam_gsam_alpha) if cfg.sam_gsam_alpha else Descent(),
    )
