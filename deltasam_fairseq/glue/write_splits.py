"""Write the splits of a GLUE task, or of one like it, as fairseq data."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from deltasam_fairseq.data import splits as data_splits
from deltasam_fairseq.data.binarize import (
    Dictionary,
    Encoding,
    Map,
    encode_lines,
    tools,
    unknown_share,
    write_items,
)
from deltasam_fairseq.data.files import DataError, atomic_write
from deltasam_fairseq.data.splits import Entry, entries_of, fingerprint, is_finished
from deltasam_fairseq.glue.tasks import (
    Table,
    Task,
    check_labels,
    check_rows,
    find_file,
    has_labels,
    hints,
    read_table,
)
from deltasam_fairseq.glue.training_rows import draw_rows, replace_labels

VERSION = 2  # of task.json, and of how the data is written
FOLDERS = ("input0", "input1", "label", "id")
HOLD_OUT_SEED = 1
PARTS = ("kept", "replaced")  # splits with the rows of train whose labels are right, and wrong


class Changes(NamedTuple):
    """What an experiment changes in the rows of train.tsv, before any are held out.

    Attributes:
        rows: number of rows to keep; 0 keeps all.
        noise: share of the labels to replace by another class.
        seed: of both.
    """

    rows: int = 0
    noise: float = 0.0
    seed: int = 1

    def apply(self, table: Table, task: Task) -> Table:
        """Return the changed table.

        Raises:
            DataError: there are fewer rows, or no classes to choose another one from.
        """
        if self.rows:
            try:
                kept = draw_rows(len(table.ids), self.rows, self.seed)
            except ValueError as error:
                raise DataError(f"--train-rows {self.rows}: {table.path}: {error}") from error
            table = select(table, np.isin(np.arange(len(table.ids)), kept))
        if self.noise:
            if not task.labels:
                raise DataError(f"--label-noise {self.noise}: {table.path} has scores, not classes")
            noisy, _ = replace_labels(table.labels, task.labels, self.noise, self.seed)
            table = table._replace(labels=tuple(noisy), original_labels=table.labels)
        return table


NO_CHANGES = Changes()


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
    changes: Changes
    fingerprint: str  # of all that the result depends on

    def files(self) -> List[Path]:
        """Return the files that the finished split consists of."""
        endings: Tuple[str, ...] = ("bin", "idx")
        found = [
            self.out / f"input{i}" / f"{self.name}.{ending}"
            for i in range(len(self.task.sentences))
            for ending in endings
        ]
        if self.labelled:
            endings = endings if self.task.labels else ("label",)
            found += [self.out / "label" / f"{self.name}.{ending}" for ending in endings]
        if self.lists_replaced():
            found.append(self.out / "label" / f"{self.name}.replaced.tsv")
        if self.name.startswith("test"):
            found.append(self.out / "id" / f"{self.name}.txt")
        return found

    def lists_replaced(self) -> bool:
        """Whether the labels that were replaced are listed beside the split."""
        return bool(self.changes.noise) and self.name not in PARTS


def splits_of(
    folder: Path,
    name: str,
    task: Task,
    out: Path,
    bpe: Dict[str, Any],
    hold_out: float = 0.0,
    changes: Changes = NO_CHANGES,
) -> Iterator[Split]:
    """Yield what is to be written of a task; files to predict may be missing."""
    files = {**task.splits(), **task.test_splits()}
    if hold_out:
        files = {"train": "train", "valid": "train"}
        clean = task.splits() if changes != NO_CHANGES else {}  # for experiments
        files.update((s.replace("valid", "dev"), f) for s, f in clean.items() if s != "train")
    if changes.noise:
        files.update(dict.fromkeys(PARTS, "train"))
    for split, file in files.items():
        test = split in task.test_splits()
        if (test or split.startswith("dev")) and not (folder / name / f"{file}.tsv").is_file():
            continue
        source = find_file(folder, name, file)
        labelled = not test or (task.own and has_labels(source, task))
        facts = [VERSION, task._asdict(), split, labelled]
        out_of_train = hold_out if file == "train" else 0.0
        facts += [HOLD_OUT_SEED, hold_out] if out_of_train else []
        own = changes if file == "train" else NO_CHANGES
        facts += own if own != NO_CHANGES else ()
        digest = fingerprint(facts, source, bpe)
        yield Split(name, task, split, source, out, labelled, out_of_train, own, digest)


def check_splits(splits: List[Split], any_rows: bool) -> None:
    """Read all that is not finished, so that an error comes before the work begins."""
    for split in splits:
        if not is_finished(split):
            read_split(split, any_rows)
        elif not (any_rows or split.hold_out or split.changes.rows or split.name in PARTS):
            rows = entries_of(split.out)[split.name]["rows"]
            check_rows(split.source, split.task_name, split.task, rows)


def read_split(split: Split, any_rows: bool) -> Table:
    """Read a split's file; raises a DataError if it is not what it should be."""
    table = read_table(split.source, split.task, split.labelled)
    check_labels(table, split.task)
    if not any_rows:
        check_rows(split.source, split.task_name, split.task, len(table.ids))
    table = split.changes.apply(table, split.task)
    if split.hold_out:
        held = held_out(len(table.ids), split.hold_out)
        table = select(table, held if split.name == "valid" else ~held)
        if not table.ids:
            raise DataError(
                f"--hold-out {split.hold_out}: leaves no row of {split.source} for {split.name}; "
                "give a share between 0 and 1 that leaves rows for both"
            )
    if split.name in PARTS:
        replaced = np.not_equal(table.original_labels, table.labels)
        table = select(table, replaced if split.name == "replaced" else ~replaced)
        if not table.ids:
            raise DataError(
                f"--label-noise {split.changes.noise}: leaves no label of {split.source} "
                f"{split.name}; give another share"
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
        original_labels=tuple(of(table.original_labels)),
        ids=tuple(of(table.ids)),
        lines=of(table.lines),
    )


def write_split(split: Split, table: Table, encoding: Encoding, run: Map) -> float:
    """Encode and write one split; return the share of tokens that the dictionary lacks."""
    dictionary = tools(encoding)[1]
    inputs = [encode_lines(encoding, sentences, run) for sentences in table.sentences]
    texts = [item[:-1] for item in itertools.chain.from_iterable(inputs)]  # without end marks
    unknown = unknown_share(split.source, encoding, texts)
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
    return unknown


def write_replaced(split: Split, table: Table) -> int:
    """Write which labels were replaced; return how many.

    ``label/train.replaced.tsv`` has a line a row: its number in the split, from 0, which is its
    ``id`` in fairseq's batches; the label that it had; the label that it has.
    """
    pairs = enumerate(zip(table.original_labels, table.labels))
    lines = [f"{row}\t{old}\t{new}\n" for row, (old, new) in pairs if old != new]
    path = split.out / "label" / f"{split.name}.replaced.tsv"
    atomic_write(path, "row\toriginal\tlabel\n" + "".join(lines))
    return len(lines)


def label_dictionary(task: Task) -> Dictionary:
    """Return the dictionary that numbers the classes in the order of ``task.labels``."""
    labels = Dictionary()
    for label in task.labels:
        labels.add_symbol(label)
    return labels


def write_task(
    splits: List[Split], bpe: Dict[str, Any], encoding: Encoding, run: Map, any_rows: bool
) -> None:
    """Write the splits of one task that are not finished; other ones in its folder go."""
    name, task, out = splits[0].task_name, splits[0].task, splits[0].out
    old = entries_of(out)
    entries = {split.name: old[split.name] for split in splits if is_finished(split)}
    outdated = {*old, *(split.name for split in splits)} - set(entries)
    stale = [path for s in outdated for f in FOLDERS for path in (out / f).glob(f"{s}.*")]
    record = {
        "version": VERSION,
        "task": name,
        "sentences": len(task.sentences),
        "columns": task.sentences,
        "labels": task.labels,
        "scale": None if task.labels else task.scale,
        "bpe": bpe,
    }
    if splits[0].hold_out:
        record["hold_out"] = splits[0].hold_out
    changes = splits[0].changes  # the first split is train
    if changes.rows:
        record["train_rows"] = {"rows": changes.rows, "seed": changes.seed}
    if changes.noise:
        record["label_noise"] = {"share": changes.noise, "seed": changes.seed}
    words = Path(encoding.dictionary).read_bytes()
    dictionaries = {f"input{i}/dict.txt": words for i in range(len(task.sentences))}
    if task.labels:
        dictionaries["label/dict.txt"] = "".join(f"{label} 1\n" for label in task.labels).encode()

    def write(split: Split) -> Tuple[Entry, str]:
        table = read_split(split, any_rows)
        for hint in hints(table) if task.own else ():
            print(hint)
        unknown = write_split(split, table, encoding, run)
        rows = len(table.ids)
        dropped = f", {table.dropped} broken ones dropped" if table.dropped else ""
        entry = {"rows": rows, "labelled": split.labelled}
        if split.lists_replaced():
            entry["replaced_labels"] = write_replaced(split, table)
        return entry, f"{rows} rows{dropped}, {unknown:.1%} <unk>"

    data_splits.write_splits(splits, record, entries, dictionaries, stale, write, f"{name} ")
    classes = f"{len(task.labels)}" if task.labels else "1 --regression-target"
    print(f"{name}: fairseq-train {out} --num-classes {classes}", flush=True)
