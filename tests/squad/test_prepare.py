"""SQuAD's files arrive in the task: characters become tokens, and characters again."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

from deltasam_fairseq.data.binarize import Encoding
from deltasam_fairseq.data.files import DataError
from deltasam_fairseq.squad import prepare as prepare_squad
from deltasam_fairseq.squad import read_json as squad_files
from deltasam_fairseq.squad import write_splits as squad_splits
from deltasam_fairseq.squad.metrics import score_answer
from deltasam_fairseq.squad.read_json import read_squad
from deltasam_fairseq.squad.task import (
    SpanPredictionConfig,
    SpanPredictionTask,
)
from deltasam_fairseq.squad.token_offsets import encode
from deltasam_fairseq.squad.windows import Layout, own_ranges, window_ranges

# Characters of one to four bytes, accents in two ways, a ligature, spaces of several kinds.
CONTEXT = (
    "The  caf\xe9 (founded 1889) in Z\xfcrich\u2014 owned by Ren\xe9e O\u2019Neill \u2014 "
    "sells \u6771\u4eac tea, \U0001f600 cakes;\tcosts \u20ac12,50\xa0each. \ufb01nal cafe\u0301 end"
)
ANSWERS = [
    "caf\xe9",
    "1889",
    "Z\xfcrich",
    "Ren\xe9e O\u2019Neill",
    "\u6771\u4eac tea",
    "\U0001f600 cakes",
    "\u20ac12,50\xa0each",
    "end",
    "The",
]


@pytest.fixture(scope="module")
def bpes(tmp_path_factory):
    """name -> files of a small BPE of that kind, as options, and the path of its dict.txt."""
    folder = tmp_path_factory.mktemp("bpes")
    letters = list(bytes_to_unicode().values())
    pieces = {piece: i for i, piece in enumerate([*letters, "th", "\u0120t"])}
    (folder / "encoder.json").write_text(json.dumps(pieces))
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\n\u0120 t\n")
    (folder / "gpt2.txt").write_text("".join(f"{i} 1\n" for i in pieces.values()))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CONTEXT, "who owns the caf\xe9 what does it cost"] * 5),
        model_prefix=str(folder / "spm"),
        vocab_size=55,
        character_coverage=1.0,
        minloglevel=2,
    )
    lines = (folder / "spm.vocab").read_text(encoding="utf-8").splitlines()
    known = [line.split("\t")[0] for line in lines][3:]
    (folder / "sentencepiece.txt").write_text("".join(f"{piece} 1\n" for piece in known), "utf-8")
    words = (
        "the cafe founded in zurich owned by renee o neill sells tea cakes costs each end".split()
    )
    signs = [*"abcdefghijklmnopqrstuvwxyz0123456789().,;\u2014\u2019\u20ac\u6771\u4eac\U0001f600"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *signs]
    vocabulary += [f"##{sign}" for sign in signs]
    (folder / "vocab.txt").write_text("".join(f"{w}\n" for w in dict.fromkeys(vocabulary)), "utf-8")
    known = list(dict.fromkeys(vocabulary))[5:]
    (folder / "wordpiece.txt").write_text("".join(f"{piece} 1\n" for piece in known), "utf-8")
    files = {
        "gpt2": {
            "gpt2_encoder_json": folder / "encoder.json",
            "gpt2_vocab_bpe": folder / "vocab.bpe",
        },
        "sentencepiece": {"sentencepiece_model": folder / "spm.model"},
        "wordpiece": {"wordpiece_vocab": folder / "vocab.txt"},
    }
    return {
        name: ({k: str(v) for k, v in options.items()}, str(folder / f"{name}.txt"))
        for name, options in files.items()
    }


BPES = ("gpt2", "sentencepiece", "wordpiece")


def needs(bpe):
    if bpe == "wordpiece":
        pytest.importorskip("tokenizers")


@pytest.mark.parametrize("bpe", BPES)
def test_an_answer_survives_the_way_to_tokens_and_back(bpes, bpe):
    needs(bpe)
    options, dictionary = bpes[bpe]
    (found,) = encode(Encoding(bpe, tuple(options.items()), dictionary), [CONTEXT])
    assert found.tokens.shape == (len(found.offsets),)
    for answer in ANSWERS:
        begin = CONTEXT.index(answer)
        first, last = found.span(begin, begin + len(answer))
        assert CONTEXT[found.offsets[first][0] : found.offsets[last][1]] == answer
    # Offsets never go back, and no character but white space is skipped.
    assert (np.diff(found.offsets[:, 0]) >= 0).all()
    covered = {i for begin, end in found.offsets for i in range(begin, end)}
    assert all(i in covered for i in range(len(CONTEXT)) if not CONTEXT[i].isspace())


@pytest.mark.parametrize("bpe", BPES)
def test_tokens_are_those_of_fairseqs_encoder(bpes, bpe):
    needs(bpe)
    from deltasam_fairseq.data.binarize import numbers

    options, dictionary = bpes[bpe]
    encoding = Encoding(bpe, tuple(options.items()), dictionary)
    text = "who owns the caf\xe9 in Z\xfcrich"
    np.testing.assert_array_equal(
        encode(encoding, [text])[0].tokens, numbers(encoding, [text])[0][:-1]
    )


def test_an_answer_inside_of_a_token_gives_the_token(bpes):
    """ "th" is one token of this GPT-2: the h alone is not to be had."""
    options, dictionary = bpes["gpt2"]
    (found,) = encode(Encoding("gpt2", tuple(options.items()), dictionary), ["math x"])
    assert found.offsets.tolist() == [[0, 1], [1, 2], [2, 4], [5, 5], [5, 6]]
    assert found.span(3, 4) == (2, 2)
    assert found.span(5, 6) == (4, 4)  # not the space before it


@pytest.mark.parametrize("cased", [False, True])
@pytest.mark.parametrize(
    "before, answer",
    [
        ("the ", "cafe\u0301"),
        ("", "\u0301cafe"),
        ("the ", "\u0939\u093f\u0928\u094d\u0926\u0940"),  # Hindi, with a virama inside
        ("the ", "\u0e17\u0e35\u0e48"),  # Thai, with two marks at the end
        ("the ", "\u0643\u062a\u0628\u064e"),  # Arabic, with a vowel sign at the end
        ("the ", "\u05e9\u05b8\u05dc\u05b9"),  # Hebrew, with a point at the end
        ("the cafe, ", "cafe\ufffd"),  # BERT drops the replacement character
    ],
)
def test_a_token_has_the_accents_that_bert_drops(bpes, before, answer, cased):
    """A model that finds the right tokens gets exact match 1 and F1 1."""
    needs("wordpiece")
    options, dictionary = bpes["wordpiece"]
    words = (*options.items(), ("wordpiece_cased", cased))
    text = f"{before}{answer} end"
    (found,) = encode(Encoding("wordpiece", words, dictionary), [text])
    first, last = found.span(len(before), len(before) + len(answer))
    predicted = text[found.offsets[first][0] : found.offsets[last][1]]
    assert score_answer(predicted, [answer], version_2=False) == (1, 1)


def random_text(rng):
    letters = "abcTHE \u00e9\u00fc\u0939\u0928\u0e17\u0643\u05e9\u6771\ufb01\U0001f600,.\u2019"
    marks = "\u0301\u0308\u094d\u0e35\u064e\u05b8\u200d\u200b\ufeff\u00ad\ufffd\x07\u20dd"
    spaces = " \t\n\xa0\u3000"
    kinds = rng.choice([letters, letters, marks, spaces], size=rng.randint(5, 40))
    return "".join(rng.choice(list(kind)) for kind in kinds)


def is_visible(char):
    return not char.isspace() and unicodedata.category(char) not in ("Cc", "Cf")


@pytest.mark.parametrize("bpe", ["gpt2", "sentencepiece", "wordpiece", "cased"])
def test_answers_in_random_texts_are_covered(bpes, bpe):
    """An answer is in the text of its tokens, or begins or ends with a word that has no token."""
    kind = "wordpiece" if bpe == "cased" else bpe
    needs(kind)
    options, dictionary = bpes[kind]
    more = (("wordpiece_cased", True),) if bpe == "cased" else ()
    rng = np.random.RandomState(1)
    texts = [random_text(rng) for _ in range(1500)]
    encoding = Encoding(kind, (*options.items(), *more), dictionary)
    refused = 0
    for text, found in zip(texts, encode(encoding, texts)):
        begin, end = sorted(rng.choice(len(text) + 1, size=2, replace=False))
        visible = [i for i in range(begin, end) if is_visible(text[i])]
        if not visible:
            continue
        begins = [b for b, e in found.offsets if b < e]
        assert begins == sorted(begins)
        covered = found.covers(text, begin, end)
        if covered:
            first, last = found.span(begin, end)
            start, stop = found.offsets[first][0], found.offsets[last][1]
            assert start <= visible[0] and visible[-1] < stop
        else:
            refused += 1
            taken = {i for b, e in found.offsets for i in range(b, e)}
            words = [word_of(text, i) for i in (visible[0], visible[-1])]
            assert any(not taken & set(word) for word in words)
    assert refused == 0 if bpe == "gpt2" else refused < 150


def word_of(text, i):
    """The places of the characters around ``i`` up to white space."""
    begin = end = i
    while begin and not text[begin - 1].isspace():
        begin -= 1
    while end < len(text) and not text[end].isspace():
        end += 1
    return range(begin, end)


def test_an_answer_of_dropped_characters_is_no_missing_answer(bpes, tmp_path):
    needs("wordpiece")
    context = "the cafe \u0301 end"
    lost = {"answers": [{"text": "\u0301", "answer_start": 9}]}
    kept = {"answers": [{"text": "cafe", "answer_start": 4}]}
    train = write(tmp_path / "train.json", squad(lost, kept, context=context))
    words = (bpes, "wordpiece", tmp_path / "bin", "--train", train, *SMALL)
    with pytest.raises(DataError, match="question q0: the answer .* drops.*--any-rows"):
        prepare(*words)
    assert not (tmp_path / "bin").exists()
    prepare(*words, "--any-rows")
    content = json.loads((tmp_path / "bin" / "train.json").read_text())
    assert [name for name, _, _ in content["questions"]] == ["q1"]


# Windows


def test_window_ranges_by_hand():
    assert window_ranges(5, room=5, stride=2) == [(0, 5)]
    assert window_ranges(6, room=5, stride=2) == [(0, 5), (2, 6)]
    assert window_ranges(10, room=4, stride=3) == [(0, 4), (3, 7), (6, 10)]
    assert window_ranges(8, room=4, stride=4) == [(0, 4), (4, 8)]


def test_own_ranges_by_hand():
    """Tokens 0 to 4 and 2 to 5.  Token 2 has a context of 2 in the first and 0 in the second, token
    3 of 1 in both, and the first is longer, token 4 of 0 and 1."""
    assert own_ranges([(0, 5), (2, 6)]) == [(0, 4), (4, 6)]


def test_own_ranges_of_a_long_context_need_no_table_of_windows_by_tokens():
    """Windows of 5 tokens, one token apart: each owns its middle one. A table has 320 GB."""
    own = own_ranges(window_ranges(200_000, room=5, stride=1))
    assert own[:2] == [(0, 3), (3, 4)] and own[-1] == (199_997, 200_000)
    assert sum(end - begin for begin, end in own) == 200_000


@pytest.mark.parametrize("length", [1, 7, 20, 61])
@pytest.mark.parametrize("room, stride", [(10, 3), (10, 10), (5, 1)])
def test_windows_cover_all_and_every_token_has_one_window(length, room, stride):
    ranges = window_ranges(length, room, stride)
    assert all(end - begin <= room for begin, end in ranges)
    assert ranges[-1][1] == length and len(ranges) == 1 + max(0, -(-(length - room) // stride))
    own = own_ranges(ranges)
    assert sorted(t for begin, end in own for t in range(begin, end)) == list(range(length))
    assert all(a <= c and d <= b for (a, b), (c, d) in zip(ranges, own))


def test_layout_by_hand():
    """<s> q q </s></s> c c c </s>, with 3 of 4 tokens of the context and 2 of 3 of the question."""
    layout = Layout(length=9, stride=1, query=2, separators=2)
    found = layout.windows(np.array([7, 7, 7]), np.array([11, 12, 13, 14]), (2, 3), bos=0, eos=2)
    assert [list(w.tokens) for w in found] == [
        [0, 7, 7, 2, 2, 11, 12, 13, 2],
        [0, 7, 7, 2, 2, 12, 13, 14, 2],
    ]
    assert [(w.start, w.end) for w in found] == [(0, 0), (6, 7)]  # cut in the first: none there
    assert [(w.begin, w.stop, w.first) for w in found] == [(5, 8, 0), (5, 8, 1)]


# Files


def squad(*questions, context=CONTEXT, **top):
    """Content of a file; questions are dicts, completed here."""
    qas = [
        {"id": f"q{i}", "question": "who owns the caf\xe9", **q} for i, q in enumerate(questions)
    ]
    return {**top, "data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]}


def gold(*texts):
    return {"answers": [{"text": t, "answer_start": CONTEXT.index(t)} for t in texts]}


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


IMPOSSIBLE = {"answers": [], "is_impossible": True}


def test_both_versions_are_told_apart(tmp_path):
    one = read_squad(write(tmp_path / "one.json", squad(gold("1889", "tea"), version="1.1")))
    assert not one.version_2 and [a.text for a in one.questions[0].answers] == ["1889", "tea"]
    both = squad(gold("1889"), {**gold("tea"), "is_impossible": False}, IMPOSSIBLE)
    two = read_squad(write(tmp_path / "two.json", both))
    assert two.version_2 and [len(q.answers) for q in two.questions] == [1, 1, 0]
    assert read_squad(write(tmp_path / "v2.json", squad(gold("1889"), version="v2.0"))).version_2


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"error": 403}', "an error page"),
        (b"<html>", "an error page"),
        (b'{"data": [', "not JSON.*cut short"),
        (b"{}", "not SQuAD's layout.*data"),
        (b"[1]", "not SQuAD's layout"),
        (b'{"data": []}', "no questions"),
        (json.dumps(squad({})).encode(), "q0: no answers with text.*--test"),
        (json.dumps(squad({"answers": []})).encode(), "q0: no answer; in SQuAD 2.0"),
        (
            json.dumps(squad({"answers": [{"text": "tea", "answer_start": 1}]})).encode(),
            "q0: the answer 'tea' does not stand at character 1 .*--any-rows",
        ),
        (json.dumps(squad(gold("tea"), {**gold("tea"), "id": "q0"})).encode(), "two.*id q0"),
    ],
)
def test_broken_files_are_named(content, message, tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"train.json.*{message}"):
        read_squad(path)


SURROGATE = "caf\xe9 \ud83d cut"


@pytest.mark.parametrize(
    "content, message",
    [
        (
            squad(gold("tea"), context=None),
            r"data\[0\].paragraphs\[0\]: context is null",
        ),
        (squad({**gold("tea"), "question": None}), "question q0: question is null, not a string"),
        (squad({**gold("tea"), "id": 7}), r"paragraphs\[0\].qas\[0\]: id is 7, not a string"),
        (
            squad(gold("tea"), {**gold("tea"), "is_impossible": "false"}),
            'question q1: is_impossible is "false", not true or false',
        ),
        (squad({"answers": {"text": "tea"}}), "question q0: answers is {.*, not a list"),
        (
            squad({"answers": [{"text": None, "answer_start": 0}]}),
            "question q0: text is null, not a string",
        ),
        (
            squad({"answers": [{"text": "tea", "answer_start": "3"}]}),
            'question q0: answer_start is "3", not a whole number',
        ),
        (
            squad({"answers": [{"text": "tea", "answer_start": True}]}),
            "question q0: answer_start is true, not a whole number",
        ),
        (
            squad(gold("tea"), context=SURROGATE),
            r"paragraphs\[0\]: context has half of a surrogate pair, '\\ud83d', at character 5",
        ),
        (squad({**gold("tea"), "question": SURROGATE}), "question q0: question has half"),
    ],
)
def test_no_value_is_taken_for_another(content, message, tmp_path):
    path = write(tmp_path / "train.json", content)
    with pytest.raises(DataError, match=message) as raised:
        read_squad(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize("version", ["1.1", "v2.0"])
def test_a_test_file_of_empty_lists_has_no_answers(version, tmp_path):
    content = squad({"answers": []}, {"answers": []}, version=version)
    path = write(tmp_path / "test.json", content)
    assert not read_squad(path, labelled=False).labelled
    known = squad(gold("tea"), IMPOSSIBLE, version=version)
    assert read_squad(write(path, known), labelled=False).labelled


class Counted(str):
    """A string that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Counted.compared += 1
        return str.__eq__(self, other)


def test_two_equal_ids_are_found_without_comparing_all_with_all():
    ids = [Counted(i) for i in [*range(1000), 999]]
    with pytest.raises(DataError, match="two questions have the id 999"):
        squad_files._check_questions(Path("x.json"), ids, any_rows=False)
    assert Counted.compared < 10


def test_official_files_are_counted(tmp_path):
    path = write(tmp_path / "dev-v2.0.json", squad(gold("tea")))
    with pytest.raises(DataError, match="1 questions, official are 11873"):
        read_squad(path)
    assert len(read_squad(path, any_rows=True).questions) == 1


def test_misplaced_answers_are_dropped_when_asked_to(tmp_path):
    wrong = {"answers": [{"text": "tea", "answer_start": 1}]}
    path = write(tmp_path / "x.json", squad(wrong, gold("tea")))
    found = read_squad(path, any_rows=True)
    assert [q.id for q in found.questions] == ["q1"] and found.dropped == 1


# From files to the task


def command(bpes, bpe, out, *words):
    options, dictionary = bpes[bpe]
    files = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v)]
    return [*map(str, words), "--out", str(out), "--dict", dictionary, "--bpe", bpe, *files]


def prepare(*words):
    prepare_squad.prepare(prepare_squad.parser().parse_args(command(*words)))


SMALL = ("--max-seq-length", "48", "--doc-stride", "9", "--max-query-length", "18")


@pytest.mark.parametrize("bpe", BPES)
def test_the_task_reads_what_was_prepared(bpes, bpe, tmp_path):
    """The target of some window is the answer, and every window's context is what it says."""
    needs(bpe)
    content = squad(*(gold(answer) for answer in ANSWERS), IMPOSSIBLE, version="v2.0")
    train = write(tmp_path / "train.json", content)
    prepare(bpes, bpe, tmp_path / "bin", "--train", train, "--valid", train, *SMALL)
    config = SpanPredictionConfig(data=str(tmp_path / "bin"), max_positions=48, seed=1)
    task = SpanPredictionTask.setup_task(config)
    for split in ("train", "valid"):
        dataset = task.load_dataset(split)
        found = {}
        samples = [dataset.collater([dataset[i]]) for i in range(len(dataset))]
        assert len(samples) > len(ANSWERS) + 1
        for sample in samples:
            tokens = sample["net_input"]["src_tokens"][0].tolist()
            where = {name: int(column) for name, column in sample["window"].items()}
            separators = 1 if bpe == "wordpiece" else 2
            assert tokens[0] == 0 and tokens[-1] == 2 and len(tokens) == where["stop"] + 1 <= 48
            assert tokens[where["begin"] - separators : where["begin"]] == [2] * separators
            question = task.questions[where["question"]]
            (start, end) = sample["target"][0].tolist()
            if end:
                shift = where["first"] - where["begin"]
                text = question.text(start + shift, end + shift)
                found[question.id] = text
                assert (text,) == question.answers
        assert found == {f"q{i}": answer for i, answer in enumerate(ANSWERS)}
        assert question.version_2


def test_run_again(bpes, tmp_path, capsys):
    """Nothing is done twice; another option, another file, or a missing one is."""
    train = write(tmp_path / "train.json", squad(gold("tea")))
    valid = write(tmp_path / "valid.json", squad(gold("1889")))
    words = (bpes, "gpt2", tmp_path / "bin", "--train", train, "--valid", valid)

    def states(*more):
        prepare(*words, *more)
        lines = capsys.readouterr().out.splitlines()
        return [line.split(":")[0] for line in lines if "already there" not in line]

    assert states() == ["train", "valid"] and states() == []
    assert states("--doc-stride", "100") == ["train", "valid"]
    prepare(*words)
    write(valid, squad(gold("tea")))
    capsys.readouterr()
    assert states() == ["valid"]
    (tmp_path / "bin" / "train.offsets.idx").unlink()
    assert states() == ["train"]


def test_a_cut_run_leaves_whole_splits_only(bpes, tmp_path, monkeypatch):
    train = write(tmp_path / "train.json", squad(gold("tea")))
    words = (bpes, "gpt2", tmp_path / "bin", "--train", train, "--valid", train)
    original, done = squad_splits.write_split, []

    def cut(split, *args):
        if done:
            raise KeyboardInterrupt
        done.append(split.name)
        return original(split, *args)

    monkeypatch.setattr(squad_splits, "write_split", cut)
    with pytest.raises(KeyboardInterrupt):
        prepare(*words)
    record = json.loads((tmp_path / "bin" / "task.json").read_text())
    assert list(record["splits"]) == ["train"]
    done.clear()
    prepare(*words)  # finishes: train is not made again
    assert done == ["valid"]


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_splits_that_are_not_asked_for_stay(bpes, tmp_path):
    """Wherever the files of the BPE are; with other options or another BPE they would not fit."""
    train = write(tmp_path / "train.json", squad(gold("tea")))
    out = tmp_path / "bin"
    prepare(bpes, "gpt2", out, "--train", train, "--valid", train, *SMALL)
    before = state(out)
    options, dictionary = bpes["gpt2"]
    moved = {"gpt2": (options, shutil.copy(dictionary, str(tmp_path / "moved.txt")))}
    prepare(moved, "gpt2", out, "--test", train, *SMALL)
    after = state(out)
    assert list(json.loads(after["task.json"])["splits"]) == ["train", "valid", "test"]
    assert all(after[name] == before[name] for name in before if name != "task.json")
    for kind, options, key in (
        ("gpt2", ["--max-seq-length", "47"], "max_seq_length"),
        ("sentencepiece", [], "bpe"),
    ):
        with pytest.raises(DataError, match=f"has train, valid, made with another {key}: .*--out"):
            prepare(bpes, kind, out, "--test", train, *SMALL, *options)
    assert state(out) == after


def test_an_error_leaves_the_folder_as_it_was(bpes, tmp_path):
    """Also one that the BPE or the dict.txt shows, and in the last of the files."""
    train = write(tmp_path / "train.json", squad(gold("tea")))
    valid = write(tmp_path / "valid.json", squad(gold("tea")))
    words = ("gpt2", tmp_path / "bin", "--train", train, "--valid", valid)
    prepare(bpes, *words)
    before = state(tmp_path / "bin")
    mixed = {"gpt2": (bpes["gpt2"][0], bpes["sentencepiece"][1])}
    with pytest.raises(DataError, match="tokens are not in --dict"):
        prepare(mixed, *words)
    write(train, squad(gold("1889")))
    write(valid, squad(IMPOSSIBLE, context=""))
    with pytest.raises(DataError, match="valid.json, question q0: its context is empty"):
        prepare(bpes, *words)
    assert state(tmp_path / "bin") == before


def test_workers_give_the_same(bpes, tmp_path):
    content = squad(*(gold(answer) for answer in ANSWERS))
    train = write(tmp_path / "train.json", content)
    for workers in ("1", "2"):
        prepare(bpes, "gpt2", tmp_path / workers, "--train", train, "--workers", workers, *SMALL)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / w).iterdir()} for w in ("1", "2"))
    assert one == two and len(one) == 8


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give --train, --valid or --test"),
        (["--train", "/no/such.json"], "--train /no/such.json: no such file"),
        (["--max-seq-length", "100"], "--max-seq-length 100.*32 tokens.*--doc-stride 128"),
    ],
)
def test_wrong_options(words, message, bpes, tmp_path):
    train = write(tmp_path / "train.json", squad(gold("tea")))
    given = words if not words or "--train" in words else ["--train", train, *words]
    with pytest.raises(DataError, match=message):
        prepare(bpes, "gpt2", tmp_path / "bin", *given)
    assert not (tmp_path / "bin").exists()


def test_a_dict_of_another_bpe_is_refused(bpes, tmp_path):
    train = write(tmp_path / "train.json", squad(gold("tea")))
    mixed = {"gpt2": (bpes["gpt2"][0], bpes["sentencepiece"][1])}
    with pytest.raises(DataError, match="tokens are not in --dict"):
        prepare(mixed, "gpt2", tmp_path / "bin", "--train", train)


def test_the_program_exits_with_one_line(bpes, tmp_path):
    words = command(bpes, "gpt2", tmp_path / "bin", "--train", tmp_path / "no.json")
    result = subprocess.run(
        [sys.executable, "-m", "deltasam_fairseq.squad.prepare", *words],
        stderr=subprocess.PIPE,
        universal_newlines=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        "python -m deltasam_fairseq.squad.prepare: --train "
    )
