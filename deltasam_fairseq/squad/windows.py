"""Windows of a context that is too long for the model, and where the answer is in them."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

Range = Tuple[int, int]  # from, to before


def window_ranges(length: int, room: int, stride: int) -> List[Range]:
    """Return the ranges of tokens that windows show: the first at 0, each next ``stride`` later.

    Args:
        length: of the context, in tokens, at least 1.
        room: tokens of the context that a window has.
        stride: at most room.
    """
    begins = range(0, max(length - room, 0) + stride, stride)
    return [(begin, min(begin + room, length)) for begin in begins]


def own_ranges(ranges: Sequence[Range]) -> List[Range]:
    """Return the tokens of each window that have more context there than in any other window.

    The context of a token is the smaller of what is to its left and its right, and a hundredth of
    the window's length decides between equals, the first of them after that. Every token is in
    one range.

    Source: Devlin et al. 2019, the function _check_is_max_context of their run_squad.py.
    """
    best = np.full(ranges[-1][1], -np.inf)
    owner = np.zeros(len(best), dtype=np.int64)
    for i, (begin, end) in enumerate(ranges):
        inside = np.arange(end - begin)
        scores = np.minimum(inside, inside[::-1]) + 0.01 * (end - begin)
        better = scores > best[begin:end]
        best[begin:end][better] = scores[better]
        owner[begin:end][better] = i
    own = []
    for i, (begin, end) in enumerate(ranges):
        (mine,) = np.nonzero(owner[begin:end] == i)
        first, last = (int(mine[0]), int(mine[-1])) if len(mine) else (0, -1)
        own.append((begin + first, begin + last + 1))
    return own


class Window(NamedTuple):
    """One window of a question; all fields but ``tokens`` are those of the task's table."""

    tokens: np.ndarray
    start: int
    end: int
    begin: int
    stop: int
    own_begin: int
    own_stop: int
    first: int


class Layout(NamedTuple):
    """How question and context share a window: ``<s> question </s> ... context </s>``.

    Attributes:
        length: of a window, in tokens.
        stride: from one window of a context to the next, in tokens of the context.
        query: tokens of a question that are kept.
        separators: number of </s> between question and context: RoBERTa 2, BERT 1.
    """

    length: int
    stride: int
    query: int
    separators: int

    def windows(
        self, question: np.ndarray, context: np.ndarray, answer: Optional[Range], bos: int, eos: int
    ) -> List[Window]:
        """Return the windows of a question.

        Args:
            question, context: numbers of tokens.
            answer: its first and its last token in the context; None: there is none.
            bos, eos: numbers of <s> and </s>.
        """
        head = np.concatenate([[bos], question[: self.query], [eos] * self.separators])
        room, at = self.length - len(head) - 1, len(head)
        ranges = window_ranges(len(context), room, min(self.stride, room))
        found = []
        for (first, last), own in zip(ranges, own_ranges(ranges)):
            shift = at - first
            tokens = np.concatenate([head, context[first:last], [eos]])
            start = end = 0
            if answer is not None and first <= answer[0] and answer[1] < last:
                start, end = answer[0] + shift, answer[1] + shift
            own_begin, own_stop = own[0] + shift, own[1] + shift
            stop = last + shift
            found.append(Window(tokens, start, end, at, stop, own_begin, own_stop, first))
        return found
