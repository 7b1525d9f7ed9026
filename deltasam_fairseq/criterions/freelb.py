"""FreeLB: training along an adversary's ascent on the embeddings (Zhu et al. 2020).

    delta_0     ~ uniform, see `freelb_start`
    delta_{t+1} = project(delta_t + adv_lr g_t / ||g_t||),   g_t the gradient of l(x + delta_t, y)
    L           = 1/K sum_{t < K} l(x + delta_t, y)

Every sentence has a perturbation, norms and a projection of its own. The gradient for the weights
is the mean over the K steps, from the backward passes of the adversary; dropout
masks are the same in all of them.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List

import torch
from fairseq.criterions import register_criterion
from fairseq.dataclass import ChoiceEnum
from torch import Tensor

from deltasam_fairseq.algorithms import freelb_start, normalised, project, sentence_norm
from deltasam_fairseq.criterions.base import (
    PrecomputedGrads,
    RegularisedLosses,
    Regulariser,
    plain_losses,
    trainable,
)
from deltasam_fairseq.criterions.batch import Batch, SameMasks
from deltasam_fairseq.criterions.sentence import SentenceConfig, SentenceCriterion
from deltasam_fairseq.options import option

NORMS = ChoiceEnum(["l2", "linf"])


@dataclass
class FreeLBConfig(SentenceConfig):
    """FreeLB on sentence_prediction; names and units of the authors' code."""

    adv_steps: int = option(
        3,
        "number K of FreeLB's forward and backward passes; 0: the plain criterion. Paper, RoBERTa "
        "large: 2 for MNLI, QNLI, QQP and SST-2, 3 for CoLA, MRPC, RTE and STS-B",
        at_least=0,
    )
    adv_lr: float = option(
        0.03,
        "length of FreeLB's step, in the norm of --adv-norm. Paper: MNLI .1, QNLI .1, QQP .15, "
        "RTE .03, SST-2 .1, MRPC .04, CoLA .025, STS-B .1",
        at_least=0,
    )
    adv_init_mag: float = option(
        0.16,
        "size of FreeLB's random start, 0: none. Paper: MNLI .1, QNLI .1, QQP .32, RTE .16, "
        "SST-2 1, MRPC .64, CoLA .4, STS-B .16",
        at_least=0,
    )
    adv_max_norm: float = option(
        0.14,
        "radius of the ball that FreeLB's perturbation stays in after its first step, 0: no ball. "
        "Paper: MNLI .3, QNLI .2, QQP .62, RTE .14, SST-2 .6, MRPC .4, CoLA .3, STS-B .28",
        at_least=0,
    )
    adv_norm: NORMS = field(  # type: ignore[valid-type]
        default="l2", metadata={"help": "norm of a sentence's perturbation, l2 or linf. Paper: l2"}
    )


class FreeLB(Regulariser):
    """Mean of the losses along the adversary's way: K forwards and backwards."""

    TERMS = ("adv_norm",)
    INNER_BACKWARD = True

    def __init__(self, cfg: Any) -> None:
        self.steps: int = cfg.adv_steps
        self.lr: float = cfg.adv_lr
        self.init_mag: float = cfg.adv_init_mag
        self.max_norm: float = cfg.adv_max_norm
        self.norm = {"l2": 2.0, "linf": math.inf}[str(cfg.adv_norm)]

    def __call__(self, batch: Batch, sum_only: bool) -> RegularisedLosses:
        """Return the mean loss of the K steps.

        With ``sum_only`` the backward of the adversary's ascent frees each step's graph, and one
        step's activations live at a time. Otherwise all K graphs live until the sentences' weights
        are known, for half a backward more a step.
        """
        if not self.steps:
            return plain_losses(batch)
        keep_graph = torch.is_grad_enabled() and not sum_only
        weights = trainable(batch.model) if sum_only else []
        precomputed: Dict[Tensor, Tensor] = {}
        losses: List[Tensor] = []
        mask, zeros = batch.mask, batch.zeros()
        delta = freelb_start(mask, zeros.size(-1), self.init_mag, self.norm, zeros.dtype)
        masks = SameMasks(delta.device)
        for _ in range(self.steps - 1):
            masks()
            with torch.enable_grad():
                delta = delta.detach().requires_grad_()
                step_losses = batch.objective.losses(batch.inner_scores(delta)) / self.steps
                direction, *grads = batch.gradient(step_losses, delta, weights, keep_graph)
            for w, grad in zip(weights, grads):
                if grad is not None:  # not in place: autograd may return one tensor twice
                    precomputed[w] = precomputed[w] + grad if w in precomputed else grad
            losses.append(step_losses if keep_graph else step_losses.detach())
            delta = self._ascended(delta.detach(), direction)
        masks()
        scores = batch.scores(delta)
        losses.append(batch.objective.losses(scores) / self.steps)
        return RegularisedLosses(
            torch.stack(losses).sum(dim=0),
            scores,
            {"adv_norm": sentence_norm(delta, self.norm).view(-1)},
            PrecomputedGrads(list(precomputed), list(precomputed.values()), batch.loss_scale)
            if precomputed
            else None,
        )

    def _ascended(self, delta: Tensor, gradient: Tensor) -> Tensor:
        """``project(delta + adv_lr g / ||g||)``."""
        delta = delta + self.lr * normalised(gradient, self.norm)
        return project(delta, self.max_norm, self.norm) if self.max_norm else delta


@register_criterion("freelb", dataclass=FreeLBConfig)
class FreeLBCriterion(SentenceCriterion):
    """FreeLB for classification and regression."""

    regulariser_class = FreeLB
    config_class = FreeLBConfig
