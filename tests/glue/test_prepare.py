"""Data preparation: each row of GLUE's files arrives in fairseq, once; broken files are named."""

import filecmp
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fairseq.data import Dictionary, data_utils
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode, get_encoder
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask

from deltasam_fairseq.data.files import DataError
from deltasam_fairseq.glue import prepare as prepare_glue
from deltasam_fairseq.glue import write_splits as glue_splits
from deltasam_fairseq.glue.tasks import GLUE, TASKS, check_rows, find_file, read_table
from deltasam_fairseq.glue.training_rows import draw_rows

# Rows of train, the dev files and the test files, as GLUE publishes them.
OFFICIAL = {
    "CoLA": ([8551], [1043], [1063]),
    "SST-2": ([67349], [872], [1821]),
    "MRPC": ([3668], [408], [1725]),
    "STS-B": ([5749], [1500], [1379]),
    "QQP": ([363846], [40430], [390965]),
    "MNLI": ([392702], [9815, 9832], [9796, 9847]),
    "QNLI": ([104743], [5463], [5463]),
    "RTE": ([2490], [277], [3000]),
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Files of a GPT-2 BPE of the 256 bytes and one merge, and the dict.txt to it."""
    folder = tmp_path_factory.mktemp("gpt2")
    letters = list(bytes_to_unicode().values())
    pieces = {piece: i for i, piece in enumerate([*letters, "th"])}
    (folder / "encoder.json").write_text(json.dumps(pieces))
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\n")
    (folder / "dict.txt").write_text("".join(f"{i} 1\n" for i in pieces.values()))
    return folder


def options_of(gpt2):
    files = (
        ("dict", "dict.txt"),
        ("gpt2-encoder-json", "encoder.json"),
        ("gpt2-vocab-bpe", "vocab.bpe"),
    )
    return [word for name, file in files for word in (f"--{name}", gpt2 / file)]


def prepare(glue, out, task, gpt2, *words):
    arguments = ["--glue-dir", glue, "--out", out, "--task", task, *options_of(gpt2), *words]
    prepare_glue.prepare(prepare_glue.parser().parse_args([str(word) for word in arguments]))


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(row) + "\n" for row in rows).encode())


def write_sst(glue, train, dev, test=()):
    """SST-2's layout; its rows are (sentence, label)."""
    write(glue / "SST-2" / "train.tsv", ("sentence", "label"), *train)
    write(glue / "SST-2" / "dev.tsv", ("sentence", "label"), *dev)
    if test:
        rows = [(str(i), sentence) for i, sentence in enumerate(test)]
        write(glue / "SST-2" / "test.tsv", ("index", "sentence"), *rows)


def sentences(out, split, gpt2, column=0):
    """The sentences of a split, decoded again."""
    dictionary = Dictionary.load(str(out / f"input{column}" / "dict.txt"))
    bpe = get_encoder(str(gpt2 / "encoder.json"), str(gpt2 / "vocab.bpe"))
    data = data_utils.load_indexed_dataset(str(out / f"input{column}" / split), dictionary)
    assert all(item[-1] == dictionary.eos() for item in data)
    return [bpe.decode([int(dictionary[i]) for i in item[:-1]]) for item in data]


def load(out, split, classes, regression=False):
    """The split as fairseq's own task reads it."""
    config = SentencePredictionConfig(data=str(out), num_classes=classes, init_token=0, seed=1)
    config.separator_token, config.regression_target = 2, regression
    config.classification_head_name = "head"
    return SentencePredictionTask.setup_task(config).load_dataset(split)


def same(one, other):
    """Whether two folders hold the same files with the same bytes."""
    names = [sorted(p.relative_to(d) for p in d.rglob("*") if p.is_file()) for d in (one, other)]
    assert names[0] == names[1]
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])


QUOTING = [
    'He said " yes',
    "no quotation",
    'a 5" disk',
    '" both "',
    "it 's \\ \u2028 caf\xe9\x85 x\ry",
]


def test_a_quotation_mark_swallows_no_line(tmp_path, gpt2):
    """Nor does any other character that some reader takes for an end of a line."""
    write_sst(tmp_path, [(text, "1") for text in QUOTING], [(QUOTING[0], "0")])
    prepare(tmp_path, tmp_path / "out", "SST-2", gpt2, "--any-rows")
    assert sentences(tmp_path / "out", "train", gpt2) == QUOTING
    assert sentences(tmp_path / "out", "valid", gpt2) == QUOTING[:1]


@pytest.mark.parametrize("name", GLUE)
def test_official_rows(name):
    task, (train, dev, test) = TASKS[name], OFFICIAL[name]
    files = zip((*task.splits().values(), *task.test_splits().values()), [*train, *dev, *test])
    for file, rows in files:
        path = Path("GLUE", name, f"{file}.tsv")
        check_rows(path, name, task, rows)
        message = f"{path}: {rows - 1} rows, official are {rows}.*--any-rows"
        with pytest.raises(DataError, match=message):
            check_rows(path, name, task, rows - 1)


def test_older_releases():
    for rows in (363849, 363870):
        check_rows(Path("train.tsv"), "QQP", TASKS["QQP"], rows)
    with pytest.raises(DataError, match="108436 rows.*QNLI v1"):
        check_rows(Path("train.tsv"), "QNLI", TASKS["QNLI"], 108436)
    with pytest.raises(DataError, match="dev_ids"):
        check_rows(Path("train.tsv"), "MRPC", TASKS["MRPC"], 4076)


def test_rows_are_checked_and_any_rows_goes_on(tmp_path, gpt2):
    write_sst(tmp_path, [("a", "1")], [("b", "0")])
    with pytest.raises(DataError, match=r"train.tsv: 1 rows, official are 67349"):
        prepare(tmp_path, tmp_path / "out", "SST-2", gpt2)
    assert not (tmp_path / "out").exists()
    prepare(tmp_path, tmp_path / "out", "SST-2", gpt2, "--any-rows")
    with pytest.raises(DataError, match="1 rows"):  # also when all is there
        prepare(tmp_path, tmp_path / "out", "SST-2", gpt2)


MNLI = "promptID pairID genre parse parse parse parse sentence1 sentence2".split()
STS = "genre filename year old_index source1 source2 sentence1 sentence2".split()
LAYOUTS = {  # header of train and dev, header of test
    "CoLA": ("", "index sentence"),
    "SST-2": ("sentence label", "index sentence"),
    "MRPC": ("Quality,#1 ID,#2 ID,#1 String,#2 String", "index,#1 ID,#2 ID,#1 String,#2 String"),
    "STS-B": (" ".join(["index", *STS, "score"]), " ".join(["index", *STS])),
    "QQP": ("id qid1 qid2 question1 question2 is_duplicate", "id question1 question2"),
    "MNLI": (" ".join(["index", *MNLI, "label1", "gold_label"]), " ".join(["index", *MNLI])),
    "QNLI": ("index question sentence label", "index question sentence"),
    "RTE": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
}


@pytest.mark.parametrize("name", GLUE)
def test_columns(name, tmp_path):
    task, path = TASKS[name], tmp_path / "x.tsv"
    label = task.labels[-1] if task.labels else "2.5"
    for labelled, header in zip((True, False), LAYOUTS[name]):
        names = re.split(",| (?!ID|String)", header) if header else list(task.names)
        ids = [i for i, column in enumerate(names) if column in ("index", "id")]
        row = [
            label if column == task.label else f"{column}!" if column in task.sentences else "7"
            for column in names
        ]
        write(path, *([names] if header else []), row, row)
        path.write_bytes(b"\xef\xbb\xbf" * bool(header) + path.read_bytes())  # a byte order mark
        table = read_table(path, task, labelled)
        assert table.sentences == [(f"{column}!",) * 2 for column in task.sentences]
        assert table.labels == ((label, label) if labelled else ())
        assert table.ids == (("7", "7") if ids else ("0", "1"))


def test_broken_rows_of_qqp_are_dropped(tmp_path, gpt2, capsys):
    header = LAYOUTS["QQP"][0].split()
    good = ("1", "2", "3", "a?", "b?", "1")
    for file in ("train", "dev"):
        write(tmp_path / "QQP" / f"{file}.tsv", header, good, good[:4], good)
    prepare(tmp_path, tmp_path / "out", "QQP", gpt2, "--any-rows")
    assert "QQP train: 2 rows, 1 broken ones dropped" in capsys.readouterr().out
    assert sentences(tmp_path / "out", "valid", gpt2, column=1) == ["b?", "b?"]


def test_mismatched_part(tmp_path, gpt2):
    header = LAYOUTS["MNLI"][0].split()
    files = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
    for file in files:
        row = ["neutral" if name == "gold_label" else f"{name} {file}" for name in header]
        write(tmp_path / "MNLI" / f"{file}.tsv", header, row)
    prepare(tmp_path, tmp_path / "out", "MNLI", gpt2, "--any-rows")
    for split, file in zip(("train", "valid", "valid1", "test", "test1"), files):
        assert sentences(tmp_path / "out", split, gpt2, column=1) == [f"sentence2 {file}"]
    assert load(tmp_path / "out", "valid1", 3)[0]["target"].tolist() == [2]
    assert "target" not in load(tmp_path / "out", "test1", 3)[0]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "an error page"),
        (b"\n<!DOCTYPE html><html>", "an error page"),
        (b'{\n  "error": {\n    "code": 403', "an error page"),
        (b"PK\x03\x04\x14\x00", "a packed archive: unpack"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"", "line 1: expected columns sentence, label, found nothing"),
        (b"sentence\tlabel\n\n", "has no rows"),
        (b"good film\t1\n", "line 1: expected columns sentence, label, found good film, 1"),
        (b"sentence\tlabel\ngood film\n", "line 2: 1 columns, expected 2 or more"),
        (b"sentence\tlabel\ngood\t1\nbad\t-1\n", "line 3: label '-1', expected one of 0, 1"),
        (b"sentence\tlabel\ncaf\xe9\t1\n", "not UTF-8"),
    ],
)
def test_broken_files(content, message, tmp_path, gpt2):
    write_sst(tmp_path, [], [("a", "1")])
    (tmp_path / "SST-2" / "train.tsv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, tmp_path / "out", "SST-2", gpt2, "--any-rows")
    assert not (tmp_path / "out").exists()


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="--glue-dir is the folder that has RTE/train.tsv"):
        find_file(tmp_path, "RTE", "train")
    (tmp_path / "RTE.zip").touch()
    with pytest.raises(DataError, match=r"unpack .*RTE\.zip"):
        find_file(tmp_path, "RTE", "train")


@pytest.mark.skipif(not shutil.which("awk"), reason="the remedy is an awk command")
def test_remedy_for_the_unsplit_mrpc(tmp_path):
    """The command in the message makes train.tsv and dev.tsv of what the download leaves."""
    folder = tmp_path / "MRPC"
    header = ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    rows = [["1", str(i), str(-i), f'one " {i}', f"two {i}"] for i in range(20)]
    write(folder / "msr_paraphrase_train.txt", header, *rows)
    write(folder / "mrpc_dev_ids.tsv", *(row[1:3] for row in rows[5:8]))
    with pytest.raises(DataError, match="broke off before GLUE's split") as error:
        find_file(tmp_path, "MRPC", "train")
    command = str(error.value).split("run\n")[1]
    subprocess.run(command, shell=True, check=True, cwd=str(folder))
    train, dev = (
        read_table(find_file(tmp_path, "MRPC", file), TASKS["MRPC"]) for file in ("train", "dev")
    )
    assert dev.sentences[1] == ("two 5", "two 6", "two 7")
    assert train.sentences[0] == tuple(row[3] for row in rows[:5] + rows[8:])


def stamps(out):
    """When each file was written, but for those that every run writes."""
    files = [path for path in out.rglob("*") if path.is_file()]
    return {
        path: path.stat().st_mtime_ns
        for path in files
        if path.name not in ("dict.txt", "task.json")
    }


def test_finished_splits_are_skipped_and_changed_ones_redone(tmp_path, gpt2, capsys):
    out = tmp_path / "out"
    write_sst(tmp_path, [("a", "1")], [("b", "0")], ["c"])
    prepare(tmp_path, out, "SST-2", gpt2, "--any-rows")
    before = stamps(out)
    prepare(tmp_path, out, "SST-2", gpt2, "--any-rows")
    assert capsys.readouterr().out.count("already there") == 3
    assert stamps(out) == before

    write_sst(tmp_path, [("a", "1")], [("new", "0")], ["c"])
    prepare(tmp_path, out, "SST-2", gpt2, "--any-rows")
    assert capsys.readouterr().out.count("already there") == 2
    assert sentences(out, "valid", gpt2) == ["new"]

    (out / "input0" / "test.bin").unlink()
    prepare(tmp_path, out, "SST-2", gpt2, "--any-rows")
    assert sentences(out, "test", gpt2) == ["c"]

    other = shutil.copytree(gpt2, tmp_path / "other")
    with (other / "dict.txt").open("a") as file:
        file.write("madeup 1\n")
    capsys.readouterr()
    prepare(tmp_path, out, "SST-2", other, "--any-rows")
    assert "already there" not in capsys.readouterr().out


def test_a_run_that_broke_off_leaves_no_older_split(tmp_path, gpt2, monkeypatch):
    out = tmp_path / "out"
    write_sst(tmp_path, [("a", "1")], [("b", "0")])
    prepare(tmp_path, out, "SST-2", gpt2, "--any-rows")
    write_sst(tmp_path, [("new", "1")], [("new", "0")])
    written, write_items = [], glue_splits.write_items

    def break_off(items, size, prefix):
        written.append(prefix)
        if len(written) == 3:  # sentences and labels of train, then
            raise KeyboardInterrupt
        write_items(items, size, prefix)

    monkeypatch.setattr(glue_splits, "write_items", break_off)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, out, "SST-2", gpt2, "--any-rows")
    assert list(json.loads((out / "task.json").read_text())["splits"]) == ["train"]
    assert not list(out.glob("*/valid.*"))


def test_held_out_rows_of_train_take_the_place_of_dev(tmp_path, gpt2):
    """A fifth of 20 rows is 4; every row is in one part, in its old order; dev.tsv is not read."""
    texts = [f"row {i}" for i in range(20)]
    write_sst(tmp_path, [(text, str(i % 2)) for i, text in enumerate(texts)], [("dev", "0")])
    found = {}
    for out in ("one", "two"):
        prepare(tmp_path, tmp_path / out, "SST-2", gpt2, "--any-rows", "--hold-out", "0.2")
        parts = {s: sentences(tmp_path / out, s, gpt2) for s in ("train", "valid")}
        assert len(parts["valid"]) == 4 and sorted(parts["train"] + parts["valid"]) == sorted(texts)
        assert parts["train"] == [text for text in texts if text in parts["train"]]
        found[out] = parts
        labels = [int(load(tmp_path / out, "valid", 2)[i]["target"]) for i in range(4)]
        assert labels == [texts.index(text) % 2 for text in parts["valid"]]
    assert found["one"] == found["two"]
    assert json.loads((tmp_path / "one" / "task.json").read_text())["hold_out"] == 0.2
    prepare(tmp_path, tmp_path / "one", "SST-2", gpt2, "--any-rows")
    assert sentences(tmp_path / "one", "valid", gpt2) == ["dev"]
    with pytest.raises(DataError, match="--hold-out 0.01: leaves no row"):
        prepare(tmp_path, tmp_path / "no", "SST-2", gpt2, "--any-rows", "--hold-out", "0.01")


def test_fewer_rows_with_wrong_labels(tmp_path, gpt2):
    """10 of 20 rows, 4 labels of them wrong: the same again, listed, recorded; dev stays clean."""
    rows = [(f"row {i}", str(i % 2)) for i in range(20)]
    write_sst(tmp_path, rows, rows[:4])
    words = ("--any-rows", "--train-rows", "10", "--label-noise", "0.4", "--noise-seed", "3")
    prepare(tmp_path, tmp_path / "out", "SST-2", gpt2, *words)
    clean = ("--any-rows", "--train-rows", "10", "--noise-seed", "3")
    prepare(tmp_path, tmp_path / "clean", "SST-2", gpt2, *clean)
    kept = sentences(tmp_path / "out", "train", gpt2)
    assert kept == sentences(tmp_path / "clean", "train", gpt2)
    assert kept == [f"row {i}" for i in draw_rows(20, 10, 3)]

    def labels(out, split):
        return [int(item["target"]) for item in load(tmp_path / out, split, 2)]

    wrong, right = labels("out", "train"), labels("clean", "train")
    assert right == [int(sentence.split()[1]) % 2 for sentence in kept]
    listed = (tmp_path / "out" / "label" / "train.replaced.tsv").read_text().splitlines()
    differ = [i for i in range(10) if wrong[i] != right[i]]
    assert len(differ) == 4
    assert listed == ["row\toriginal\tlabel", *(f"{i}\t{right[i]}\t{wrong[i]}" for i in differ)]
    assert labels("out", "valid") == [0, 1, 0, 1]
    for split, rows in (("kept", [i for i in range(10) if i not in differ]), ("replaced", differ)):
        assert sentences(tmp_path / "out", split, gpt2) == [kept[i] for i in rows]
        assert labels("out", split) == [wrong[i] for i in rows]
    record = json.loads((tmp_path / "out" / "task.json").read_text())
    assert record["label_noise"] == {"share": 0.4, "seed": 3}
    assert record["train_rows"] == {"rows": 10, "seed": 3}
    assert record["splits"]["train"]["replaced_labels"] == 4


def test_held_out_rows_have_wrong_labels_too(tmp_path, gpt2):
    """They are rows of the training data, which a user cannot tell apart."""
    write_sst(tmp_path, [(f"row {i}", str(i % 2)) for i in range(20)], [("dev", "1")])
    words = ("--any-rows", "--label-noise", "0.5", "--hold-out", "0.5")
    prepare(tmp_path, tmp_path / "out", "SST-2", gpt2, *words)
    splits = json.loads((tmp_path / "out" / "task.json").read_text())["splits"]
    found = [splits[split]["replaced_labels"] for split in ("train", "valid")]
    assert sum(found) == 10 and min(found) > 0
    assert sentences(tmp_path / "out", "dev", gpt2) == ["dev"]
    assert splits["replaced"]["rows"] == found[0] == 10 - splits["kept"]["rows"]


def test_changes_that_cannot_be_made(tmp_path, gpt2):
    write_sst(tmp_path, [("row", "0"), ("other", "1")], [("dev", "1")])
    words = ("--any-rows", "--train-rows", "3")
    with pytest.raises(DataError, match="--train-rows 3: .*give 1 to 2"):
        prepare(tmp_path, tmp_path / "out", "SST-2", gpt2, *words)
    with pytest.raises(DataError, match="--label-noise 0.1: leaves no label .* replaced"):
        prepare(tmp_path, tmp_path / "o", "SST-2", gpt2, "--any-rows", "--label-noise", "0.1")
    write_sts(tmp_path, ["1", "2"])
    with pytest.raises(DataError, match="--label-noise 0.5: .* has scores, not classes"):
        words = ("--any-rows", "--label-noise", "0.5")
        prepare(tmp_path, tmp_path / "out", "STS-B", gpt2, *words)


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "nan", "all"])
def test_shares_that_cannot_be_held_out(share, tmp_path, gpt2, capsys):
    with pytest.raises(SystemExit):
        prepare(tmp_path, tmp_path / "out", "SST-2", gpt2, "--hold-out", share)
    assert "--hold-out" in capsys.readouterr().err


def command_of(glue, out, task, gpt2, *words):
    words = ("--glue-dir", glue, "--out", out, "--task", task, *options_of(gpt2), *words)
    return [sys.executable, "-m", "deltasam_fairseq.glue.prepare", *map(str, words)]


def test_resumed_after_a_kill(tmp_path, gpt2):
    """Killed in the second split; its processes end too, and the next run makes the rest."""
    out = tmp_path / "out"
    write_sst(tmp_path, [("a", "1")] * 5, [("a long text " * 40, "0")] * 30000, ["c"])
    command = command_of(tmp_path, out, "SST-2", gpt2, "--any-rows", "--workers", 2)
    process = subprocess.Popen(command, start_new_session=True)
    record, end = out / "task.json", time.monotonic() + 120
    while time.monotonic() < end and '"train"' not in (
        record.exists() and record.read_text() or ""
    ):
        time.sleep(0.01)
    process.kill()
    process.wait()
    splits = json.loads(record.read_text())["splits"]
    assert list(splits) == ["train"]
    while time.monotonic() < end:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("processes are left")
    write_sst(tmp_path, [("a", "1")] * 5, [("b", "0")] * 5, ["c"])
    before = stamps(out / "label")
    prepare(tmp_path, out, "SST-2", gpt2, "--any-rows")
    assert stamps(out / "label").items() > before.items()
    prepare(tmp_path, tmp_path / "uncut", "SST-2", gpt2, "--any-rows")
    assert same(out, tmp_path / "uncut")


def test_any_number_of_workers_gives_the_same(tmp_path, gpt2):
    train = [(f"sentence {i} {'x' * (i % 17)}", str(i % 2)) for i in range(3500)]
    write_sst(tmp_path, train, train[:10], ["c"])
    prepare(tmp_path, tmp_path / "one", "SST-2", gpt2, "--any-rows")
    prepare(tmp_path, tmp_path / "three", "SST-2", gpt2, "--any-rows", "--workers", 3)
    assert same(tmp_path / "one", tmp_path / "three")
    assert sentences(tmp_path / "three", "train", gpt2) == [text for text, _ in train]


def test_several_tasks_in_one_call(tmp_path, gpt2):
    write_sst(tmp_path, [("a", "1")], [("b", "0")])
    rows = LAYOUTS["RTE"][0].split(), ("0", "a", "b", "entailment")
    write(tmp_path / "RTE" / "train.tsv", *rows)
    with pytest.raises(DataError, match="RTE/dev.tsv is missing"):
        prepare(tmp_path, tmp_path / "out", "SST-2", gpt2, "--any-rows", "--task", "SST-2", "RTE")
    assert not (tmp_path / "out").exists()
    write(tmp_path / "RTE" / "dev.tsv", *rows)
    prepare(tmp_path, tmp_path / "out", "SST-2", gpt2, "--any-rows", "--task", "SST-2", "RTE")
    assert sentences(tmp_path / "out" / "RTE-bin", "valid", gpt2, column=1) == ["b"]
    assert sentences(tmp_path / "out" / "SST-2-bin", "valid", gpt2) == ["b"]


LABELS = [("fine", "so so"), ("good", "very good"), ("poor", "bad"), ("ok", "so so")]


@pytest.mark.parametrize("header", [False, True], ids=["numbers", "names"])
def test_own_task_with_labels_of_any_text(header, tmp_path, gpt2):
    top, columns = ([("text", "mood")], ("text", "mood")) if header else ([], ("1", "2"))
    write(tmp_path / "MINE" / "train.tsv", *top, *LABELS)
    write(tmp_path / "MINE" / "dev.tsv", *top, *LABELS[::-1])
    write(tmp_path / "MINE" / "test.tsv", *top[:1], *LABELS[1:3])  # its labels are kept
    out = tmp_path / "out"
    prepare(tmp_path, out, "MINE", gpt2, "--columns", *columns)
    record = json.loads((out / "task.json").read_text())
    assert (record["labels"], record["scale"]) == (["bad", "so so", "very good"], None)
    assert sentences(out, "valid", gpt2) == ["ok", "poor", "good", "fine"]
    for split, classes in (("train", [1, 2, 0, 1]), ("valid", [1, 0, 2, 1]), ("test", [2, 0])):
        data = load(out, split, 3)
        assert [data[i]["target"].item() for i in range(len(classes))] == classes

    write(tmp_path / "MINE" / "dev.tsv", *top, ("odd", "unheard of"))
    with pytest.raises(DataError, match="label 'unheard of', expected one of bad, so so"):
        prepare(tmp_path, out, "MINE", gpt2, "--columns", *columns)


def test_own_task_of_pairs_with_scores(tmp_path, gpt2):
    rows = [("0.5", "one", "two"), ("-3", "three", "four")]
    for file in ("train", "dev"):
        write(tmp_path / "MINE" / f"{file}.tsv", *(rows if file == "train" else rows[::-1]))
    columns = ("--columns", "2,3", "1", "--regression")
    prepare(tmp_path, tmp_path / "plain", "MINE", gpt2, *columns)
    prepare(tmp_path, tmp_path / "scaled", "MINE", gpt2, *columns, "4")
    assert (tmp_path / "plain" / "label" / "train.label").read_text() == "0.5\n-3.0\n"
    assert (tmp_path / "scaled" / "label" / "train.label").read_text() == "0.125\n-0.75\n"
    assert json.loads((tmp_path / "scaled" / "task.json").read_text())["scale"] == 4
    assert load(tmp_path / "scaled", "valid", 1, regression=True)[0]["target"] == [-0.75]


@pytest.mark.parametrize(
    "rows, words, message",
    [
        (LABELS, [], "--task MINE: GLUE has .*--columns"),
        ([("text", "mood"), *LABELS], ["--columns", "1", "2"], "'mood'; give --header yes if"),
        (LABELS, ["--columns", "text", "mood", "--header", "no"], "--header no: --columns text mo"),
        ([("a", "x"), ("b", "x ")], ["--columns", "1", "2"], "every row has the label 'x'"),
        (
            [("a", "0"), ("b", "1"), ("c", "1.0")],
            ["--columns", "1", "2", "--header", "no"],
            "the labels '1' and '1.0' are the same number",
        ),
        ([*LABELS, ('"a', "b", "c")], ["--columns", "1", "2"], "marks do not quote here"),
        (LABELS, ["--columns", "text", "mood"], "expected columns text, mood, found fine, so so"),
        (LABELS, ["--columns", "1,1,1", "2"], "one or two sentences"),
        (LABELS, ["--columns", "1", "2", "--regression"], "line 1: label 'so so', expected a n"),
        ([*LABELS, ("a", "b", "c")], ["--columns", "1", "2"], "line 5: 3 columns, expected 2 as"),
        ([("a", "<unk>")], ["--columns", "1", "2"], "a label is '<unk>'"),
    ],
)
def test_own_task_that_is_not_right(rows, words, message, tmp_path, gpt2):
    write(tmp_path / "MINE" / "train.tsv", *rows)
    write(tmp_path / "MINE" / "dev.tsv", *rows[-1:0:-1])
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, tmp_path / "out", "MINE", gpt2, *words)


NAMED = ("text", "mood")


@pytest.mark.parametrize(
    "rows, columns, message",
    [
        ([("text", "text", "mood"), ("a", "b", "x"), ("c", "d", "y")], NAMED, "is named text"),
        ([NAMED, *LABELS], ("mood", "mood"), "--columns mood mood: a column is named twice"),
        ([NAMED, *LABELS], ("text,text", "mood"), "a column is named twice"),
        ([NAMED, ("a", "caf\u00e9"), ("b", "cafe\u0301"), ("c", "x")], NAMED, "look the same"),
        ([NAMED, ("a", "pos"), ("b", "pos\u200b"), ("c", "x")], NAMED, r"'pos\\u200b' look the s"),
        ([("\r".join("\t".join(row) for row in LABELS),)], ("1", "2"), "carriage return alone"),
    ],
)
def test_what_is_seldom_meant_is_refused(rows, columns, message, tmp_path, gpt2):
    write(tmp_path / "MINE" / "train.tsv", *rows)
    write(tmp_path / "MINE" / "dev.tsv", *rows)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, tmp_path / "out", "MINE", gpt2, "--columns", *columns)


def test_labels_that_differ_in_case_are_named(tmp_path, gpt2, capsys):
    rows = [("a", "pos"), ("b", "Pos"), ("c", "neg"), ("d", "pos")]
    labels, _ = prepare_own(tmp_path, tmp_path / "out", gpt2, train=rows, dev=rows[::-1])
    assert labels == ["Pos", "neg", "pos"]
    assert "labels 'Pos' and 'pos' differ in case: they are two" in capsys.readouterr().out


def test_labels_of_test_that_are_not_known(tmp_path, gpt2):
    files = {"train": LABELS, "dev": LABELS, "test": [("new", "?"), ("newer", "?")]}
    with pytest.raises(DataError, match="test.tsv, line 1: label .* remove the column"):
        prepare_own(tmp_path, tmp_path / "out", gpt2, **files)


def test_sentences_without_text_are_counted(tmp_path, gpt2, capsys):
    files = {"train": [*LABELS, ("", "bad"), (" ", "bad")], "dev": LABELS}
    prepare_own(tmp_path, tmp_path / "out", gpt2, **files)
    output = capsys.readouterr().out
    assert "train.tsv: 2 rows have a sentence without text, the first in line 5" in output
    assert "dev.tsv" not in output


def prepare_own(glue, out, gpt2, *words, **files):
    """Prepare MINE of numbered columns; return its labels, and the sentences of each split."""
    for file in ("train", "dev", "test"):
        (glue / "MINE" / f"{file}.tsv").unlink() if (glue / "MINE" / f"{file}.tsv").exists() else 0
    for file, rows in files.items():
        write(glue / "MINE" / f"{file}.tsv", *rows)
    prepare(glue, out, "MINE", gpt2, "--columns", "1", "2", *words)
    record = json.loads((out / "task.json").read_text())
    return record["labels"], {split: sentences(out, split, gpt2) for split in record["splits"]}


def test_a_header_line_over_numbered_columns(tmp_path, gpt2, capsys):
    """It is no class, and no sentence to predict."""
    top = ("text", "mood")
    files = {"train": [top, *LABELS], "dev": [top, *LABELS[::-1]], "test": [top[:1], ("new",)]}
    for words in ((), ("--header", "yes")):
        labels, found = prepare_own(tmp_path, tmp_path / f"out{len(words)}", gpt2, *words, **files)
        assert labels == ["bad", "so so", "very good"]
        assert found["train"] == ["fine", "good", "poor", "ok"] and found["test"] == ["new"]
    assert capsys.readouterr().out.count("line 1 is taken for a header line; --header no") == 1
    with pytest.raises(DataError, match="begins with a header line, .*test.tsv with another line"):
        prepare_own(tmp_path, tmp_path / "no", gpt2, **{**files, "test": [("new",)]})
    labels, found = prepare_own(tmp_path, tmp_path / "rows", gpt2, "--header", "no", **files)
    assert "mood" in labels and found["test"] == ["text", "new"]


@pytest.mark.parametrize(
    "top, below, columns",
    [
        (["Sentence"], [["new"], ["newer"]], ["1", "2"]),
        (["premise", "hypothesis"], [["new", "newer"]], ["1,2", "3"]),
        (["tweet", "mood"], [["new", "bad"], ["newer", "so so"]], ["1", "2"]),
        (["tweet", "nr"], [["new", "7"], ["newer", "12"]], ["1", "3"]),
        (["tweet", "how much"], [["new", "0.5"], ["newer", "2"]], ["1", "2", "--regression"]),
    ],
    ids=["names", "pair", "label", "number", "score"],
)
def test_a_header_line_of_test_alone(top, below, columns, tmp_path, gpt2, capsys):
    """Seen by its content; --header no takes it for a row, where it can be one."""
    words, label = columns[2:], "0.5" if "--regression" in columns else "bad"
    rows = [[cell, *["x"] * (int(columns[1]) - 2), label] for cell in "abc"]
    rows[1][-1] = "2" if words else "so so"
    for file, lines in (("train", rows), ("dev", rows[::-1]), ("test", [top, *below])):
        write(tmp_path / "MINE" / f"{file}.tsv", *lines)
    argv = ("MINE", gpt2, "--columns", *columns)
    prepare(tmp_path, tmp_path / "out", *argv)
    assert sentences(tmp_path / "out", "train", gpt2) == ["a", "b", "c"]
    assert sentences(tmp_path / "out", "test", gpt2) == [row[0] for row in below]
    assert "test.tsv: line 1 is taken for a header line; --header no" in capsys.readouterr().out
    if len(top) < int(columns[1]):
        prepare(tmp_path, tmp_path / "rows", *argv, "--header", "no")
        assert sentences(tmp_path / "rows", "test", gpt2)[0] == top[0]


@pytest.mark.parametrize("test", [["a sentence", "new"], ["sentence"], ["7", "new"]])
def test_what_is_no_header_line_of_test(test, tmp_path, gpt2):
    files = {"train": LABELS, "dev": LABELS[::-1], "test": [[text] for text in test]}
    _, found = prepare_own(tmp_path, tmp_path / "out", gpt2, **files)
    assert found["test"] == test


def test_files_that_share_their_first_row_have_no_header(tmp_path, gpt2):
    labels, found = prepare_own(tmp_path, tmp_path / "out", gpt2, train=LABELS, dev=LABELS)
    assert labels == ["bad", "so so", "very good"] and found["valid"][0] == "fine"


def test_a_header_line_over_scores(tmp_path, gpt2):
    rows = [("text", "score"), ("a", "0.5"), ("b", "2")]
    words = ("--regression",)
    _, found = prepare_own(tmp_path, tmp_path / "out", gpt2, *words, train=rows, dev=rows)
    assert found["train"] == found["valid"] == ["a", "b"]


def test_blanks_around_labels_make_no_class(tmp_path, gpt2):
    rows = [("a", "pos"), ("b", "pos "), ("c", " neg"), ("d", "neg")]
    labels, _ = prepare_own(tmp_path, tmp_path / "out", gpt2, train=rows, dev=rows[::-1])
    assert labels == ["neg", "pos"]
    data = load(tmp_path / "out", "train", 2)
    assert [data[i]["target"].item() for i in range(4)] == [1, 1, 0, 0]


def test_quoting_as_in_csv_is_named(tmp_path, gpt2, capsys):
    rows = [("a", "x"), ('"he said ""yes"" twice"', "y"), ('"b"', "x"), ('c ""', "y")]
    _, found = prepare_own(tmp_path, tmp_path / "out", gpt2, train=rows, dev=LABELS_XY)
    assert found["train"] == [text for text, _ in rows]
    output = capsys.readouterr().out
    assert "train.tsv: 1 rows look quoted as in CSV, the first in line 2" in output
    assert "dev.tsv: " not in output


LABELS_XY = [("a", "y"), ("b", "x")]


def write_sts(glue, scores):
    header = LAYOUTS["STS-B"][0].split()
    for file in ("train", "dev"):
        write(glue / "STS-B" / f"{file}.tsv", header, *([*"123456789", s] for s in scores))
    write(glue / "STS-B" / "test.tsv", header[:-1], "123456789")


def test_scores_of_sts_b_are_divided_once_and_come_back(tmp_path, gpt2):
    """5 -> 1, 2.5 -> 0.5, 3.8 -> 0.76; the scale in task.json leads back."""
    scores = ["5.000", "2.500", "3.800", "0.000"]
    write_sts(tmp_path, scores)
    prepare(tmp_path, tmp_path / "out", "STS-B", gpt2, "--any-rows")
    for split in ("train", "valid"):
        stored = (tmp_path / "out" / "label" / f"{split}.label").read_text().split()
        assert stored == ["1.0", "0.5", "0.76", "0.0"]
        scale = json.loads((tmp_path / "out" / "task.json").read_text())["scale"]
        assert [float(s) * scale for s in stored] == pytest.approx([float(s) for s in scores])
    write_sts(tmp_path, ["5.1"])
    with pytest.raises(DataError, match="label '5.1', expected a number from 0 to 5"):
        prepare(tmp_path, tmp_path / "out", "STS-B", gpt2, "--any-rows")


def test_split_to_predict_has_ids_and_no_labels(tmp_path, gpt2):
    write_sts(tmp_path, ["1"])
    prepare(tmp_path, tmp_path / "out", "STS-B", gpt2, "--any-rows")
    assert (tmp_path / "out" / "id" / "test.txt").read_text() == "1\n"
    assert sentences(tmp_path / "out", "test", gpt2, column=1) == ["9"]
    assert "target" not in load(tmp_path / "out", "test", 1, regression=True)[0]
    assert not list((tmp_path / "out" / "label").glob("test*"))
    entry = json.loads((tmp_path / "out" / "task.json").read_text())["splits"]["test"]
    assert (entry["file"], entry["rows"], entry["labelled"]) == ("test.tsv", 1, False)


def test_urls_are_fetched_once_and_checked(tmp_path, gpt2, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_sst(tmp_path, [("a", "1")], [("b", "0")])
    source = shutil.copytree(gpt2, tmp_path / "server") / "encoder.json"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    url = source.as_uri()

    def run(where):
        prepare(
            tmp_path, tmp_path / "out", "SST-2", gpt2, "--any-rows", "--gpt2-encoder-json", where
        )

    with pytest.raises(DataError, match=f'expected "000.*, got "{digest}".*or give a file'):
        run(f"{url}#sha256={'0' * 64}")
    assert not list((tmp_path / "cache" / "deltasam_fairseq").iterdir())
    run(f"{url}#sha256={digest}")
    kept, record = sorted((tmp_path / "cache" / "deltasam_fairseq").iterdir())
    assert kept.read_bytes() == source.read_bytes() and record.read_text().startswith(digest)

    source.unlink()
    run(url)  # from the cache, by the checksum that was seen
    kept.write_text("{}")  # damaged: fetched again
    with pytest.raises(DataError, match="cannot be fetched.*give --gpt2-enc.* --gpt2-vocab-bpe F"):
        run(url)
    source.write_text("{ }")  # changed since: not taken for the one that was seen
    with pytest.raises(DataError, match="invalid hash value"):
        run(url)
    shutil.copy(gpt2 / "encoder.json", source)
    run(url)


def test_from_another_folder_and_twice(tmp_path, gpt2):
    """Relative paths, no PYTHONPATH; an error is one line and exit code 2."""
    write_sst(tmp_path / "glue", [("a", "1")], [("b", "0")])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for words, code in ((["--any-rows"], 0), ([], 2)):
        command = command_of("glue", "out", "SST-2", gpt2, *words)
        done = subprocess.run(command, cwd=str(tmp_path), env=environment, capture_output=True)
        assert done.returncode == code
    program, message = done.stderr.decode().splitlines()[-1].split(": ", 1)
    assert program == "python -m deltasam_fairseq.glue.prepare"
    assert message.startswith("glue/SST-2/train.tsv: 1 r")
    assert sentences(tmp_path / "out", "valid", gpt2) == ["b"]


def test_options_that_do_not_go_together(tmp_path, gpt2):
    write_sst(tmp_path, [("a", "1")], [("b", "0")])
    (tmp_path / "dict.txt").write_text("nothing 1\n")
    for words, message in (
        (["--sentencepiece-model", "x"], "--sentencepiece-model is for --bpe sentencepiece"),
        (["--wordpiece-cased"], "--wordpiece-cased is for --bpe wordpiece"),
        (["--columns", "1", "2"], "only for data of your own"),
        (["--header", "no"], "only for data of your own"),
        (["--gpt2-vocab-bpe", "absent"], "--gpt2-vocab-bpe absent: no such file"),
        (["--dict", tmp_path / "dict.txt"], "2 of 2 tokens are not in --dict|1 of 1 tokens"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(tmp_path, tmp_path / "out", "SST-2", gpt2, "--any-rows", *words)


def run_bpe(tmp_path, bpe, pieces, *words):
    write_sst(tmp_path, [("the cats", "1")], [("a cat", "0")])
    (tmp_path / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces))
    files = ["--glue-dir", tmp_path, "--out", tmp_path / "out", "--dict", tmp_path / "dict.txt"]
    arguments = [*files, "--task", "SST-2", "--any-rows", "--bpe", bpe, *words]
    prepare_glue.prepare(prepare_glue.parser().parse_args([str(word) for word in arguments]))
    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    data = data_utils.load_indexed_dataset(str(tmp_path / "out" / "input0" / "train"), dictionary)
    return dictionary.string(data[0])


def test_sentencepiece(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    text = iter(["the cats sat", "a cat sat on the mat"] * 20)
    prefix = str(tmp_path / "spm")
    spm.SentencePieceTrainer.train(
        sentence_iterator=text, model_prefix=prefix, vocab_size=16, minloglevel=2
    )
    model = spm.SentencePieceProcessor(model_file=f"{prefix}.model")
    pieces = [model.id_to_piece(i) for i in range(3, 16)]
    found = run_bpe(tmp_path, "sentencepiece", pieces, "--sentencepiece-model", f"{prefix}.model")
    assert found.split() == model.encode("the cats", out_type=str)


def test_wordpiece(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("deltasam_fairseq.bpe")
    pieces = ["the", "The", "cat", "##s", "a"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocabulary))
    with pytest.raises(DataError, match="--bpe wordpiece: give --wordpiece-vocab"):
        run_bpe(tmp_path, "wordpiece", pieces)
    words = ("--wordpiece-vocab", tmp_path / "vocab.txt")
    assert run_bpe(tmp_path, "wordpiece", pieces, *words).split() == ["the", "cat", "##s"]
    record = json.loads((tmp_path / "out" / "task.json").read_text())["bpe"]
    assert record["name"] == "wordpiece" and set(record["sha256"]) == {"wordpiece_vocab", "dict"}


def test_what_the_quick_start_uses():
    assert prepare_glue.TASKS["MNLI"].splits() == {
        "train": "train",
        "valid": "dev_matched",
        "valid1": "dev_mismatched",
    }
    assert not prepare_glue.TASKS["CoLA"].header and prepare_glue.TASKS["ORDER"].header
