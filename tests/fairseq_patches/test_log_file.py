"""--log-file has every line once."""

from collections import Counter

from tests.helpers import runs


def test_lines_of_later_epochs_are_not_repeated(classification, tmp_path):
    """fairseq alone: those of the third epoch three times."""
    log = tmp_path / "train.log"
    more = ["--log-format", "json", "--log-interval", "1", "--log-file", str(log)]
    runs.train(
        classification,
        tmp_path,
        *more,
        "--max-epoch",
        "3",
        "--max-update",
        "99",
        "--no-save",
        validate=True,
    )
    lines = [line for line in log.read_text().splitlines() if line.startswith('{"epoch": 3')]
    assert any("train_loss" in line for line in lines) and any("valid_loss" in x for x in lines)
    assert set(Counter(lines).values()) == {1}
