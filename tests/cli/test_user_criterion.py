"""A user directory of one's own that imports this one, as docs/algorithm.md shows it."""

import math
import re
from pathlib import Path

import pytest

import deltasam_fairseq
from tests.helpers import runs, tiny

ROOT = Path(__file__).parent.parent.parent
PACKAGE_PARENT = str(Path(deltasam_fairseq.__file__).parent.parent)


def from_the_docs():
    """The example of docs/algorithm.md, word for word."""
    text = (ROOT / "docs" / "algorithm.md").read_text()
    (code,) = re.findall(r"```python\n(import deltasam_fairseq.*?)```", text, re.DOTALL)
    return code


def train(data, folder, code, optimizer="delta_sam_adam", check=True):
    user_dir = folder / "my_user_dir"
    user_dir.mkdir(parents=True)
    (user_dir / "__init__.py").write_text(code)
    argv = tiny.arguments(data, folder / "run", *runs.SHORT, "--optimizer", optimizer)
    argv += ["--user-dir", str(user_dir), "--criterion", "my_criterion", "--max-update", "3"]
    return tiny.train(argv, check=check, env={"PYTHONPATH": PACKAGE_PARENT}, cwd=folder)


def test_own_criterion_takes_part(classification, tmp_path):
    """It is a cross entropy, so its run is that of the stock criterion, which logs in bits."""
    result = train(classification, tmp_path, from_the_docs())
    updates = [log for log in runs.json_lines(result.stdout) if "ups" in log]
    options = ["--optimizer", "delta_sam_adam", "--max-update", "3"]
    stock = runs.train(classification, tmp_path / "stock", *options)
    assert len(updates) == len(stock.updates) == 3
    for log, other in zip(updates, stock.updates):
        assert float(log["sharpness"]) > 0
        assert float(log["loss"]) == pytest.approx(float(other["loss"]) * math.log(2), abs=2e-3)
        for key in ("ascent_gnorm", "gnorm", "delta_sam_r", "delta_sam_effective"):
            assert float(log[key]) == pytest.approx(float(other[key]), abs=2e-3), key


@pytest.mark.parametrize(
    "old, new, remedy",
    [
        (', reduction="none")', ")", "one loss a sentence, shape (B,)"),
        ("losses.sum(), s", "losses.sum() + 5.0, s", "it has terms that belong to no sentence"),
        ("per_sentence_losses", "_losses", "use --optimizer sam_adam, or give the criterion"),
    ],
    ids=["one loss for all", "a term of no sentence", "no method"],
)
def test_own_criterion_that_does_not_fit(classification, tmp_path, old, new, remedy):
    code = from_the_docs()
    assert old in code
    # The loss of a whole batch has no length: what stands for it is another test's matter.
    code = code.replace("len(losses)", 'len(sample["id"])').replace(old, new)
    result = train(classification, tmp_path, code, check=False)
    assert result.returncode != 0
    assert remedy in result.stdout and "sam_loss" not in result.stdout
    if old == "per_sentence_losses":  # seen before anything is loaded
        assert result.returncode == 2 and "Traceback" not in result.stdout
        assert not (tmp_path / "run").exists()
