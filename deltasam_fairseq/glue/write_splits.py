"""Write the splits of a task as fairseq data: each whole or not at all, and only once."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence

import numpy as np

from deltasam_fairseq.data.binarize import (
    Dictionary,
    Encoding,
    Map,
    encode_lines,
    tools,
    write_items,
)
from deltasam_fairseq.data.files import DataError, atomic_write, sha256
from deltasam_fairseq.glue.tasks import (
    Table,
    Task,
    check_labels,
    check_rows,
    find_file,
    has_labels,
    read_table,
)

RECORD = "task.json"
VERSION = 1  # of task.json, and of how the data is written
FOLDERS = ("input0", "input1", "label", "id")


HOLD_OUT_SEED = 1


class Split(NamedTuple):
    """One split to write: where it comes from, where it goes.

    With ``hold_out``, a share of the rows of train.tsv, ``train`` is the rest of them and ``valid``
    that share: for choosing hyperparameters without a look at dev.tsv.
    """

    task_name: str
    task: Task
    name: str  # fairseq's: train, valid, valid1, test, ...
    source: Path
    out: Path
    labelled: bool
    hold_out: float
    fingerprint: str  # of all that the result depends on


def splits_of(
    folder: Path, name: str, task: Task, out: Path, bpe: Dict[str, Any], hold_out: float = 0.0
) -> Iterator[Split]:
    """Yield what is to be written of a task; files to predict may be missing."""
    files = {**task.splits(), **task.test_splits()}
    if hold_out:
        files = {"train": "train", "valid": "train"}
    for split, file in files.items():
        test = split in task.test_splits()
        if test and not (folder / name / f"{file}.tsv").is_file():
            continue
        source = find_file(folder, name, file)
        labelled = not test or (task.own and has_labels(source, task))
        facts = [VERSION, task._asdict(), split, labelled, sha256(source), bpe["name"]]
        facts += [bpe["sha256"], bpe["options"].get("wordpiece_cased", False)]
        facts += [HOLD_OUT_SEED, hold_out] if hold_out else []
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        yield Split(name, task, split, source, out, labelled, hold_out, digest)


def read_record(out: Path) -> Dict[str, Any]:
    """Return what the task.json of an earlier run says of each split; empty if there is none."""
    try:
        return json.loads((out / RECORD).read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError):
        return {}


def outputs(split: Split) -> List[Path]:
    """Return the files that a finished split consists of."""
    files = [
        split.out / f"input{i}" / f"{split.name}.{ending}"
        for i in range(len(split.task.sentences))
        for ending in ("bin", "idx")
    ]
    if split.labelled:
        endings = ("bin", "idx") if split.task.labels else ("label",)
        files += [split.out / "label" / f"{split.name}.{ending}" for ending in endings]
    if split.name.startswith("test"):
        files.append(split.out / "id" / f"{split.name}.txt")
    return files


def is_finished(split: Split) -> bool:
    """Whether an earlier run wrote this split, from the same files and with the same options."""
    entry = read_record(split.out).get(split.name, {})
    there = all(path.is_file() for path in outputs(split))
    return there and entry.get("fingerprint") == split.fingerprint


def check_splits(splits: List[Split], any_rows: bool) -> None:
    """Read all that is not finished, so that an error comes before the work begins."""
    for split in splits:
        if not is_finished(split):
            read_split(split, any_rows)
        elif not any_rows and not split.hold_out:
            rows = read_record(split.out)[split.name]["rows"]
            check_rows(split.source, split.task_name, split.task, rows)


def read_split(split: Split, any_rows: bool) -> Table:
    """Read a split's file; raises a DataError if it is not what it should be."""
    table = read_table(split.source, split.task, split.labelled)
    check_labels(table, split.task)
    if not any_rows:
        check_rows(split.source, split.task_name, split.task, len(table.ids))
    if split.hold_out:
        held = held_out(len(table.ids), split.hold_out)
        table = select(table, held if split.name == "valid" else ~held)
        if not table.ids:
            raise DataError(
                f"--hold-out {split.hold_out}: leaves no row of {split.source} for {split.name}; "
                "give a share between 0 and 1 that leaves rows for both"
            )
    return table


def held_out(rows: int, share: float) -> np.ndarray:
    """Return which rows are held out, (rows,) of bool: the same ones every time."""
    order = np.random.RandomState(HOLD_OUT_SEED).permutation(rows)
    return order < round(share * rows)


def select(table: Table, chosen: np.ndarray) -> Table:
    """Return the table of the rows that are chosen, (rows,) of bool."""

    def of(column: Sequence[Any]) -> List[Any]:
        return list(itertools.compress(column, chosen))

    return table._replace(
        sentences=[tuple(of(column)) for column in table.sentences],
        labels=tuple(of(table.labels)),
        ids=tuple(of(table.ids)),
        lines=of(table.lines),
    )


def write_split(split: Split, table: Table, encoding: Encoding, run: Map) -> float:
    """Encode and write one split; return the share of tokens that the dictionary lacks."""
    dictionary = tools(encoding)[1]
    inputs = [encode_lines(encoding, sentences, run) for sentences in table.sentences]
    items = list(itertools.chain.from_iterable(inputs))
    total = sum(len(item) - 1 for item in items)  # without the end marks
    unknown = sum(int((item == dictionary.unk()).sum()) for item in items)
    if 2 * unknown > total:
        raise DataError(
            f"{split.source}: {unknown} of {total} tokens are not in --dict "
            f"{encoding.dictionary}; give the dict.txt that belongs to the BPE's files"
        )
    for i, numbers in enumerate(inputs):
        write_items(numbers, len(dictionary), split.out / f"input{i}" / split.name)
    label = split.out / "label" / split.name
    if split.labelled and split.task.labels:
        labels = label_dictionary(split.task)
        pairs = (np.array([labels.index(text), labels.eos()]) for text in table.labels)
        write_items(pairs, len(labels), label)
    elif split.labelled:
        scores = (float(text) / split.task.scale for text in table.labels)
        atomic_write(label.with_name(f"{split.name}.label"), "".join(f"{s}\n" for s in scores))
    if split.name.startswith("test"):
        ids = "".join(f"{name}\n" for name in table.ids)
        atomic_write(split.out / "id" / f"{split.name}.txt", ids)
    return unknown / max(total, 1)


def label_dictionary(task: Task) -> Dictionary:
    """Return the dictionary that numbers the classes in the order of ``task.labels``."""
    labels = Dictionary()
    for label in task.labels:
        labels.add_symbol(label)
    return labels


def write_task(
    splits: List[Split], bpe: Dict[str, Any], encoding: Encoding, run: Map, any_rows: bool
) -> None:
    """Write the splits of one task that are not finished.

    A split is entered in task.json when its files are there as a whole, and what belonged to an
    older one is removed first: a run that was cut leaves finished splits and no others.
    """
    name, task, out = splits[0].task_name, splits[0].task, splits[0].out
    old = read_record(out)
    finished = {split.name: old[split.name] for split in splits if is_finished(split)}
    for stale in {*old, *(split.name for split in splits)} - set(finished):
        for folder in FOLDERS:
            for path in (out / folder).glob(f"{stale}.*"):
                path.unlink()

    description = {
        "version": VERSION,
        "task": name,
        "sentences": len(task.sentences),
        "labels": task.labels,
        "scale": None if task.labels else task.scale,
        "bpe": bpe,
        "splits": finished,
    }
    if splits[0].hold_out:
        description["hold_out"] = splits[0].hold_out

    def save_record() -> None:
        atomic_write(out / RECORD, json.dumps(description, indent=1) + "\n")

    save_record()
    words = Path(encoding.dictionary).read_bytes()
    for i in range(len(task.sentences)):
        atomic_write(out / f"input{i}" / "dict.txt", words)
    if task.labels:
        lines = "".join(f"{label} 1\n" for label in task.labels)
        atomic_write(out / "label" / "dict.txt", lines)
    for split in splits:
        if split.name in finished:
            print(f"{name} {split.name}: already there, {out}")
            continue
        table = read_split(split, any_rows)
        unknown = write_split(split, table, encoding, run)
        finished[split.name] = {
            "file": split.source.name,
            "rows": len(table.ids),
            "labelled": split.labelled,
            "fingerprint": split.fingerprint,
        }
        save_record()
        dropped = f", {table.left_out} broken ones left out" if table.left_out else ""
        print(f"{name} {split.name}: {len(table.ids)} rows{dropped}, {unknown:.1%} <unk> -> {out}")
    classes = f"{len(task.labels)}" if task.labels else "1 --regression-target"
    print(f"{name}: fairseq-train {out} --num-classes {classes}", flush=True)


def without_paths(value: Any) -> Any:
    """A value of `RECORD` to compare: of the files of a BPE not where they are."""
    if not isinstance(value, dict):
        return value
    cased = value.get("options", {}).get("wordpiece_cased", False)
    return value.get("name"), value["sha256"], cased
