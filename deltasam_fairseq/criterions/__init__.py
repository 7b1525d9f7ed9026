"""Per-sentence losses of fairseq's criterions, and criterions with a regulariser.

Importing the package registers the criterions plain, r3f, r_drop, freelb, smart, vat and distill,
seq2seq_r3f, seq2seq_r_drop and seq2seq_distill.
"""

from deltasam_fairseq.criterions.base import RegularisedCriterion
from deltasam_fairseq.criterions.distill import DistillCriterion, Seq2SeqDistillCriterion
from deltasam_fairseq.criterions.freelb import FreeLBCriterion
from deltasam_fairseq.criterions.outputs import OutputsAtW, has_loss_of_output
from deltasam_fairseq.criterions.per_sentence import (
    PerSentence,
    has_per_sentence_losses,
    per_sentence_losses,
    require_replay,
    require_same_sum,
)
from deltasam_fairseq.criterions.plain import PlainCriterion
from deltasam_fairseq.criterions.r3f import R3FCriterion, Seq2SeqR3FCriterion
from deltasam_fairseq.criterions.r_drop import RDropCriterion, Seq2SeqRDropCriterion
from deltasam_fairseq.criterions.smart import SMARTCriterion
from deltasam_fairseq.criterions.vat import VATCriterion

__all__ = [
    "DistillCriterion",
    "FreeLBCriterion",
    "OutputsAtW",
    "PerSentence",
    "PlainCriterion",
    "R3FCriterion",
    "RDropCriterion",
    "RegularisedCriterion",
    "SMARTCriterion",
    "Seq2SeqDistillCriterion",
    "Seq2SeqR3FCriterion",
    "Seq2SeqRDropCriterion",
    "VATCriterion",
    "has_loss_of_output",
    "has_per_sentence_losses",
    "per_sentence_losses",
    "require_replay",
    "require_same_sum",
]
