"""Two views of a sentence, as Mirror-BERT has them: itself, and itself with a span masked.

Source: Liu et al. 2021, "Fast, Effective, and Self-Supervised: Transforming Masked Language Models
into Universal Lexical and Sentence Encoders", section 2.1.
"""

from typing import Callable, Optional, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary
from torch import Tensor

SHORTEST = 30  # characters; a shorter sentence is not masked
MASK = "<mask>"
LITERAL = "[MASK]"


def split_at_span(
    sentence: str, length: int, generator: np.random.Generator
) -> Optional[Tuple[str, str]]:
    """Draw a span of a sentence; return what is before and after it.

    A start is drawn from [0, len - length). The text there is removed where it occurs first in the
    sentence, as the authors' code does it.

    Args:
        sentence: any text.
        length: characters of the span; 0: nothing is drawn.
        generator: of the start.

    Returns:
        both parts; None for a sentence of less than `SHORTEST` characters, or without room.
    """
    room = len(sentence) - length
    if not length or len(sentence) < SHORTEST or room <= 0:
        return None
    start = int(generator.integers(room))
    left, _, right = sentence.partition(sentence[start : start + length])
    return left, right


class SentenceEncoder:
    """Makes token numbers of sentences: ``<s> a a a </s>``.

    Args:
        bpe: its ``encode``: text in, tokens joined by spaces out.
        dictionary: with <mask>.
    """

    def __init__(self, bpe: Callable[[str], str], dictionary: Dictionary) -> None:
        self._bpe = bpe
        self._dictionary = dictionary

    def encode(self, text: str, max_length: int) -> Tensor:
        """Return the tokens of a text, shape (T,), the first ``max_length - 2`` of them at most."""
        return self._numbers(self._bpe(text), max_length)

    def encode_masked(self, left: str, right: str, max_length: int) -> Tensor:
        """The same of two parts with the mask token between them, and a space at both sides."""
        pieces = f"{self._bpe(left.rstrip())} {MASK} {self._bpe(' ' + right)}"
        return self._numbers(pieces, max_length)

    def _numbers(self, pieces: str, max_length: int) -> Tensor:
        words = self._dictionary
        line = words.encode_line(pieces, add_if_not_exist=False, append_eos=False).long()
        return torch.cat(
            [torch.tensor([words.bos()]), line[: max_length - 2], torch.tensor([words.eos()])]
        )
