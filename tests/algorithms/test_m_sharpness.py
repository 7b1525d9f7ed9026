"""Groups of M sentences of a global batch."""

import pytest

from deltasam_fairseq.algorithms import groups_of


def test_by_hand():
    """Mini-batches of 3 and 2, groups of 2: the second has a sentence of each."""
    assert groups_of([3, 2], 2) == [[(0, 0, 2)], [(0, 2, 3), (1, 0, 1)], [(1, 1, 2)]]


@pytest.mark.parametrize("m", [1, 2, 3, 5, 12, 13, 100])
def test_do_not_depend_on_the_mini_batches(m):
    """Sentence j of the whole is in group j // m, whatever the split."""
    for sizes in ([12], [4, 4, 4], [5, 0, 6, 1], [0, 12]):
        starts = [sum(sizes[:batch]) for batch in range(len(sizes))]
        groups = groups_of(sizes, m)
        for k, parts in enumerate(groups):
            assert all(begin < end for _, begin, end in parts)
            sentences = [starts[b] + j for b, begin, end in parts for j in range(begin, end)]
            assert sentences == list(range(k * m, min(12, (k + 1) * m)))
        assert len(groups) == -(-12 // m)


def test_no_sentences_are_no_groups():
    assert groups_of([], 2) == groups_of([0, 0], 2) == []
