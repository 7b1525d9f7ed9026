"""From scores of tokens to answers: the best span of a window, the best window of a question."""

from typing import Any, Dict, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_NEVER = float("-inf")


class Spans(NamedTuple):
    """The best span of each of B windows.

    Attributes:
        start, end: positions of its first and its last token in the window, shape (B,).
        score: log-probability of start plus that of end, shape (B,); -inf where the window holds
            no token at which an answer may start.
        null: the same of "no answer here", which is the position 0, shape (B,).
    """

    start: Tensor
    end: Tensor
    score: Tensor
    null: Tensor


def context_mask(window: Dict[str, Tensor], length: int) -> Tensor:
    """Where a window has its part of the context, shape (B, length).

    Args:
        window: with ``begin`` and ``stop``, the positions of the context's first token and of the
            one behind its last, shape (B,).
    """
    positions = torch.arange(length, device=window["begin"].device)
    return (positions >= window["begin"].unsqueeze(1)) & (positions < window["stop"].unsqueeze(1))


def best_spans(scores: Tensor, window: Dict[str, Tensor], max_answer_length: int) -> Spans:
    """Return the spans of the highest score, over all of at most ``max_answer_length`` tokens.

        argmax over s <= e < s + max_answer_length of  log p_start(s) + log p_end(e)

    Where windows overlap, a span belongs to the one in which its first token has the most context
    on both sides (Devlin et al. 2019): it may start there only.

    Args:
        scores: log-probabilities of start and end, shape (B, 2, T).
        window: as for `context_mask`, and ``own_begin`` and ``own_stop`` for the tokens whose best
            window this is.
        max_answer_length: in tokens, at least 1.
    """
    start, end = scores[:, 0], scores[:, 1]
    size = start.size(1)
    inside = context_mask(window, size)
    own = context_mask({"begin": window["own_begin"], "stop": window["own_stop"]}, size)
    start_scores = start.masked_fill(~(inside & own), _NEVER)
    end_scores = end.masked_fill(~inside, _NEVER)
    length = min(max_answer_length, size)
    padded = F.pad(end_scores, (0, length - 1), value=_NEVER)
    sums = start_scores.unsqueeze(2) + padded.unfold(1, length, 1)  # (B, start, length - 1)
    best, at = sums.flatten(1).max(dim=1)
    first = torch.div(at, length, rounding_mode="floor")
    return Spans(first, first + at % length, best, start[:, 0] + end[:, 0])


class Candidate(NamedTuple):
    """What the windows of a question say together.

    Attributes:
        score: of the best span.
        null: the lowest score of "no answer" of all windows.
        answer: what belongs to the best span.
    """

    score: float
    null: float
    answer: Any

    @property
    def null_odds(self) -> float:
        """How much likelier "no answer" is than the best span, a difference of logarithms."""
        return self.null - self.score

    def joined(self, other: "Candidate") -> "Candidate":
        """The candidate of a question, from two of its windows; their order does not matter."""
        score, answer = max((self.score, self.answer), (other.score, other.answer))
        return Candidate(score, min(self.null, other.null), answer)
