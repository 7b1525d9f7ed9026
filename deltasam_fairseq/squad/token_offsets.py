"""Offsets of a BPE's tokens in the text that they were made of, in characters."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from deltasam_fairseq.data.binarize import Encoding, build_bpe, tools

Piece = Tuple[str, int, int]  # a token, and where in the text it begins and ends


class Encoded(NamedTuple):
    """A text as tokens.

    Attributes:
        tokens: numbers in the dictionary, shape (n,); one that is not known is <unk>.
        offsets: characters at which each begins and behind which it ends, without white space at
            its ends, shape (n, 2). Empty where it is nothing else. A token also has the visible
            characters next to it that the BPE drops, such as the accents that BERT removes.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def span(self, begin: int, end: int) -> Tuple[int, int]:
        """Return the first and the last token of the characters from ``begin`` to before ``end``.

        The tokens cover the characters; they cover more where an answer begins or ends inside of
        a token. Characters that no token has (see `covers`) give last < first.
        """
        starts, ends = self.offsets[:, 0], self.offsets[:, 1]
        (inside,) = np.nonzero((starts < end) & (ends > begin) & (starts < ends))
        return (int(inside[0]), int(inside[-1])) if len(inside) else (0, -1)

    def covers(self, text: str, begin: int, end: int) -> bool:
        """Whether the tokens of `span` have the visible characters from ``begin`` to ``end``.

        A BPE may drop a word: between spaces, BERT's a lone accent.
        """
        first, last = self.span(begin, end)
        while begin < end and not _is_visible(text[begin]):
            begin += 1
        while begin < end and not _is_visible(text[end - 1]):
            end -= 1
        if first > last:
            return False
        return begin == end or (self.offsets[first][0] <= begin and end <= self.offsets[last][1])


def _is_visible(char: str) -> bool:
    """Whether a character is neither white space nor a control or format character."""
    return not char.isspace() and unicodedata.category(char) not in ("Cc", "Cf")


@functools.lru_cache(maxsize=1)
def _bpe(encoding: Encoding) -> Any:
    return build_bpe(encoding.bpe, **dict(encoding.options))


def encode(encoding: Encoding, texts: Sequence[str]) -> List[Encoded]:
    """Return the tokens of each text, without an end mark."""
    pieces_of = {"gpt2": _gpt2, "sentencepiece": _sentencepiece, "wordpiece": _wordpiece}
    make, bpe, dictionary = pieces_of[encoding.bpe], _bpe(encoding), tools(encoding)[1]
    found = []
    for text in texts:
        pieces = [(piece, *_trimmed(text, begin, end)) for piece, begin, end in make(bpe, text)]
        tokens = np.array([dictionary.index(piece) for piece, _, _ in pieces], dtype=np.int64)
        spans = _with_dropped(text, [(begin, end) for _, begin, end in pieces])
        offsets = np.array(spans, dtype=np.int64).reshape(-1, 2)
        found.append(Encoded(tokens, offsets))
    return found


def _trimmed(text: str, begin: int, end: int) -> Tuple[int, int]:
    while begin < end and text[begin].isspace():
        begin += 1
    while begin < end and text[end - 1].isspace():
        end -= 1
    return begin, end


def _with_dropped(text: str, spans: Sequence[Tuple[int, int]]) -> List[Tuple[int, int]]:
    """Extend spans over the visible characters beside them that no token has.

    Those behind a token, up to white space, are its; those at the beginning of a word go to the
    token that follows. Control and format characters at the outer end stay without one.
    """
    limits, limit = [], len(text)  # of each token: where the next one begins
    for begin, end in reversed(spans):
        limits.append(limit)
        limit = begin if begin < end else limit
    found, before = [], 0
    for (begin, end), limit in zip(spans, reversed(limits)):
        if begin < end:
            begin = _reach(text, range(begin - 1, before - 1, -1), begin)
            end = _reach(text, range(end, limit), end - 1) + 1
            before = max(before, end)
        found.append((begin, end))
    return found


def _reach(text: str, positions: Iterable[int], reached: int) -> int:
    """Return the last visible one of the positions before white space; ``reached`` if none is."""
    for i in positions:
        if text[i].isspace():
            break
        reached = i if _is_visible(text[i]) else reached
    return reached


def _gpt2(bpe: Any, text: str) -> Iterator[Piece]:
    """The tokens of GPT-2 are bytes, one after another; several may share a character."""
    char_of_byte = [i for i, char in enumerate(text) for _ in char.encode("utf-8")]
    at = 0
    for piece in bpe.encode(text).split():
        length = len(bpe.bpe.decoder[int(piece)])  # it stands for one byte with each character
        yield piece, char_of_byte[at], char_of_byte[at + length - 1] + 1
        at += length


def _sentencepiece(bpe: Any, text: str) -> Iterator[Piece]:
    """sentencepiece knows where its pieces come from, through its normalisation."""
    try:
        found = bpe.sp.encode(text, return_type="offset_mapping")
    except TypeError:  # sentencepiece 0.2.0 and before
        for piece in bpe.sp.encode(text, out_type="immutable_proto").pieces:
            yield piece.piece, piece.begin, piece.end
    else:
        yield from ((piece, *span) for piece, span in zip(found["pieces"], found["offsets"]))


def _wordpiece(bpe: Any, text: str) -> Iterator[Piece]:
    yield from bpe.pieces(text)
