"""No regulariser: fairseq's sentence_prediction, with metrics that work everywhere.

In fairseq 0.12.2 sentence_prediction has no Matthews correlation, F1, Pearson and Spearman; later
it has them, but for labels that are numbers, and as NaN where predictions are constant.
"""

from dataclasses import dataclass

from fairseq.criterions import register_criterion

from deltasam_fairseq.criterions.base import RegularisedLosses, Regulariser, plain_losses
from deltasam_fairseq.criterions.batch import Batch
from deltasam_fairseq.criterions.sentence import SentenceConfig, SentenceCriterion


class NoRegulariser(Regulariser):
    """The task's losses."""

    def __call__(self, batch: Batch, sum_only: bool) -> RegularisedLosses:
        return plain_losses(batch)


@dataclass
class PlainConfig(SentenceConfig):
    """The plain criterion on sentence_prediction."""


@register_criterion("plain", dataclass=PlainConfig)
class PlainCriterion(SentenceCriterion):
    """Cross-entropy or squared error."""

    regulariser_class = NoRegulariser
    config_class = PlainConfig
    loss_of_output = True
