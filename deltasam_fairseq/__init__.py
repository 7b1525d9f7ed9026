"""Sharpness-aware fine-tuning for fairseq.

    fairseq-train DATA ... --user-dir deltasam_fairseq --optimizer delta_sam_adam

Importing the package registers its components with fairseq and patches fairseq, see `plugin`.
Nothing else is a side effect.
"""

from deltasam_fairseq.plugin import install
from deltasam_fairseq.trainer.sharpness_aware import SharpnessAwareTrainer

__version__ = "0.1.0"

__all__ = ["SharpnessAwareTrainer", "__version__"]

install()
