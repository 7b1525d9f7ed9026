"""Subsets and label noise: how many rows, which classes, and always the same ones."""

from collections import Counter

import pytest

from deltasam_fairseq.glue.training_rows import draw_rows, replace_labels

CLASSES = ("a", "b", "c")


def test_rows_are_the_same_for_a_seed_and_differ_between_seeds():
    rows = draw_rows(100, 10, seed=3)
    assert rows == sorted(set(rows)) and len(rows) == 10 and 0 <= rows[0] and rows[-1] < 100
    assert rows == draw_rows(100, 10, seed=3) != draw_rows(100, 10, seed=4)
    assert draw_rows(5, 5, seed=1) == [0, 1, 2, 3, 4]


def test_labels_of_the_changed_rows_are_wrong_and_all_others_kept():
    labels = [CLASSES[i % 3] for i in range(1000)]
    noisy, changed = replace_labels(labels, CLASSES, 0.4, seed=7)
    assert len(changed) == 400 and changed == sorted(set(changed))
    assert [i for i in range(1000) if noisy[i] != labels[i]] == changed
    # every other class as likely: of about 133 rows of a class 67 each, standard deviation 6
    became = Counter((labels[i], noisy[i]) for i in changed)
    assert len(became) == 6 and all(45 < count < 90 for count in became.values())
    assert (noisy, changed) == replace_labels(labels, CLASSES, 0.4, seed=7)


def test_no_noise_changes_nothing_and_full_noise_everything():
    assert replace_labels(["a", "b"], CLASSES, 0, seed=1) == (["a", "b"], [])
    assert replace_labels(["a", "b", "a"], ("a", "b"), 1, seed=1) == (["b", "a", "b"], [0, 1, 2])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: draw_rows(5, 6, 1), "6 of 5 rows"),
        (lambda: draw_rows(5, 0, 1), "0 of 5 rows"),
        (lambda: replace_labels(["a"], CLASSES, 1.5, 1), "share of 1.5"),
        (lambda: replace_labels(["a"], ("a",), 0.5, 1), "no other class than a"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
