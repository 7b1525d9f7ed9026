"""Registers ``swa_X`` for every learning-rate schedule X that fairseq has."""

import dataclasses
from typing import List

from fairseq.optim.lr_scheduler import (
    LR_SCHEDULER_DATACLASS_REGISTRY,
    LR_SCHEDULER_REGISTRY,
    register_lr_scheduler,
)

from deltasam_fairseq.lr_schedulers.config import SWAConfig
from deltasam_fairseq.lr_schedulers.swa import SWAScheduler

# pass_through leaves the rate to an optimizer with schedules of its own (composite).
NOT_WRAPPED = ("pass_through",)


def register_swa_schedulers() -> List[str]:
    """Register an averaging twin of every schedule that has none yet (manual has no dataclass).

    Returns:
        the names that were registered, such as ``swa_polynomial_decay``.
    """
    names = []
    bases = {
        name: cls
        for name, cls in LR_SCHEDULER_REGISTRY.items()
        if name in LR_SCHEDULER_DATACLASS_REGISTRY
        and name not in NOT_WRAPPED
        and not issubclass(cls, SWAScheduler)
        and f"swa_{name}" not in LR_SCHEDULER_REGISTRY
    }
    for base_name, base_class in bases.items():
        title = "SWA" + "".join(part.capitalize() for part in base_name.split("_"))
        config = dataclasses.make_dataclass(
            f"{title}Config", [], bases=(SWAConfig, LR_SCHEDULER_DATACLASS_REGISTRY[base_name])
        )
        attributes = {
            "base_name": base_name,
            "base_class": base_class,
            "__doc__": f"Averages weights; the learning rate up to then is that of {base_name}.",
            "__module__": __name__,
        }
        name = f"swa_{base_name}"
        register_lr_scheduler(name, dataclass=config)(type(title, (SWAScheduler,), attributes))
        names.append(name)
    return names
