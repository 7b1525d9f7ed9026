"""Exact match and F1 of an answer, as SQuAD's official evaluation has them.

Source: Rajpurkar et al. 2016 and 2018, the scripts evaluate-v1.1.py and evaluate-v2.0.py.
"""

import re
import string
from collections import Counter
from typing import Callable, List, Sequence, Tuple

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = set(string.punctuation)


def normalised_answer(text: str) -> str:
    """In lower case, without ASCII punctuation, articles, and more than one space in a row."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(predicted: str, gold: str) -> float:
    """1 where both are the same after normalisation, else 0."""
    return float(normalised_answer(predicted) == normalised_answer(gold))


def token_f1(predicted: str, gold: str, version_2: bool) -> float:
    """F1 of the bags of words of both, after normalisation.

    Args:
        predicted, gold: answers; empty: no answer.
        version_2: where one of them has no words, SQuAD 2.0 takes 1 if the other has none too,
            SQuAD 1.1 always 0.
    """
    words, others = normalised_answer(predicted).split(), normalised_answer(gold).split()
    if version_2 and not (words and others):
        return float(words == others)
    same = sum((Counter(words) & Counter(others)).values())
    if not same:
        return 0.0
    precision, recall = same / len(words), same / len(others)
    return 2 * precision * recall / (precision + recall)


def score_answer(predicted: str, golds: Sequence[str], version_2: bool) -> Tuple[float, float]:
    """Exact match and F1 of an answer, each the best over the gold answers, 0 to 1.

    Args:
        predicted: empty for no answer.
        golds: empty for a question that has no answer (SQuAD 2.0).
        version_2: by the rules of SQuAD 2.0, which ignore golds that normalise to nothing.
    """
    if version_2:
        golds = [gold for gold in golds if normalised_answer(gold)] or [""]
    return _best(exact_match, predicted, golds), _best(
        lambda a, b: token_f1(a, b, version_2), predicted, golds
    )


def _best(metric: Callable[[str, str], float], predicted: str, golds: Sequence[str]) -> float:
    values: List[float] = [metric(predicted, gold) for gold in golds]
    return max(values)
