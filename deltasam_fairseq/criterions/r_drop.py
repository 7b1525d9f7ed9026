"""R-Drop: two forwards with different dropout masks are to agree (Liang et al. 2021).

    L = (l(f_1(x), y) + l(f_2(x), y)) / 2 + alpha (KL(f_1 || f_2) + KL(f_2 || f_1)) / 2

In regression the second term is ``alpha (f_1(x) - f_2(x))^2``. The paper writes the sum of the two
cross-entropies, twice this one: its alpha is twice the one here. Its GLUE code takes the mean.
"""

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion

from deltasam_fairseq.criterions.base import RegularisedLosses, Regulariser, plain_losses
from deltasam_fairseq.criterions.batch import Batch
from deltasam_fairseq.criterions.sentence import SentenceConfig, SentenceCriterion
from deltasam_fairseq.criterions.seq2seq import Seq2SeqConfig, Seq2SeqCriterion
from deltasam_fairseq.options import option


@dataclass
class RDropOptions:
    """The option of R-Drop."""

    r_drop_alpha: float = option(
        1.0,
        "weight of R-Drop's divergence, beside the mean of the two task losses; 0: the plain "
        "criterion, with one forward. GLUE: from {0.1, 0.5, 1}; translation: 2.5 is the paper's 5",
        at_least=0,
    )


class RDrop(Regulariser):
    """Mean of two losses and their divergence: one more forward with graph."""

    TERMS = ("r_drop_kl",)
    SEVERAL_MASKS = True

    def __init__(self, cfg: Any) -> None:
        self.alpha: float = cfg.r_drop_alpha

    def __call__(self, batch: Batch, sum_only: bool) -> RegularisedLosses:
        if not self.alpha:
            return plain_losses(batch)
        first, second, objective = batch.scores(), batch.scores(), batch.objective
        divergence = objective.mean_divergence(first, second)
        task_losses = 0.5 * (objective.losses(first) + objective.losses(second))
        return RegularisedLosses(
            task_losses + self.alpha * divergence, first, {"r_drop_kl": divergence}
        )


@dataclass
class RDropConfig(SentenceConfig, RDropOptions):
    """R-Drop on sentence_prediction."""


@dataclass
class Seq2SeqRDropConfig(Seq2SeqConfig, RDropOptions):
    """R-Drop on label-smoothed cross-entropy."""


@register_criterion("r_drop", dataclass=RDropConfig)
class RDropCriterion(SentenceCriterion):
    """R-Drop for classification and regression."""

    regulariser_class = RDrop
    config_class = RDropConfig


@register_criterion("seq2seq_r_drop", dataclass=Seq2SeqRDropConfig)
class Seq2SeqRDropCriterion(Seq2SeqCriterion):
    """R-Drop for sequence-to-sequence tasks."""

    regulariser_class = RDrop
    config_class = Seq2SeqRDropConfig
