"""Per-sentence losses of fairseq's criterions."""

from deltasam_fairseq.criterions.per_sentence import (
    PerSentence,
    has_per_sentence_losses,
    per_sentence_losses,
)

__all__ = ["PerSentence", "has_per_sentence_losses", "per_sentence_losses"]
