"""GSAM's descent: the gradient at w is kept, and corrects the gradient at ``w + eps*``."""

from typing import Dict, Mapping, Sequence, Union

import torch
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.algorithms import gsam_correct_
from deltasam_fairseq.core.parts import Descent


class GSAM(Descent):
    """The step along ``g_p - alpha g_perp``, see `gsam_correct_`; one more gradient is kept.

    Args:
        alpha: above 0.
    """

    corrects = True

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._clean: Dict[Parameter, Tensor] = {}

    def keep(self, params: Sequence[Parameter], divisor: Union[float, Tensor]) -> None:
        # Copies: with --gradient-as-bucket-view the descent's reduction writes to the same memory.
        self._clean = {p: p.grad.clone() for p in params if p.grad is not None}

    @torch.no_grad()
    def correct_(self, grads: Mapping[Parameter, Tensor]) -> None:
        clean, self._clean = self._clean, {}
        aligned = [clean[p] if p in clean else torch.zeros_like(g) for p, g in grads.items()]
        gsam_correct_(list(grads.values()), aligned, self.alpha)

    def describe(self) -> str:
        return f"GSAM, alpha {self.alpha:g}"
