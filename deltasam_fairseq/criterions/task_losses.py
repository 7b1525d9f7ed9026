"""Compute the loss of a sentence and how far two outputs differ, for each kind of task.

A regulariser is written once, in these terms, and works for every kind of task. The *scores* that
the functions take are what is computed once from a model's output: log-probabilities, or the
predicted numbers.
"""

from typing import Protocol, Tuple

import torch.nn.functional as F
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from torch import Tensor

from deltasam_fairseq.algorithms import (
    at_least_float32,
    kl,
    softened_kl,
    squared_difference,
    sum_tokens,
    symmetric_kl,
)


class Objective(Protocol):
    """What a regulariser needs to know of a task's loss.

    Attributes:
        targets: what the criterion was given to reach; the shape depends on the task.
    """

    targets: Tensor

    def scores(self, logits: Tensor) -> Tensor:
        """Return what the functions below take, from the model's output."""

    def losses(self, scores: Tensor) -> Tensor:
        """Return the loss of every sentence, shape (B,)."""

    def divergence(self, some: Tensor, others: Tensor) -> Tensor:
        """Return the symmetric divergence of every sentence, shape (B,)."""

    def mean_divergence(self, some: Tensor, others: Tensor) -> Tensor:
        """Return the mean of both directions of every sentence, shape (B,)."""

    def directed_divergence(self, some: Tensor, others: Tensor) -> Tensor:
        """Return ``KL(some || others)`` of every sentence, shape (B,)."""

    def distillation_losses(self, teacher: Tensor, scores: Tensor, temperature: float) -> Tensor:
        """Return the distillation loss of every sentence, shape (B,)."""


class ClassObjective:
    """Base of those whose predictions are classes, right or wrong; an `Objective`."""

    def per_sentence(self, values: Tensor) -> Tensor:
        """Reduce figures of single predictions to one of every sentence, shape (B,)."""
        raise NotImplementedError

    def num_correct(self, predicted: Tensor, expected: Tensor) -> Tensor:
        """Return how many predictions of every sentence are right, shape (B,)."""
        raise NotImplementedError

    def divergence(self, some: Tensor, others: Tensor) -> Tensor:
        """Symmetric KL of every sentence, the sum of both directions, shape (B,)."""
        return self.per_sentence(symmetric_kl(some, others))

    def mean_divergence(self, some: Tensor, others: Tensor) -> Tensor:
        """Mean of both directions, shape (B,)."""
        return 0.5 * self.divergence(some, others)

    def directed_divergence(self, some: Tensor, others: Tensor) -> Tensor:
        """``KL(some || others)`` of every sentence, shape (B,)."""
        return self.per_sentence(kl(some, others))

    def distillation_losses(self, teacher: Tensor, scores: Tensor, temperature: float) -> Tensor:
        """``T^2 KL(teacher_T || scores_T)`` of every sentence, shape (B,)."""
        return self.per_sentence(softened_kl(teacher, scores, temperature))


class Classification(ClassObjective):
    """Cross-entropy of classes.

    Args:
        targets: class numbers, shape (B,).
    """

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def scores(self, logits: Tensor) -> Tensor:
        """Log-probabilities, shape (B, classes), of logits of that shape."""
        return F.log_softmax(at_least_float32(logits), dim=-1)

    def losses(self, scores: Tensor) -> Tensor:
        """Cross-entropy of every sentence, shape (B,), in nats."""
        return F.nll_loss(scores, self.targets, reduction="none")

    def per_sentence(self, values: Tensor) -> Tensor:
        """The same figures: a sentence has one prediction."""
        return values

    def num_correct(self, predicted: Tensor, expected: Tensor) -> Tensor:
        """Whether two class numbers are equal, 0 or 1, shape (B,)."""
        return predicted.eq(expected).float()


class Regression:
    """Squared error, summed over a sentence's targets; mostly it has one.

    Args:
        targets: shape (B,), or (B x k,) for k targets a sentence.
    """

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def scores(self, outputs: Tensor) -> Tensor:
        """Predictions, shape (B, k), of outputs of that shape."""
        return at_least_float32(outputs)

    def losses(self, scores: Tensor) -> Tensor:
        """Squared error of every sentence, shape (B,)."""
        return self.divergence(scores, self.targets.view_as(scores).to(scores))

    def divergence(self, some: Tensor, others: Tensor) -> Tensor:
        """Squared difference of every sentence, shape (B,); it has no direction."""
        return squared_difference(some, others).sum(dim=1)

    mean_divergence = divergence
    directed_divergence = divergence

    def distillation_losses(self, teacher: Tensor, scores: Tensor, temperature: float) -> Tensor:
        """Squared difference, shape (B,); a temperature has no meaning here."""
        return self.divergence(teacher, scores)


class LabelSmoothedTokens(ClassObjective):
    """Label-smoothed cross-entropy of target tokens.

    Everything is summed over a sentence's target tokens, in float64; padding adds nothing. Divided
    by the number of target tokens, as fairseq does it, this is the mean over tokens.

    Args:
        targets: shape (B, T).
        padding_idx: what stands for padding in targets.
        smoothing: label smoothing, 0 to 1.
        ignore_prefix_size: number of first target tokens to ignore.
    """

    def __init__(
        self, targets: Tensor, padding_idx: int, smoothing: float, ignore_prefix_size: int = 0
    ) -> None:
        self.ignore_prefix_size = ignore_prefix_size
        self.targets = targets[:, ignore_prefix_size:]
        self.padding_idx = padding_idx
        self.padding = self.targets.eq(padding_idx)
        self.smoothing = smoothing

    def scores(self, logits: Tensor) -> Tensor:
        """Log-probabilities, shape (B, T, vocabulary), of logits of that shape."""
        return F.log_softmax(at_least_float32(logits[:, self.ignore_prefix_size :]), dim=-1)

    def losses_and_nll(self, scores: Tensor) -> Tuple[Tensor, Tensor]:
        """Label-smoothed and plain cross-entropy of every sentence, shape (B,), in nats."""
        losses, nll = label_smoothed_nll_loss(
            scores, self.targets, self.smoothing, ignore_index=self.padding_idx, reduce=False
        )
        return sum_tokens(losses.flatten(1)), sum_tokens(nll.flatten(1))

    def losses(self, scores: Tensor) -> Tensor:
        """Label-smoothed cross-entropy of every sentence, shape (B,), in nats."""
        return self.losses_and_nll(scores)[0]

    def per_sentence(self, values: Tensor) -> Tensor:
        """Sum over a sentence's target tokens, shape (B,)."""
        return sum_tokens(values.masked_fill(self.padding, 0.0))

    def num_correct(self, predicted: Tensor, expected: Tensor) -> Tensor:
        """Number of a sentence's tokens that are equal, shape (B,), of two (B, T)."""
        return predicted.eq(expected).masked_fill(self.padding, False).sum(dim=1).float()
