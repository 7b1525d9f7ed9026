"""Sharpness of a trained checkpoint: ``python -m deltasam_fairseq.sharpness``."""

from deltasam_fairseq.sharpness.landscapes import Curves, ModelLandscapes, Sharpness, measure

__all__ = ["Curves", "ModelLandscapes", "Sharpness", "measure"]
