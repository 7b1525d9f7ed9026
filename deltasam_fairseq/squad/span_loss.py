"""The loss of a span, in the terms of `deltasam_fairseq.criterions.task_losses`."""

import torch.nn.functional as F
from torch import Tensor

from deltasam_fairseq.algorithms import at_least_float32
from deltasam_fairseq.criterions.task_losses import ClassObjective

# Logit of what cannot be; finite, so that a divergence of two such is 0 and not NaN.
_IMPOSSIBLE = -1e30


class Span(ClassObjective):
    """Cross-entropy of the first and the last token of an answer, the mean of both.

    Args:
        targets: positions of both, shape (B, 2).
        allowed: where they may lie, shape (B, T).
    """

    def __init__(self, targets: Tensor, allowed: Tensor) -> None:
        self.targets = targets
        self.forbidden = ~allowed.unsqueeze(1)

    def scores(self, logits: Tensor) -> Tensor:
        """Log-probabilities of start and end, shape (B, 2, T), of logits of shape (B, T, 2)."""
        logits = at_least_float32(logits).transpose(1, 2)
        return F.log_softmax(logits.masked_fill(self.forbidden, _IMPOSSIBLE), dim=-1)

    def losses(self, scores: Tensor) -> Tensor:
        """Cross-entropy of every window, shape (B,), in nats."""
        return -scores.gather(2, self.targets.unsqueeze(2)).mean(dim=(1, 2))

    def per_sentence(self, values: Tensor) -> Tensor:
        """Mean of start and end, shape (B,)."""
        return values.mean(dim=1)

    def num_correct(self, predicted: Tensor, expected: Tensor) -> Tensor:
        """How many of start and end are equal, shape (B,), of two (B, 2)."""
        return predicted.eq(expected).sum(dim=1).float()
