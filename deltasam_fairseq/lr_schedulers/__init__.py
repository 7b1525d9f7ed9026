"""Learning-rate schedules with weight averaging, one for every schedule of fairseq."""

from deltasam_fairseq.lr_schedulers.config import SWAConfig, check_swa_config
from deltasam_fairseq.lr_schedulers.register import register_swa_schedulers
from deltasam_fairseq.lr_schedulers.swa import SWAScheduler, check_start

__all__ = [
    "SWAConfig",
    "SWAScheduler",
    "check_start",
    "check_swa_config",
    "register_swa_schedulers",
]
