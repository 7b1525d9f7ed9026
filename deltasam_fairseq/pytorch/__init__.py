"""SAM, delta-SAM and their relatives for a plain PyTorch loop, without fairseq."""

from deltasam_fairseq.pytorch.sharpness_aware import METHODS, SharpnessAware

__all__ = ["METHODS", "SharpnessAware"]
