"""A model and data that fit by size and are not the same: mapped or refused, wherever they meet."""

import json
import shutil

import pytest
import torch
from fairseq.data import Dictionary

from deltasam_fairseq.average import mean
from deltasam_fairseq.checkpoints import DataMismatchError, DataRecord, data_record
from deltasam_fairseq.criterions.teacher import load_teacher
from deltasam_fairseq.glue import predict as glue_predict
from deltasam_fairseq.options import UsageError
from deltasam_fairseq.sharpness import __main__ as sharpness
from tests.helpers import runs, tiny

LABELS = ["neg", "pos"]  # by the sorted names, as this project numbers them
BY_FREQUENCY = ["pos", "neg"]  # as fairseq's own preparation does
WORDS = [f"w{i}" for i in range(40)]
WIDTH = (
    "--encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --dropout 0 --attention-dropout 0".split()
)
TRAINED = [*WIDTH, "--lr", "5e-3", "--max-update", "40", "--max-epoch", "99"]


def write(folder, labels=LABELS, words=WORDS, scale=None, inputs=1, recorded=True, **known):
    """The same sentences every time: of w0 to w19 for neg, of w20 to w39 for pos; scores 0 and 5.

    The second sentence of a pair has always the other half.
    """
    dictionary, numbers = Dictionary(), Dictionary()
    for symbols, target in ((words, dictionary), (labels, numbers)):
        for symbol in symbols:
            target.add_symbol(symbol)
    splits = (("train", 32), ("valid", 16), ("test", 16))
    for seed, (split, n) in enumerate(splits):
        draw = torch.Generator().manual_seed(seed)
        halves = [i % 2 for i in range(n)]
        for column in range(inputs):
            texts = (torch.randint(20, (5,), generator=draw) + 20 * (h ^ column) for h in halves)
            rows = [[*(dictionary.index(WORDS[i]) for i in text), 2] for text in texts]
            tiny._write(folder / f"input{column}" / split, rows)
        targets = [[numbers.index(LABELS[half]), 2] for half in halves]
        tiny._write(folder / "label" / split, targets)
        scores = "".join(f"{5 * half / (scale or 1)}\n" for half in halves)
        (folder / "label" / f"{split}.label").write_text(scores)
        (folder / "id").mkdir(exist_ok=True)
        (folder / "id" / f"{split}.txt").write_text("".join(f"{i}\n" for i in range(n)))
    dictionary.save(str(folder / "input0" / "dict.txt"))
    numbers.save(str(folder / "label" / "dict.txt"))
    task = {"task": "mood", "labels": [] if scale else labels, "scale": scale, "bpe": {}}
    task["bpe"] = {"name": "gpt2", "sha256": {}, "options": {}}
    if recorded:
        splits = {split: {} for split, _ in splits}
        (folder / "task.json").write_text(json.dumps({**task, "splits": splits, **known}))
    return folder


def train(data, save_dir, *more, **kwargs):
    found = runs.train(data, save_dir, *TRAINED, *more, **{"criterion": "plain", **kwargs})
    return found.save_dir / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mixed")


@pytest.fixture(scope="module")
def data(folder):
    """Prepared by this project."""
    return write(folder / "sorted")


@pytest.fixture(scope="module")
def model(folder):
    """Trained on data that fairseq prepared, which is gone."""
    data = write(folder / "by_frequency", BY_FREQUENCY, recorded=False)
    path = train(data, folder / "run")
    shutil.rmtree(data)
    return path


@pytest.fixture(scope="module")
def shuffled(folder):
    """The same data with another numbering of the same words."""
    return write(folder / "shuffled", words=[*WORDS[20:], *WORDS[:20]])


@pytest.fixture(scope="module")
def scores(folder):
    """Trained on scores as they are, 0 to 5."""
    data = write(folder / "scores", scale=1.0)
    return train(data, folder / "scores_run", "--regression-target", "--num-classes", "1")


def accuracy(found):
    """Of the first validation, in percent."""
    logs = (json.loads(m) for m in found.messages if "valid_accuracy" in m)
    return float(next(logs)["valid_accuracy"])


def predicted(data, paths, out):
    argv = ["--data", data, "--path", *paths, "--out", out]
    assert glue_predict.main([str(word) for word in argv]) == 0
    return [line.split("\t")[1] for line in (out / "mood.tsv").read_text().splitlines()[1:]]


def refused(capsys, data, *paths):
    argv = ["--data", data, "--path", *paths, "--out", data / "out"]
    assert glue_predict.main([str(word) for word in argv]) == 2
    return capsys.readouterr().err


def measured(data, path):
    argv = [str(data), "--path", str(path), "--batch-size", "16", "--sam-rho-list", "0.05"]
    report = sharpness.main(sharpness.get_parser().parse_args([*argv, "--cpu"]))
    (batch,) = report.batches
    return torch.stack([batch.loss, batch.per_batch[0]])


def task_of(data, *more):
    return tiny.build_trainer(tiny.arguments(data, data, *WIDTH, *more, criterion="plain")).task


class TestLabelsInAnotherOrder:
    """All is as with the order that the model was trained with."""

    def test_predict(self, data, model, tmp_path):
        assert predicted(data, [model], tmp_path) == LABELS * 8

    def test_distill(self, data, model, tmp_path, caplog):
        """The teacher alone teaches, without labels."""
        options = ("--distill-teacher", str(model), "--distill-lambda", "1")
        found = runs.train(data, tmp_path, *TRAINED, *options, criterion="distill", validate=True)
        *_, last = (json.loads(m) for m in found.messages if "valid_accuracy" in m)
        assert float(last["valid_accuracy"]) == 100
        assert float(found.updates[-1]["distill_teacher_accuracy"]) == 100
        assert "pos neg" in caplog.text and "permuted to [1, 0]" in caplog.text

    def test_sharpness(self, data, model, tmp_path):
        matching = write(tmp_path / "matching", BY_FREQUENCY, recorded=False)
        expected, found = measured(matching, model), measured(data, model)
        assert 0 < expected[0] < 0.1 and 0 < expected[1] < 0.1
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

    def test_finetune(self, data, model, tmp_path):
        start = ("--finetune-from-model", str(model), "--lr", "0", "--max-update", "1")
        found = runs.train(data, tmp_path, *TRAINED, *start, criterion="plain", validate=True)
        assert accuracy(found) == 100
        assert DataRecord.of_checkpoint(found.checkpoint).labels == LABELS

    def test_on_two_ranks(self, data, model, tmp_path):
        """Each reads the teacher; the first reads where to start from, for both."""
        ranks = ("--distributed-world-size", "2", "--ddp-backend", "legacy_ddp", "--no-save")
        start = ("--finetune-from-model", str(model), "--lr", "0", "--max-update", "1")
        teach = ("--distill-teacher", str(model), "--distill-lambda", "1", "--batch-size", "4")
        for options, criterion in ((start, "plain"), (teach, "distill")):
            more = (*TRAINED, *ranks, *options, "--find-unused-parameters")
            output = tiny.train(tiny.arguments(data, tmp_path, *more, criterion=criterion)).stdout
            logs = runs.json_lines(output, "valid_accuracy")
            assert float(logs[-1]["valid_accuracy"]) == 100
            assert output.count("permuted to [1, 0]") == (2 if criterion == "distill" else 1)

    def test_a_model_without_record_whose_data_is_there(self, data, model, tmp_path):
        """As older versions saved it."""
        state = torch.load(str(model), weights_only=False)
        del state["extra_state"][data_record.KEY]
        origin = write(tmp_path / "origin", BY_FREQUENCY, recorded=False)
        state["cfg"]["task"]["data"] = str(origin)
        torch.save(state, tmp_path / "old.pt")
        assert predicted(data, [tmp_path / "old.pt"], tmp_path) == LABELS * 8

    def test_average(self, data, model, tmp_path):
        start = ("--finetune-from-model", str(model), "--lr", "0", "--max-update", "1")
        same = runs.train(data, tmp_path, *TRAINED, *start, criterion="plain")
        state = mean.average([str(same.save_dir / "checkpoint_last.pt"), str(model)])
        assert same.checkpoint is not None
        torch.testing.assert_close(dict(state["model"]), dict(same.checkpoint["model"]))
        assert DataRecord.of_checkpoint(state).labels == LABELS


def test_an_ensemble_of_both_orders_and_of_two_heads(data, model, tmp_path):
    more = ("--classification-head-name", "mood_head")
    other = train(data, tmp_path / "run", *more)
    assert predicted(data, [model, other], tmp_path) == LABELS * 8


class TestWordsInAnotherOrder:
    def test_teacher(self, shuffled, model):
        with pytest.raises(DataMismatchError, match="--distill-teacher.*w0 w1.*w20 w21"):
            load_teacher(str(model), task_of(shuffled), "sentence_classification_head")

    def test_sharpness(self, shuffled, model):
        with pytest.raises(UsageError, match="w0 w1.*w20 w21.*dict.txt"):
            measured(shuffled, model)

    def test_predict_finetune_average(self, data, shuffled, model, tmp_path, capsys):
        assert "w0 w1" in refused(capsys, shuffled, model)
        start = ("--finetune-from-model", str(model))
        with pytest.raises(DataMismatchError, match="w0 w1.*w20 w21"):
            runs.train(shuffled, tmp_path / "run", *TRAINED, *start, criterion="plain")
        other = train(shuffled, tmp_path / "other", "--max-update", "1")
        with pytest.raises(UsageError, match="w20 w21.*w0 w1"):
            mean.average([str(model), str(other)])


class TestScale:
    @pytest.fixture(scope="class")
    def fifths(self, folder):
        return write(folder / "fifths", scale=5.0)

    def test_predict(self, fifths, scores, tmp_path):
        found = torch.tensor([float(x) for x in predicted(fifths, [scores], tmp_path)])
        torch.testing.assert_close(found, torch.tensor([0.0, 5.0] * 8), rtol=0, atol=0.5)

    def test_finetune(self, fifths, scores, tmp_path):
        """Its squared error is below that of scores five times too large, 16."""
        kind = ("--regression-target", "--num-classes", "1")
        start = ("--finetune-from-model", str(scores), "--lr", "0", "--max-update", "1")
        more = (*TRAINED, *kind, *start)
        found = runs.train(fifths, tmp_path, *more, criterion="plain", validate=True)
        log = next(json.loads(m) for m in found.messages if "valid_loss" in m)
        assert float(log["valid_loss"]) < 0.1

    def test_sharpness(self, fifths, scores):
        with pytest.raises(UsageError, match="scores divided by 1, .*scores divided by 5"):
            measured(fifths, scores)


class TestFormat:
    """Sentences, columns, and the tokens that stand before them."""

    def test_columns(self, tmp_path, capsys):
        pairs = write(tmp_path / "pairs", inputs=2, columns=["a", "b"])
        path = train(pairs, tmp_path / "run")
        swapped = write(tmp_path / "swapped", inputs=2, columns=["b", "a"])
        assert "columns 'a' 'b' in this order, the data has 'b' 'a'" in refused(
            capsys, swapped, path
        )
        single = write(tmp_path / "single", columns=["a"])
        assert "of 2 sentences, the data has 1 sentence" in refused(capsys, single, path)
        other = train(single, tmp_path / "other")
        assert "of 1 sentence, the data has 2 sentences" in refused(capsys, pairs, other)
        assert len(predicted(pairs, [path], tmp_path)) == 16

    def test_tokens(self, data, model, tmp_path, capsys):
        """The model's own are used for prediction; a teacher reads the student's."""
        argv = list(tiny.arguments(data, tmp_path, *TRAINED, criterion="plain"))
        at = argv.index("--init-token")
        del argv[at : at + 2]
        trainer = tiny.build_trainer(argv)
        trainer.train_step(tiny.batches(trainer)[:1])
        trainer.consolidate_optimizer()  # as fairseq does it before it saves
        trainer.save_checkpoint(str(tmp_path / "without.pt"), {"train_iterator": {}})
        with pytest.raises(DataMismatchError, match="no --init-token, .*with --init-token 0"):
            load_teacher(
                str(tmp_path / "without.pt"), task_of(data), "sentence_classification_head"
            )
        message = refused(capsys, data, model, tmp_path / "without.pt")
        assert "no --init-token" in message and "with --init-token 0" in message
        predicted(data, [tmp_path / "without.pt"], tmp_path)


def test_the_other_direction(translation, tmp_path):
    """Of two languages with one dictionary; fits by size, and by words."""
    criterion = "label_smoothed_cross_entropy"
    ends = [
        runs.train(translation, tmp_path / t, *pair, "--max-update", "1", criterion=criterion)
        for t, *pair in (("bb", "-s", "aa", "-t", "bb"), ("aa", "-s", "bb", "-t", "aa"))
    ]
    there, back = (str(end.save_dir / "checkpoint_last.pt") for end in ends)
    options = ("--distill-teacher", back, "--max-update", "1")
    with pytest.raises(DataMismatchError, match="bb into aa, the data is for aa into bb"):
        runs.train(translation, tmp_path / "run", *options, criterion="seq2seq_distill")
    with pytest.raises(UsageError, match="bb into aa"):
        mean.average([there, back])
