"""Exact match and F1, by hand and by the rules of evaluate-v1.1.py and evaluate-v2.0.py."""

import pytest

from deltasam_fairseq.squad.metrics import (
    exact_match,
    normalised_answer,
    score_answer,
    token_f1,
)


@pytest.mark.parametrize(
    "text, normalised",
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("An apple a day, the doctor", "apple day doctor"),
        ("theatre", "theatre"),
        ("the", ""),
        ("U.S.", "us"),
        ("\u201cCaf\xe9\u201d", "\u201ccaf\xe9\u201d"),  # ASCII punctuation only
        ("the-end", "theend"),  # punctuation goes first, and takes the edge of the word with it
        (" a\tb\n", "b"),
        ("12,000", "12000"),
    ],
)
def test_normalised(text, normalised):
    assert normalised_answer(text) == normalised


def test_f1_by_hand():
    """Words: predicted green old tea cup, gold old tea: precision 2/4, recall 2/2, F1 2/3."""
    assert token_f1("the green old tea cup", "old tea", version_2=False) == pytest.approx(2 / 3)
    # a bag: of three predicted "no" one is in the gold "no way": precision 1/3, recall 1/2
    assert token_f1("no no no", "no way", version_2=True) == pytest.approx(2 / 5)
    assert token_f1("coffee", "tea", version_2=False) == 0
    assert exact_match("The Tea.", "tea") == 1 and exact_match("teas", "tea") == 0


def test_the_best_gold_counts_for_each_metric_alone():
    """EM by the second gold; F1 of the first is 2/3, of the second 1."""
    assert score_answer("Paris", ["Paris France", "paris"], version_2=False) == (1, 1)
    exact, f1 = score_answer("Paris now", ["Paris France", "in Paris"], version_2=False)
    assert exact == 0 and f1 == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    "predicted, golds, expected",
    [
        ("", [], (1, 1)),  # no answer, and none predicted
        ("Paris", [], (0, 0)),
        ("", ["Paris"], (0, 0)),
        ("the", [], (1, 1)),  # normalises to nothing
        ("", ["the", "Paris"], (0, 0)),  # a gold that normalises to nothing is ignored
        ("", ["the"], (1, 1)),  # no gold is left: as if there were no answer
    ],
)
def test_no_answer_in_version_2(predicted, golds, expected):
    assert score_answer(predicted, golds, version_2=True) == expected


def test_nothing_is_never_right_for_f1_in_version_1():
    assert score_answer("", ["Paris"], version_2=False) == (0, 0)
    assert score_answer("the", ["a"], version_2=False) == (1, 0)  # evaluate-v1.1.py: no common word
