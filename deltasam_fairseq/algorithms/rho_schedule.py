"""Choose the radius rho of an update: along the learning rate, or warmed up.

Zhuang et al. 2022, "Surrogate Gap Minimization Improves Sharpness-Aware Training" (GSAM),
Algorithm 1: rho follows the schedule of the learning rate.
"""


def rho_along_lr(
    rho: float, rho_min: float, lr: float, lr_max: float, lr_min: float = 0.0
) -> float:
    """Return rho of an update whose learning rate is ``lr``.

    ``rho_t = rho_min + (rho - rho_min) (lr_t - lr_min) / (lr_max - lr_min)``

    Args:
        rho: at ``lr_max``, at least ``rho_min``; L2 norm in weight space.
        rho_min: at ``lr_min``.
        lr: of the update. Outside of [lr_min, lr_max] it counts as the nearer end, so that rho is
            never below rho_min; the paper has no such case.
        lr_max, lr_min: the largest and smallest learning rate of the run; if they are equal, rho
            is constant.

    Returns:
        rho_t; ``rho`` where rho_min is rho.
    """
    if lr_max <= lr_min:
        return rho
    share = (lr - lr_min) / (lr_max - lr_min)
    return rho_min + (rho - rho_min) * min(max(share, 0.0), 1.0)


def rho_in_warmup(rho: float, rho_min: float, update: int, updates: int) -> float:
    """Return rho of an update, which rises linearly from rho_min to rho and stays there.

    ``rho_t = rho_min + (rho - rho_min) min(1, t / T)``

    Args:
        rho, rho_min: as in `rho_along_lr`.
        update: t, number of updates done.
        updates: T, at least 0; 0 gives rho at once.
    """
    return rho if update >= updates else rho_min + (rho - rho_min) * update / updates
