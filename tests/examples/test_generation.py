"""examples/generation: the runner from text to table at a small size, and the task's sentences."""

import re
from pathlib import Path

import pytest

from examples.generation.telegrams import telegram
from tests.helpers.processes import run_module

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "generation"


@pytest.mark.parametrize(
    "sentence, expected",
    [
        ("The cat is on the mat.", "cat mat"),
        ("Return whether an object was loaded!", "return whether object loaded"),
        ("If it is to be.", "if it is to be"),  # small words alone are kept
    ],
)
def test_telegram(sentence, expected):
    assert telegram(sentence) == expected


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """64 sentences of few words."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    verbs, nouns = "Return Read Write Open".split(), "file list name value".split()
    lines = [
        f"{v} the {a} of a {b} in {c}." for v in verbs for a in nouns for b in nouns for c in "x"
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(folder, *more, code=0):
    argv = ["--cores", "1", *more]
    result = run_module(
        "examples.generation.run", argv, folder / "said", {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert result.returncode == code, result.stdout
    return result.stdout


def test_from_text_to_table(text, tmp_path):
    small = ["--text", text, "--updates", "3", "--held-out", "4", "--vocabulary", "26"]
    small += ["--beam", "2", "--out", tmp_path, "--", "--max-tokens", "64"]
    table = run(tmp_path, *small)
    for method in ("adam", "delta_sam_adam"):
        assert re.search(rf"^\| {method} +\| [\d.]+ +\| [\d.]+ +\| \d+ +\|$", table, re.M), table
    assert re.search(r"^\| the source as it is \| [\d.]+ +\| +\| +\|$", table, re.M)
    assert len(re.findall(r"^  - delta_sam_adam: ", table, re.M)) == 3
    assert (tmp_path / "report.md").read_text() in table
    log = (tmp_path / "runs" / "delta_sam_adam-seed1" / "train.log").read_text()
    assert '"train_sharpness"' in log and '"train_num_updates": "3"' in log
    again = run(tmp_path, *small)
    assert again.count("already there") == 5 and again.count("| adam ") == 1


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--methods", "sgd"], ["--methods sgd", "delta_sam_adam"]),
        (["--updates", "0"], ["--updates: must be at least 1, got 0"]),
        (["--text", "/no/such.txt"], ["--text /no/such.txt", "no such file"]),
    ],
)
def test_wrong_options(tmp_path, options, expected):
    output = run(tmp_path, "--out", tmp_path, *options, code=2)
    assert all(part in output for part in expected)


def test_too_little_text_is_named(text, tmp_path):
    output = run(tmp_path, "--text", text, "--held-out", "32", "--out", tmp_path, code=1)
    assert "64 lines, none left for train" in output
