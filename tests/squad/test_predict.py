"""squad.predict: the answers that the model's scores say, in SQuAD's format."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils

from deltasam_fairseq.squad import predict as predict_squad
from deltasam_fairseq.squad.metrics import score_answer
from tests.helpers import runs


@pytest.fixture(scope="module")
def trained(span_prediction, tmp_path_factory):
    """Two checkpoints of a few updates."""
    folder = tmp_path_factory.mktemp("trained")
    more = ["--lr", "0.02", "--max-update", "9", "--null-threshold", "-0.5"]
    for seed in ("3", "4"):
        runs.train(
            span_prediction, folder / seed, *more, "--seed", seed, criterion="span_prediction"
        )
    return [folder / seed / "checkpoint_last.pt" for seed in ("3", "4")]


def predict(*argv):
    assert predict_squad.main([str(word) for word in argv]) == 0


@pytest.fixture
def refused(capsys):
    """A function that returns what the program prints when it refuses its options."""

    def run(*argv):
        capsys.readouterr()
        assert predict_squad.main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("python -m deltasam_fairseq.squad.predict: ")
        return error

    return run


def read(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}


def by_hand(data, paths):
    """id -> odds of none, text of the best span, gold answers: every span of every window, with the
    mean of the probabilities of start and of end."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(p) for p in paths])
    dataset = task.load_dataset("valid")
    spans, nulls = {}, {}
    for i in range(len(dataset)):
        sample = dataset.collater([dataset[i]])
        where = {name: int(column) for name, column in sample["window"].items()}
        context = list(range(where["begin"], where["stop"]))
        p = []
        for model in models:
            model.eval()
            kwargs = {"features_only": True, "classification_head_name": task.head_name}
            with torch.no_grad():
                logits = model(**sample["net_input"], **kwargs)[0][0].double()
            p.append(logits[[0, *context]].softmax(dim=0))
        log_p = (sum(p) / len(p)).log()
        name = where["question"]
        shift = where["first"] - where["begin"]
        nulls.setdefault(name, []).append(float(log_p[0].sum()))
        for s, start in enumerate(context, 1):
            if where["own_begin"] <= start < where["own_stop"]:
                for e, end in enumerate(context[s - 1 :], s):
                    score = float(log_p[s, 0] + log_p[e, 1])
                    text = task.questions[name].text(start + shift, end + shift)
                    spans.setdefault(name, []).append((score, text))
    found = {}
    for name in spans:
        score, text = max(spans[name])
        question = task.questions[name]
        found[question.id] = (min(nulls[name]) - score, text, question.answers)
    return found


@pytest.mark.parametrize("count", [1, 2])
def test_answers_are_the_best_spans(span_prediction, trained, tmp_path, count, capsys):
    predict(
        *("--data", span_prediction, "--path", *trained[:count], "--out", tmp_path / "out"),
        *("--batch-size", "3"),
    )
    found, expected = read(tmp_path / "out"), by_hand(span_prediction, trained[:count])
    odds = {k: odds for k, (odds, _, _) in expected.items()}
    assert found["null_odds"] == pytest.approx(odds, abs=1e-5)  # logits are float32
    answers = {k: "" if odds > -0.5 else text for k, (odds, text, _) in expected.items()}
    assert found["predictions"] == answers and len(answers) == 14
    values = [score_answer(answers[k], golds, True) for k, (_, _, golds) in expected.items()]
    exact, f1 = (100 * sum(column) / 14 for column in zip(*values))
    assert found["metrics"] == {
        "exact_match": pytest.approx(exact),
        "f1": pytest.approx(f1),
        "total": 14,
    }
    assert f"exact_match {exact:.2f}, f1 {f1:.2f}" in capsys.readouterr().out


def test_thresholds(span_prediction, trained, tmp_path):
    """Below all odds none is answered, above them every question is; one token at most."""
    common = ("--data", span_prediction, "--path", trained[0])
    predict(*common, "--out", tmp_path / "none", "--null-threshold=-1e9")
    assert set(read(tmp_path / "none")["predictions"].values()) == {""}
    assert read(tmp_path / "none")["metrics"]["f1"] == pytest.approx(100 * 2 / 14)  # i = 4, 9
    more = ("--null-threshold", "1e9", "--max-answer-length", "1")
    predict(*common, "--out", tmp_path / "all", *more)
    found = read(tmp_path / "all")["predictions"].values()
    assert all(answer and " " not in answer for answer in found)
    assert all(map(math.isfinite, read(tmp_path / "all")["null_odds"].values()))


def test_errors(span_prediction, classification, trained, tmp_path, refused):
    out = ("--out", tmp_path / "out")
    data = ("--data", span_prediction)
    assert "no such file" in refused(*data, "--path", "/no/such.pt", *out)
    message = refused(*data, "--path", trained[0], *out, "--split", "test")
    assert "--split test" in message and "train, valid" in message
    message = refused("--data", classification, "--path", trained[0], *out)
    assert "squad.prepare" in message
    path = runs.train(classification, tmp_path / "run", "--max-update", "1").save_dir
    message = refused(*data, "--path", path / "checkpoint_last.pt", *out)
    assert "not of --task span_prediction" in message
    other = Path(shutil.copytree(str(span_prediction), str(tmp_path / "other")))
    record = json.loads((other / "task.json").read_text())
    record["bpe"] = {"name": "gpt2", "sha256": {"dict": "0"}}
    (other / "task.json").write_text(json.dumps(record))
    message = refused("--data", other, "--path", trained[0], *out)
    assert "trained on data of another bpe" in message
    record["bpe"] = {"name": "wordpiece", "sha256": {}, "options": {"wordpiece_cased": True}}
    (other / "task.json").write_text(json.dumps(record))
    shutil.copytree(str(span_prediction), str(tmp_path / "origin"))
    state = torch.load(trained[0], weights_only=False)
    state["cfg"]["task"]["data"] = str(tmp_path / "origin")
    del state["extra_state"]["deltasam_data"]  # as in older checkpoints
    torch.save(state, tmp_path / "uncased.pt")
    record["bpe"]["options"]["wordpiece_cased"] = False
    (tmp_path / "origin" / "task.json").write_text(json.dumps(record))
    message = refused("--data", other, "--path", tmp_path / "uncased.pt", *out)
    assert "trained on data of another bpe" in message
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("a file")
    message = refused(*data, "--path", trained[0], *out)
    assert "is a file; give a folder" in message


def test_a_split_without_answers(span_prediction, trained, tmp_path):
    """It is predicted, without metrics; there is nothing to validate with."""
    data = Path(shutil.copytree(str(span_prediction), str(tmp_path / "data")))
    record = json.loads((data / "task.json").read_text())
    record["splits"]["valid"]["labelled"] = False
    (data / "task.json").write_text(json.dumps(record))
    predict("--data", data, "--path", trained[0], "--out", tmp_path / "out")
    assert set(read(tmp_path / "out")) == {"predictions", "null_odds"}
    _, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(trained[0])], arg_overrides={"data": str(data)}
    )
    with pytest.raises(ValueError, match="the split valid has no answers.*squad.predict"):
        task.load_dataset("valid")


def test_checkpoints_that_are_none(span_prediction, trained, tmp_path, refused):
    common = ("--data", span_prediction, "--out", tmp_path / "out")
    for name, content in (("garbage", b"no checkpoint"), ("cut", trained[0].read_bytes()[:2000])):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        message = refused(*common, "--path", trained[0], path)
        assert f"python -m deltasam_fairseq.squad.predict: --path: {path}" in message
        assert "Traceback" not in message
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(1)}, path)
    message = refused(*common, "--path", path)
    assert f"--path {path}: no checkpoint of fairseq" in message and "Traceback" not in message


def test_windows_that_are_too_long(span_prediction, trained, tmp_path, refused):
    data = Path(shutil.copytree(str(span_prediction), str(tmp_path / "data")))
    record = json.loads((data / "task.json").read_text())
    (data / "task.json").write_text(json.dumps({**record, "max_seq_length": 1000}))
    common = ("--data", data, "--path", trained[0], "--out", tmp_path / "out")
    message = refused(*common)
    assert "--max-positions" in message and "up to 1000 tokens" in message
    assert "--max-seq-length" in message and "Traceback" not in message


@pytest.mark.parametrize(
    "option, values",
    [
        ("--batch-size", ("0", "-1")),
        ("--max-answer-length", ("0", "-3")),
        ("--null-threshold", ("nan",)),
    ],
)
def test_wrong_numbers(option, values, tmp_path, capsys):
    for value in values:
        with pytest.raises(SystemExit) as raised:
            predict_squad.main(
                ["--data", ".", "--path", "x.pt", "--out", str(tmp_path), f"{option}={value}"]
            )
        message = capsys.readouterr().err
        assert raised.value.code == 2
        said = message.split(f"error: argument {option}: ")[1]
        assert said.startswith(("invalid", "must be at least 1")) and value in said
        assert message.startswith("usage: python -m deltasam_fairseq.squad.predict ")


def test_the_program(tmp_path):
    command = [sys.executable, "-m", "deltasam_fairseq.squad.predict"]
    more = ["--data", str(tmp_path), "--path", "x.pt", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([*command, *more], stderr=subprocess.PIPE, text=True, env=environment)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        f"python -m deltasam_fairseq.squad.predict: --data {tmp_path}: no data"
    )
