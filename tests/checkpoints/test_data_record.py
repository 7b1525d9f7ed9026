"""What a checkpoint says of its data, what differs, and what is mapped."""

import json

import pytest
import torch
from fairseq.data import Dictionary

from deltasam_fairseq.checkpoints import (
    DataMismatchError,
    DataRecord,
    data_record,
    fit_start,
    fit_to_data,
)
from deltasam_fairseq.checkpoints.data_record import Words
from deltasam_fairseq.checkpoints.fit_to_data import class_order, differences
from tests.helpers import runs, tiny

HEAD = "sentence_classification_head"


def words(*symbols):
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    return {"source": Words.of(dictionary)}


def stored(record):
    """As it comes back from a file."""
    return DataRecord.of_plain(record.plain())


def record(**known):
    return DataRecord(**{"classes": 2, "regression": False, "head": HEAD, **known})


def state_of(trained, rows=2):
    prefix = f"classification_heads.{HEAD}.out_proj."
    weights = {
        f"{prefix}weight": torch.arange(2.0 * rows).view(rows, 2),
        f"{prefix}bias": torch.arange(1.0 * rows),
        "encoder.weight": torch.arange(1.0 * rows),
    }
    ema = {name: tensor.clone() for name, tensor in weights.items()}
    extra = {data_record.KEY: trained.plain(), "ema": ema}
    return {"cfg": {}, "model": weights, "extra_state": extra}


def bias(weights):
    return weights[f"classification_heads.{HEAD}.out_proj.bias"].tolist()


class TestWords:
    """The order of the symbols counts, not what fairseq appends."""

    SYMBOLS = [f"w{i}" for i in range(40)]

    def test_same(self):
        some = words(*self.SYMBOLS)
        for more in ([], ["<mask>"], ["madeupword0000", "madeupword0001", "<mask>"]):
            others = words(*self.SYMBOLS, *more)
            assert not differences(stored(record(words=some)), record(words=others))
            assert not differences(stored(record(words=others)), record(words=some))

    def test_a_word_that_replaces_a_filler(self):
        padded = stored(record(words=words(*self.SYMBOLS, "madeupword0000")))
        assert not differences(padded, record(words=words(*self.SYMBOLS, "[E1]")))

    @pytest.mark.parametrize("kept", [stored, lambda same: same], ids=["stored", "folder"])
    def test_another_order(self, kept):
        swapped = [*self.SYMBOLS[:30], "w31", "w30", *self.SYMBOLS[32:]]
        (found,) = differences(
            kept(record(words=words(*self.SYMBOLS))), record(words=words(*swapped))
        )
        assert found.kind == "words" and "dict.txt" in found.remedy
        assert ("w30 w31" in found.trained and "w31 w30" in found.here) == (kept is not stored)

    def test_size_in_a_checkpoint(self):
        """Of 50 thousand words too it is less than a kilobyte."""
        many = record(words=words(*map(str, range(50000))))
        assert len(json.dumps(many.plain())) < 1000


@pytest.mark.parametrize(
    "trained, data, classes, expected",
    [
        (["pos", "neg"], ["neg", "pos"], 2, [1, 0]),
        (["c", "a", "b"], ["a", "b", "c"], 3, [1, 2, 0]),
        (["a", "b"], ["a", "b"], 2, [0, 1]),
        (["a", "b", "c"], ["c", "a"], 3, [2, 0, 1]),  # none of the data is b
        (["a", "c"], ["a", "b", "c"], 3, [0, 2, 1]),  # b is the output without a name
        (["0", "1"], ["neg", "pos"], 2, None),
        (["a", "b"], ["a", "c"], 2, None),
    ],
)
def test_class_order(trained, data, classes, expected):
    assert class_order(record(labels=trained, classes=classes), record(labels=data)) == expected


@pytest.mark.parametrize(
    "trained, data, kind",
    [
        ({"labels": ["0", "1"]}, {"labels": ["neg", "pos"]}, "labels"),
        ({"labels": ["a", "b"]}, {"labels": ["a", "b", "c"]}, "targets"),
        ({"regression": True}, {"labels": ["a", "b"]}, "targets"),
        ({"sentences": 2}, {"sentences": 1}, "sentences"),
        ({"columns": ["a", "b"]}, {"columns": ["b", "a"]}, "columns"),
        (
            {"columns": ["column 1", "column 2"], "task": "own"},
            {"columns": ["column 2", "column 1"], "task": "own"},
            "columns",
        ),
        ({"languages": ["de", "en"]}, {"languages": ["en", "de"]}, "languages"),
        ({"tokens": [None, 2]}, {"tokens": [0, 2]}, "tokens"),
        ({"tokens": [0, None], "sentences": 2}, {"tokens": [0, 2], "sentences": 2}, "tokens"),
    ],
)
def test_what_is_refused(trained, data, kind):
    some, others = record(**trained), record(**data)
    (found,) = differences(stored(some), others)
    assert found.kind == kind and found.trained != found.here and found.remedy
    with pytest.raises(DataMismatchError, match="--path x.pt .*its own record.*trained"):
        fit_to_data(state_of(some), others, "--path x.pt")


@pytest.mark.parametrize(
    "trained, data",
    [
        ({"labels": ["a", "b"]}, {}),
        ({"labels": ["a", "b"]}, {"labels": ["b"]}),  # a split without one of them
        ({"columns": ["premise", "hypothesis"]}, {"columns": ["sentence1", "sentence2"]}),
        (
            {"columns": ["column 1", "column 2"], "task": "own"},
            {"columns": ["column 2", "column 1"], "task": "another file"},
        ),
        ({"tokens": [0, None], "sentences": 1}, {"tokens": [0, 2], "sentences": 1}),
        ({"sentences": 2, "columns": ["a", "b"]}, {"sentences": 2}),  # fairseq's own preparation
        ({"task": "MNLI"}, {"task": "SNLI"}),
        ({"languages": ["de", "en"]}, {"languages": ["deu", "eng"]}),
        ({"languages": ["de", "de"]}, {"languages": ["de", "de"]}),
    ],
)
def test_what_is_right_is_not_refused(trained, data):
    assert not differences(stored(record(**trained)), record(**data))


def test_another_case_is_refused_or_warned_of(caplog):
    """Of the same words, in text that only one of the two was lower-cased in."""
    some, others = (record(encoding=["wordpiece", {}, cased]) for cased in (False, True))
    with pytest.raises(DataMismatchError, match="another bpe"):
        fit_to_data(state_of(some), others, "--path x.pt", same_preparation=True)
    assert not caplog.text
    fit_to_data(state_of(some), others, "--distill-teacher x.pt")
    assert "--distill-teacher x.pt (by its own record): trained on data of anoth" in caplog.text
    assert "was made with wordpiece --wordpiece-cased, not wordpiece;" in caplog.text


def test_rows_are_permuted_in_the_model_and_in_its_average(caplog):
    state = state_of(record(labels=["pos", "neg"]))
    trained = fit_to_data(state, record(labels=["neg", "pos"]), "--path x.pt")
    assert bias(state["model"]) == bias(state["extra_state"]["ema"]) == [1, 0]
    weight = state["model"][f"classification_heads.{HEAD}.out_proj.weight"]
    assert weight.tolist() == [[2, 3], [0, 1]]
    assert state["model"]["encoder.weight"].tolist() == [0, 1]
    assert trained.labels == ["neg", "pos"] == DataRecord.of_checkpoint(state).labels
    assert "pos neg" in caplog.text and "neg pos" in caplog.text and "permuted" in caplog.text
    fit_to_data(state, record(labels=["neg", "pos"]), "--path x.pt")  # once
    assert bias(state["model"]) == [1, 0]


def test_scores_are_rescaled(caplog):
    """Trained on scores as they are, 0 to 5; the data has them divided by 5."""
    known = {"regression": True, "classes": 1}
    state = state_of(record(scale=1.0, **known), rows=2)
    data = record(scale=5.0, **known)
    assert fit_to_data(state, data, "--path x.pt").scale == 5.0
    assert bias(state["model"]) == pytest.approx([0, 0.2])
    assert "divided by 1" in caplog.text and "multiplied by 0.2" in caplog.text
    with pytest.raises(DataMismatchError, match="divided by 1, the data has .* divided by 5"):
        fit_to_data(state_of(record(scale=1.0, **known)), data, "x.pt", rescales=False)


def test_another_head_is_not_the_recorded_one():
    state = state_of(record(labels=["pos", "neg"], head="other"))
    fit_to_data(state, record(labels=["0", "1"]), "--path x.pt", head=HEAD)
    assert bias(state["model"]) == [0, 1]


class TestStart:
    """Of training, from another checkpoint or the same run's."""

    def test_labels(self):
        state = state_of(record(labels=["pos", "neg"]))
        fit_start(state, record(labels=["neg", "pos"]), "x.pt", resumes=False)
        assert bias(state["model"]) == [1, 0]

    def test_resuming_with_labels_in_another_order(self):
        state = state_of(record(labels=["pos", "neg"]))
        with pytest.raises(DataMismatchError, match="pos neg.*neg pos.*--reset-optimizer"):
            fit_start(state, record(labels=["neg", "pos"]), "x.pt", resumes=True)

    @pytest.mark.parametrize(
        "trained, data",
        [
            ({"labels": ["a", "b"]}, {"labels": ["0", "1"]}),
            ({"sentences": 1}, {"sentences": 2}),
            ({"tokens": [None, None]}, {"tokens": [0, None]}),
            ({"encoding": ["wordpiece", {}, False]}, {"encoding": ["wordpiece", {}, True]}),
        ],
    )
    def test_what_training_repairs_is_logged(self, trained, data, caplog):
        state = state_of(record(**trained))
        fit_start(state, record(**data), "x.pt", resumes=False)
        assert bias(state["model"]) == [0, 1] and "training goes on" in caplog.text

    def test_words(self, caplog):
        """An error with a head; a body's words are the user's business."""
        some, others = (words(*order) for order in ("abc", "bac"))
        with pytest.raises(DataMismatchError, match="a b c.*b a c"):
            fit_start(state_of(record(words=some)), record(words=others), "x.pt", resumes=False)
        state = state_of(record(words=some, labels=["a", "b"]))
        fit_start(state, record(words=others, classes=3), "x.pt", resumes=False)
        assert "a b c" in caplog.text

    @pytest.mark.parametrize(
        "trained, data",
        [
            ({"encoding": ["gpt2", {"a": "1"}, False]}, {"encoding": ["gpt2", {"a": "2"}, False]}),
            ({"separators": 1}, {"separators": 2}),
        ],
    )
    def test_how_the_text_of_a_body_was_prepared(self, trained, data, caplog):
        state = state_of(record(**trained))
        fit_start(state, record(**data, classes=3), "x.pt", resumes=False)
        assert "data of another" in caplog.text and "training goes on" in caplog.text

    def test_nothing_is_said_of_a_body_without_record(self, caplog):
        state = {"cfg": {}, "model": {}, "extra_state": {}}
        fit_start(state, record(labels=["a", "b"]), "x.pt", resumes=False)
        assert not caplog.text


@pytest.mark.parametrize("criterion", ["plain", "masked_lm", "label_smoothed_cross_entropy"])
def test_a_run_records_its_data_and_an_older_one_is_known_by_its_folder(
    criterion, data_of, classification, tmp_path
):
    data = data_of.get(criterion, classification)
    state = runs.train(data, tmp_path, "--max-update", "1", criterion=criterion).checkpoint
    found = DataRecord.of_checkpoint(state)
    assert found.words and found.origin == "its own record"
    assert found.labels == (["0", "1"] if criterion == "plain" else None)
    del state["extra_state"][data_record.KEY]
    assert DataRecord.of_checkpoint(state) == found


def test_a_checkpoint_without_record_and_folder(tmp_path, caplog):
    data = tiny.write_classification(tmp_path / "data")
    state = runs.train(data, tmp_path / "run", "--max-update", "1").checkpoint
    del state["extra_state"][data_record.KEY]
    data.rename(tmp_path / "moved")
    fit_to_data(state, DataRecord.of_folder(tmp_path / "moved"), "--path x.pt")
    assert "cannot be compared" in caplog.text


def test_folders():
    """Of fairseq's own preparation, with its fillers, and of none."""
    assert not DataRecord.of_folder("/no/such").known
