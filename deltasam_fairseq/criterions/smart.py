"""SMART: smoothness-inducing adversarial regularisation and Bregman proximal points (Jiang et al.).

    L = l(f(x), y) + lambda max_{||d||_inf <= eps} D(f(x + d), f(x)) + mu D(f(x), f~(x))

with D the symmetric KL (sum of both directions), in regression the squared difference. The maximum
is sought from ``d = sigma N(0, I)`` by steps

    d <- clamp(d + step_size g / ||g||_inf, -eps, eps),   g the gradient of D(f(x + d), f(x))

and f~ is the model with the average weights ``w~ <- m w~ + (1 - m) w`` of the updates so far, with
m small at first and larger later (MBPP, section 3.2 of the paper). Norms are a sentence's own.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, Optional

import torch
from fairseq.criterions import register_criterion
from omegaconf import II
from torch import Tensor, nn

from deltasam_fairseq.algorithms import project
from deltasam_fairseq.criterions.base import RegularisedLosses, Regulariser, Weights
from deltasam_fairseq.criterions.batch import Batch, SameMasks
from deltasam_fairseq.criterions.sentence import SentenceConfig, SentenceCriterion
from deltasam_fairseq.options import option


@dataclass
class SMARTConfig(SentenceConfig):
    """SMART on sentence_prediction; defaults of the paper, section 4.1."""

    smart_lambda: float = option(
        1.0, "weight of SMART's adversarial term, 0: none. Paper: from {1, 3, 5}", at_least=0
    )
    smart_eps: float = option(
        1e-5, "largest entry of SMART's perturbation of the embeddings. Paper: 1e-5", above=0
    )
    smart_sigma: float = option(
        1e-5, "standard deviation of SMART's random start. Paper: 1e-5", above=0
    )
    smart_step_size: float = option(
        1e-3, "length of SMART's ascent step, largest entry. Paper: 1e-3", above=0
    )
    smart_steps: int = option(1, "number of SMART's ascent steps. Paper: 1", at_least=0)
    smart_mu: float = option(
        1.0,
        "weight of SMART's Bregman proximal term, the divergence from the model with averaged "
        "weights; 0: none, and no copy of the weights. Paper: 1",
        at_least=0,
    )
    smart_momentum: float = option(
        0.99, "momentum of SMART's average of weights, at first. Paper: .99", at_least=0, at_most=1
    )
    smart_late_momentum: float = option(
        0.999, "momentum of SMART's average of weights later. Paper: .999", at_least=0, at_most=1
    )
    smart_switch: float = option(
        0.1,
        "when SMART's later momentum begins: a number of updates, or below 1 a share of "
        "--max-update. Paper: a tenth of all updates",
        at_least=0,
    )
    same_dropout: bool = field(
        default=False,
        metadata={
            "help": "all forwards of a batch have the dropout masks of the clean one. Default, as "
            "in the authors' code: masks of their own"
        },
    )
    max_update: int = II("optimization.max_update")


class SMART(Regulariser):
    """Adversarial and proximal term: one more forward with graph, one without for the proximal
    term, and for each step a forward with the half of a backward that reaches the embeddings."""

    TERMS = ("smart_adversarial", "smart_bregman")
    INNER_BACKWARD = True
    SEVERAL_MASKS = True

    def __init__(self, cfg: Any) -> None:
        self.weight: float = cfg.smart_lambda
        self.eps: float = cfg.smart_eps
        self.sigma: float = cfg.smart_sigma
        self.step_size: float = cfg.smart_step_size
        self.steps: int = cfg.smart_steps
        self.mu: float = cfg.smart_mu
        self.momentum: float = cfg.smart_momentum
        self.late_momentum: float = cfg.smart_late_momentum
        self.switch: float = cfg.smart_switch * (1 if cfg.smart_switch >= 1 else cfg.max_update)
        self.same_dropout: bool = cfg.same_dropout
        self._update = 0
        self._averages: Optional[Dict[str, Tensor]] = None
        self._teacher: Optional[Dict[str, Tensor]] = None

    def __call__(self, batch: Batch, sum_only: bool) -> RegularisedLosses:
        masks = SameMasks(batch.tokens.device, wanted=self.same_dropout)
        objective, scores = batch.objective, batch.scores()
        losses, terms = objective.losses(scores), {}
        if self.mu:
            if self._teacher is None:
                raise RuntimeError(
                    "--criterion smart with --smart-mu: the averaged weights are kept by this "
                    "plugin's trainer, which is not in place; run fairseq-train with --user-dir "
                    "deltasam_fairseq, or set --smart-mu 0"
                )
            masks()
            bregman = objective.divergence(scores, batch.scores_with(self._teacher))
            losses = losses + self.mu * bregman
            terms["smart_bregman"] = bregman
        if self.weight:
            delta = self._adversary(batch, scores.detach(), masks)
            masks()
            adversarial = objective.divergence(batch.scores(delta), scores)
            losses = losses + self.weight * adversarial
            terms["smart_adversarial"] = adversarial
        return RegularisedLosses(losses, scores, terms)

    def _adversary(self, batch: Batch, scores: Tensor, masks: SameMasks) -> Tensor:
        """The perturbation under which the outputs differ most from ``scores``."""
        delta = batch.noise("normal", self.sigma)
        for _ in range(self.steps):
            masks()
            with torch.enable_grad():
                delta = delta.detach().requires_grad_()
                divergence = batch.objective.divergence(batch.inner_scores(delta), scores)
                ascent = batch.direction(divergence, delta, math.inf)
            delta = project(delta.detach() + self.step_size * ascent, self.eps, math.inf)
        return delta

    # The average of weights

    def before_update(self, model: nn.Module, weights: Weights, update: int) -> None:
        self._update = update
        if not self.mu or self._teacher is not None:
            return
        known = weights() if self._averages is None else self._averages
        params = dict(model.named_parameters())
        self._averages = {
            name: value.detach().to(
                device=params[name].device,
                dtype=torch.promote_types(params[name].dtype, torch.float32),
                copy=True,
            )
            for name, value in known.items()
        }
        # In float32 the very averages; in half precision a copy that the forward can use.
        self._teacher = {name: a.to(params[name].dtype) for name, a in self._averages.items()}

    def after_update(self, weights: Weights) -> None:
        if self._averages is None or self._teacher is None:
            return
        new, m = weights(), self.late_momentum if self._update >= self.switch else self.momentum
        for name, average in self._averages.items():
            average.lerp_(new[name].to(average), 1 - m)
            if self._teacher[name] is not average:
                self._teacher[name].copy_(average)

    def state_dict(self) -> Dict[str, Any]:
        return {"averages": self._averages} if self.mu and self._averages else {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._averages, self._teacher = state.get("averages") if self.mu else None, None


@register_criterion("smart", dataclass=SMARTConfig)
class SMARTCriterion(SentenceCriterion):
    """SMART for classification and regression."""

    regulariser_class = SMART
    config_class = SMARTConfig

    @classmethod
    def check(cls, cfg: Any) -> None:
        super().check(cfg)
        if cfg.smart_mu and 0 < cfg.smart_switch < 1 and not getattr(cfg, "max_update", 0):
            raise ValueError(
                f"--smart-switch {cfg.smart_switch}: a share of --max-update, which is not set; "
                "set it, or give --smart-switch as a number of updates"
            )
