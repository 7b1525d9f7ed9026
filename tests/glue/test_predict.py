"""glue.predict: ids kept, labels as GLUE names them, scores on the task's scale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils

from deltasam_fairseq.glue import predict as predict_glue
from tests.helpers import runs, tiny

LABELS = ["not_entailment", "entailment"]


def prepared(folder, task, regression):
    """Data as glue.prepare leaves it, with a test split of 11 sentences of mixed length."""
    data = tiny.write_classification(folder, names=LABELS)
    rows = [row + [2] for row in tiny.sentences(11, seed=5)]
    splits = {"train": {}, "valid": {}, "test": {}}
    for split in ("test", "test1") if task == "MNLI" else ("test",):
        tiny._write(data / "input0" / split, rows)
        (data / "id").mkdir(exist_ok=True)
        (data / "id" / f"{split}.txt").write_text("".join(f"{i * 10}\n" for i in range(11)))
        splits[split] = {}
    record = {"task": task, "labels": [] if regression else LABELS, "splits": splits}
    record.update(scale=5.0 if regression else None, bpe={"sha256": {"dict": "d1"}})
    (data / "task.json").write_text(json.dumps(record))
    return data, rows


def trained(data, save_dir, *more, seed="3"):
    more = ["--max-update", "2", "--seed", seed, *more]
    return runs.train(data, save_dir, *more, criterion="plain").save_dir / "checkpoint_last.pt"


def predict(*argv):
    assert predict_glue.main([str(word) for word in argv]) == 0


@pytest.fixture
def refused(capsys):
    """A function that returns what the program prints when it refuses its options."""

    def run(*argv):
        capsys.readouterr()
        assert predict_glue.main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("python -m deltasam_fairseq.glue.predict: ")
        return error

    return run


def outputs_of(path, rows):
    """Each sentence alone through the model."""
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    model.eval()
    kwargs = {"features_only": True, "classification_head_name": "sentence_classification_head"}
    with torch.no_grad():
        return torch.cat([model(torch.tensor([[0, *row]]), **kwargs)[0] for row in rows])


def lines_of(path):
    header, *lines = path.read_text().splitlines()
    assert header == "index\tprediction"
    return [tuple(line.split("\t")) for line in lines]


def test_classes(tmp_path):
    data, rows = prepared(tmp_path / "data", "RTE", regression=False)
    path = trained(data, tmp_path / "run", "--lr", "0.1")
    predict("--data", data, "--path", path, "--out", tmp_path / "out", "--batch-size", "4")
    expected = [LABELS[i] for i in outputs_of(path, rows).argmax(1)]
    assert lines_of(tmp_path / "out" / "RTE.tsv") == [
        (str(10 * i), label) for i, label in enumerate(expected)
    ]


def test_scores_are_scaled_once_and_not_negative(tmp_path):
    data, rows = prepared(tmp_path / "data", "STS-B", regression=True)
    path = trained(data, tmp_path / "run", "--regression-target", "--num-classes", "1")
    predict("--data", data, "--path", path, "--out", tmp_path / "out")
    expected = (5 * outputs_of(path, rows).view(-1)).clamp(min=0)
    found = torch.tensor([float(x) for _, x in lines_of(tmp_path / "out" / "STS-B.tsv")])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_range_of_scores(monkeypatch):
    """STS-B's is known, that of a task of the user's is not."""
    rows = torch.tensor([[1.03], [-0.5], [0.25]])
    scores = {
        task: predict_glue.answers({"task": task, "scale": 5.0}, None, rows)
        for task in ("STS-B", "mood")
    }
    assert scores["STS-B"] == ["5.000", "0.000", "1.250"]
    assert scores["mood"] == ["5.150", "-2.500", "1.250"]


def test_labels_of_a_folder_that_contradicts_itself(tmp_path, refused):
    """task.json is not that of label/dict.txt; two folders that differ are mapped, see
    tests/checkpoints/test_mixed_data.py."""
    data, _ = prepared(tmp_path / "data", "RTE", regression=False)
    path = trained(data, tmp_path / "run")
    other, _ = prepared(tmp_path / "other", "RTE", regression=False)
    record = json.loads((other / "task.json").read_text())
    (other / "task.json").write_text(json.dumps({**record, "labels": LABELS[::-1]}))
    message = refused("--data", other, "--path", path, "--out", tmp_path / "out")
    assert f"labels {LABELS}, the data has {LABELS[::-1]}" in message


def test_several_checkpoints_and_both_parts_of_mnli(tmp_path):
    data, rows = prepared(tmp_path / "data", "MNLI", regression=False)
    paths = [trained(data, tmp_path / seed, "--lr", "0.1", seed=seed) for seed in ("3", "4")]
    predict("--data", data, "--path", *paths, "--out", tmp_path / "out")
    mean = sum(outputs_of(path, rows).softmax(1) for path in paths)
    for name in ("MNLI-m", "MNLI-mm"):
        found = [label for _, label in lines_of(tmp_path / "out" / f"{name}.tsv")]
        assert found == [LABELS[i] for i in mean.argmax(1)]


def test_errors(tmp_path, refused):
    data, _ = prepared(tmp_path / "data", "RTE", regression=False)
    path = trained(data, tmp_path / "run")
    out = ["--out", tmp_path / "out"]
    assert "no such file" in refused("--data", data, "--path", "/no/such.pt", *out)
    assert "task.json" in refused("--data", tmp_path, "--path", path, *out)
    record = json.loads((data / "task.json").read_text())
    (data / "task.json").write_text(json.dumps({**record, "labels": ["0", "1"]}))
    message = refused("--data", data, "--path", path, *out)
    assert "not_entailment" in message and "0" in message
    other, _ = prepared(tmp_path / "other", "CoLA", regression=False)
    (data / "task.json").write_text(json.dumps(record))
    message = refused("--data", other, "--path", path, *out)
    assert "trained on RTE" in message and "CoLA" in message
    scores, _ = prepared(tmp_path / "scores", "RTE", regression=True)
    message = refused("--data", scores, "--path", path, *out)
    assert "trained for 2 classes, the data has scores" in message
    same = prepared(tmp_path / "same", "RTE", regression=False)[0] / "task.json"
    same.write_text(json.dumps({**record, "bpe": {"sha256": {"dict": "d2"}}}))
    assert "another bpe" in refused("--data", same.parent, "--path", path, *out)
    (data / "task.json").write_text(json.dumps({**record, "splits": {"train": {}}}))
    assert "test.tsv" in refused("--data", data, "--path", path, *out)
    assert not (tmp_path / "out" / "RTE.tsv").exists()


def test_a_sentence_that_is_too_long_for_the_model(tmp_path, refused):
    data, rows = prepared(tmp_path / "data", "RTE", regression=False)
    path = trained(data, tmp_path / "run", "--max-positions", "64")
    tiny._write(data / "input0" / "test", [*rows[:2], [4] * 64 + [2], *rows[3:]])
    message = refused("--data", data, "--path", path, "--out", tmp_path / "out")
    # with <s> and </s>
    assert "test: row 3 has 66 tokens, more than the 64 positions of the model" in message
    assert not (tmp_path / "out").exists()


def test_the_program(tmp_path):
    command = [sys.executable, "-m", "deltasam_fairseq.glue.predict"]
    more = ["--data", str(tmp_path), "--path", "x.pt", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([*command, *more], stderr=subprocess.PIPE, text=True, env=environment)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        f"python -m deltasam_fairseq.glue.predict: --data {tmp_path}: no task.js"
    )
