"""deltasam_fairseq.markdown: one writer of Markdown tables."""

import pytest

from deltasam_fairseq.markdown import markdown_table, spread


def test_table_by_hand():
    """Columns as wide as their widest cell, at least the three dashes that Markdown needs."""
    rows = [["sam", "61.0", "x"], ["a|b", "", "y"]]
    assert markdown_table(["method", "n", "n"], rows).split("\n") == [
        "| method | n    | n   |",
        "| ------ | ---- | --- |",
        "| sam    | 61.0 | x   |",
        "| a\\|b   |      | y   |",
    ]


def test_spread_by_hand():
    """Of 1, 2, 6 the mean is 3 and the variance (4 + 1 + 9) / 2."""
    assert spread([1, 2, 6], 2) == "3.00 ± 2.65" and spread([1.25], 2) == "1.25"


def test_header_alone():
    assert markdown_table(["a"], []) == "| a   |\n| --- |"


def test_rows_have_as_many_cells_as_the_header():
    with pytest.raises(ValueError, match="1 cells in a table of 2 columns"):
        markdown_table(["a", "b"], [["1"]])
