"""R3F: the model's output is to stay where it is when its input is noised (Aghajanyan et al. 2020).

    L = l(f(x), y) + lambda (KL(f(x) || f(x + z)) + KL(f(x + z) || f(x)))

with ``z`` uniform in [-eps, eps] or normal with standard deviation eps, added to the word
embeddings of all tokens but padding. In regression the divergence is ``(f(x) - f(x + z))^2``.

R4F is R3F with a spectrally normalised classification head, the model's option
--spectral-norm-classification-head.
"""

from dataclasses import dataclass, field
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.dataclass import ChoiceEnum

from deltasam_fairseq.criterions.base import RegularisedLosses, Regulariser, plain_losses
from deltasam_fairseq.criterions.batch import Batch, SameMasks
from deltasam_fairseq.criterions.sentence import SentenceConfig, SentenceCriterion
from deltasam_fairseq.criterions.seq2seq import Seq2SeqConfig, Seq2SeqCriterion
from deltasam_fairseq.options import option

NOISES = ChoiceEnum(["uniform", "normal"])


@dataclass
class R3FOptions:
    """The options of R3F, named as fairseq's own example names them."""

    r3f_lambda: float = option(
        1.0,
        "weight of R3F's divergence; 0: the plain criterion. Paper, GLUE: from {0.1, 0.5, 1, 5}; "
        "delta-SAM paper on RTE: 0.7",
        at_least=0,
    )
    eps: float = option(
        1e-5,
        "size of R3F's noise on word embeddings, in units of their entries: half width of "
        "uniform, standard deviation of normal noise. Paper: 1e-5",
        at_least=0,
    )
    noise_type: NOISES = field(  # type: ignore[valid-type]
        default="uniform", metadata={"help": "distribution of R3F's noise: uniform or normal"}
    )
    same_dropout: bool = field(
        default=False,
        metadata={
            "help": "the noised forward has the dropout masks of the clean one, so that noise "
            "alone makes the divergence. Default, as in the authors' code: masks of its own"
        },
    )


class R3F(Regulariser):
    """``l_j + lambda D(f(x_j), f(x_j + z_j))``: one more forward with graph."""

    TERMS = ("symm_kl",)
    SEVERAL_MASKS = True

    def __init__(self, cfg: Any) -> None:
        self.weight: float = cfg.r3f_lambda
        self.eps: float = cfg.eps
        self.noise_type: str = str(cfg.noise_type)
        self.same_dropout: bool = cfg.same_dropout

    def __call__(self, batch: Batch, sum_only: bool) -> RegularisedLosses:
        if not self.weight:
            return plain_losses(batch)
        noise = batch.noise(self.noise_type, self.eps)
        masks = SameMasks(batch.tokens.device, wanted=self.same_dropout)
        scores = batch.scores()
        masks()
        divergence = batch.objective.divergence(scores, batch.scores(noise))
        losses = batch.objective.losses(scores) + self.weight * divergence
        return RegularisedLosses(losses, scores, {"symm_kl": divergence})


@dataclass
class R3FConfig(SentenceConfig, R3FOptions):
    """R3F on sentence_prediction."""


@dataclass
class Seq2SeqR3FConfig(Seq2SeqConfig, R3FOptions):
    """R3F on label-smoothed cross-entropy; the noise is on the source's embeddings."""


@register_criterion("r3f", dataclass=R3FConfig)
class R3FCriterion(SentenceCriterion):
    """R3F for classification and regression."""

    regulariser_class = R3F
    config_class = R3FConfig


@register_criterion("seq2seq_r3f", dataclass=Seq2SeqR3FConfig)
class Seq2SeqR3FCriterion(Seq2SeqCriterion):
    """R3F for sequence-to-sequence tasks."""

    regulariser_class = R3F
    config_class = Seq2SeqR3FConfig
