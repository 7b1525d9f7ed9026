"""Sharpness-aware fine-tuning for fairseq, and for a plain PyTorch loop.

    fairseq-train DATA ... --user-dir deltasam_fairseq --optimizer delta_sam_adam
    from deltasam_fairseq.pytorch import SharpnessAware

Where fairseq is installed, importing the package registers its components with fairseq and patches
fairseq, see `plugin`. Nothing else is a side effect.
"""

from importlib.util import find_spec

__version__ = "0.1.0"

__all__ = ["__version__"]

if find_spec("fairseq") is not None:
    from deltasam_fairseq.plugin import install
    from deltasam_fairseq.trainer.sharpness_aware import SharpnessAwareTrainer

    __all__ += ["SharpnessAwareTrainer"]
    install()
