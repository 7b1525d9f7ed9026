"""Radii that change from update to update, known before the update."""

from typing import Any, Callable

from deltasam_fairseq.algorithms import rho_along_lr, rho_in_warmup
from deltasam_fairseq.core.parts import Radius


class RhoAlongLR(Radius):
    """rho as large between its bounds as the learning rate, see `rho_along_lr`.

    Args:
        rho, rho_min, lr_max, lr_min: see `rho_along_lr`.
        lr: returns the learning rate of the update to come. A resumed run has the same, as its
            schedule has.
    """

    varies = True

    def __init__(
        self, rho: float, rho_min: float, lr_max: float, lr_min: float, lr: Callable[[], float]
    ) -> None:
        super().__init__(rho)
        self.rho_min, self.lr_max, self.lr_min, self._lr = rho_min, lr_max, lr_min, lr

    def in_force(self, update: int, passes: Any = None, perturber: Any = None) -> float:
        return rho_along_lr(self.rho, self.rho_min, self._lr(), self.lr_max, self.lr_min)

    def active(self, update: int) -> bool:
        return self.in_force(update) > 0

    def describe(self) -> str:
        return f"{super().describe()}, down to {self.rho_min:g} along the learning rate"


class RhoWarmup(Radius):
    """rho that rises linearly, see `rho_in_warmup`.

    Args:
        rho, rho_min, updates: see `rho_in_warmup`.
        start: update that counts as the first.
    """

    varies = True

    def __init__(self, rho: float, rho_min: float, updates: int, start: int) -> None:
        super().__init__(rho)
        self.rho_min, self.updates, self.start = rho_min, updates, start

    def in_force(self, update: int, passes: Any = None, perturber: Any = None) -> float:
        return rho_in_warmup(self.rho, self.rho_min, update - self.start, self.updates)

    def active(self, update: int) -> bool:
        return self.in_force(update) > 0

    def describe(self) -> str:
        return f"{super().describe()}, from {self.rho_min:g} on in {self.updates} updates"
