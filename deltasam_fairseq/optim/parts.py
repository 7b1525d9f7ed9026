"""Choose the parts of a method (`deltasam_fairseq.core.parts`) by its options."""

from typing import Any, Callable, Dict, Optional

from deltasam_fairseq.core import (
    GSAM,
    DeltaWeighting,
    Descent,
    FisherMask,
    Functional,
    GibbsWeighting,
    Mask,
    Parts,
    Radius,
    RhoAlongLR,
    RhoWarmup,
    TrustRegion,
    TrustRegionTheta,
    Weighting,
)
from deltasam_fairseq.optim.config import weights_strength
from deltasam_fairseq.options import require

Lr = Callable[[], float]


def _along_lr(cfg: Any, lr: Lr) -> Radius:
    highest = max(cfg.lr) if cfg.sam_rho_lr_max is None else cfg.sam_rho_lr_max
    remedy = f"must be below the largest learning rate, {highest:g}, where rho is --sam-rho"
    require(cfg.sam_rho_lr_min < highest, "sam_rho_lr_min", cfg.sam_rho_lr_min, remedy)
    return RhoAlongLR(cfg.sam_rho, cfg.sam_rho_min, highest, cfg.sam_rho_lr_min, lr)


# Value of --sam-rho-schedule -> radius, from options and the learning rate of the update to come.
RHO_SCHEDULES: Dict[str, Callable[[Any, Lr], Radius]] = {
    "constant": lambda cfg, lr: Radius(cfg.sam_rho),
    "lr": _along_lr,
    "warmup": lambda cfg, lr: RhoWarmup(
        cfg.sam_rho, cfg.sam_rho_min, cfg.sam_rho_warmup_updates, cfg.sam_start_update
    ),
}

# Value of --delta-sam-weights -> weights of the sentences, from what scales them, above 0.
WEIGHTINGS: Dict[str, Callable[[float], Weighting]] = {
    "linear": DeltaWeighting,
    "gibbs": GibbsWeighting,
}

# Value of --sam-radius -> radius, likewise.
RADII: Dict[str, Callable[[Any, Lr], Radius]] = {
    "rho": lambda cfg, lr: RHO_SCHEDULES[str(cfg.sam_rho_schedule)](cfg, lr),
    "trust_region": lambda cfg, lr: TrustRegion(cfg.sam_rho, cfg.sam_trust_sigma),
    "trust_region_theta": lambda cfg, lr: TrustRegionTheta(cfg.sam_rho),
}

# Value of --sam-mask -> mask.
MASKS: Dict[str, Callable[[Any], Mask]] = {
    "none": lambda cfg: Mask(),
    "fisher": lambda cfg: FisherMask(cfg.sam_mask_share, cfg.sam_mask_every),
}


def _descent(cfg: Any) -> Descent:
    if cfg.sam_functional:
        return Functional()
    return GSAM(cfg.sam_gsam_alpha) if cfg.sam_gsam_alpha else Descent()


def parts_of(cfg: Any, lr: Lr) -> Parts:
    """Return the parts that the options choose.

    Args:
        cfg: a `SAMConfig` or `DeltaSAMConfig`, checked, with the base optimizer's ``lr``.
        lr: returns the learning rate of the update to come.
    """
    strength = weights_strength(cfg)
    return Parts(
        RADII[str(cfg.sam_radius)](cfg, lr),
        WEIGHTINGS[str(cfg.delta_sam_weights)](strength) if strength else Weighting(),
        MASKS[str(cfg.sam_mask)](cfg),
        _descent(cfg),
    )


def eta_of(cfg: Any) -> Optional[float]:
    """Return eta of ASAM, 0 for TRAM's ``T = |w|``; None for SAM."""
    if str(cfg.sam_radius) != "rho":
        return 0.0
    return cfg.sam_eta if cfg.sam_adaptive else None
