"""Sharpness-aware fine-tuning for fairseq.

    fairseq-train DATA ... --user-dir deltasam_fairseq --optimizer delta_sam_adam

Importing the package registers the optimizers and schedules with fairseq and puts the trainer, the
checks of the configuration and the safe loading of checkpoints in place. Nothing else is a side
effect.
"""

from deltasam_fairseq import bpe, checkpoints, models, squad  # noqa: F401  registers with fairseq
from deltasam_fairseq.lr_schedulers import register_swa_schedulers
from deltasam_fairseq.optim import register_sharpness_aware_optimizers
from deltasam_fairseq.plugin import install
from deltasam_fairseq.trainer.sharpness_aware import SharpnessAwareTrainer

__version__ = "0.1.0"

__all__ = ["SharpnessAwareTrainer", "__version__"]

register_sharpness_aware_optimizers()
register_swa_schedulers()
checkpoints.install()
install()
