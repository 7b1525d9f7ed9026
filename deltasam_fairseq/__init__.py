"""Sharpness-aware fine-tuning for fairseq, and for a plain PyTorch loop.

    fairseq-train DATA ... --user-dir deltasam_fairseq --optimizer delta_sam_adam
    from deltasam_fairseq.pytorch import SharpnessAware

Where fairseq is installed, importing the package registers its components with fairseq and patches
fairseq, see `plugin`. Nothing else is a side effect.
"""

import sys
import warnings
from importlib.util import find_spec

__version__ = "0.1.0"

__all__ = ["__version__"]

_spec = find_spec("fairseq")
if _spec is not None and _spec.origin is not None:  # a plain folder of that name has none
    _in_fairseq = "fairseq" in sys.modules  # --user-dir
    try:
        from deltasam_fairseq.plugin import install
        from deltasam_fairseq.trainer.sharpness_aware import SharpnessAwareTrainer
    except Exception as e:  # fairseq 0.12 raises ValueError on Python 3.11
        if _in_fairseq:
            raise
        warnings.warn(
            f"fairseq cannot be imported ({type(e).__name__}: {e}); deltasam_fairseq.pytorch works,"
            " --user-dir deltasam_fairseq does not",
            stacklevel=2,
        )
    else:
        __all__ += ["SharpnessAwareTrainer"]
        install()
