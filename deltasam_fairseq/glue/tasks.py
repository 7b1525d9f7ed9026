"""GLUE's tasks: their columns, labels and official numbers of rows; reading their TSV files.

GLUE's files know no quoting: a quotation mark is part of the sentence, and one line is one row.
A reader that takes it for quoting swallows lines: MRPC's dev becomes 389 rows, STS-B's 1470.
"""

from __future__ import annotations

import math
import re
import unicodedata
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from deltasam_fairseq.data.files import NOT_DATA, DataError


class Task(NamedTuple):
    """Where a task keeps its sentences and labels.

    Attributes:
        sentences: names of the one or two columns with sentences.
        label: name of the column with the label or the score.
        labels: in the order of their class numbers; empty: the label is a score.
        rows: file -> its official numbers of rows; a file that is not named is not counted.
        names: of the columns of files without a header line.
        valid, test: files, without their ending.
        exact: rows that have another number of columns are dropped, 0: are kept.
        scale: a score is divided by it for the model, and has to lie between 0 and it (0: any).
        skip_first: files whose first line is a header, though columns are numbered.
        own: a task of the user's: every row has as many columns as the first; test may be labelled.
    """

    sentences: Tuple[str, ...]
    label: str
    labels: Tuple[str, ...]
    rows: Dict[str, Tuple[int, ...]]
    names: Tuple[str, ...] = ()
    valid: Tuple[str, ...] = ("dev",)
    test: Tuple[str, ...] = ("test",)
    exact: int = 0
    scale: float = 1.0
    own: bool = False
    skip_first: Tuple[str, ...] = ()

    @property
    def header(self) -> bool:
        """Whether the first line of its labelled files names the columns."""
        return not self.names

    def splits(self) -> Dict[str, str]:
        """Return the labelled splits of fairseq's data -> their files, without ending."""
        return {"train": "train", **_numbered("valid", self.valid)}

    def test_splits(self) -> Dict[str, str]:
        """Return the same for the files to predict."""
        return _numbered("test", self.test)


def _numbered(split: str, files: Sequence[str]) -> Dict[str, str]:
    return {split + (str(i) if i else ""): file for i, file in enumerate(files)}


def _rows(train: int, dev: int, test: int) -> Dict[str, Tuple[int, ...]]:
    return {"train": (train,), "dev": (dev,), "test": (test,)}


PAIR = ("sentence1", "sentence2")
TASKS: Dict[str, Task] = {
    "CoLA": Task(
        ("sentence",),
        "label",
        ("0", "1"),
        _rows(8551, 1043, 1063),
        names=("source", "label", "star", "sentence"),  # its test.tsv has a header line
    ),
    "MNLI": Task(
        PAIR,
        "gold_label",
        ("contradiction", "entailment", "neutral"),
        {
            "train": (392702,),
            "dev_matched": (9815,),
            "dev_mismatched": (9832,),
            "test_matched": (9796,),
            "test_mismatched": (9847,),
        },
        valid=("dev_matched", "dev_mismatched"),
        test=("test_matched", "test_mismatched"),
    ),
    "MRPC": Task(("#1 String", "#2 String"), "Quality", ("0", "1"), _rows(3668, 408, 1725)),
    "QNLI": Task(
        ("question", "sentence"),
        "label",
        ("entailment", "not_entailment"),
        _rows(104743, 5463, 5463),
    ),
    "QQP": Task(
        ("question1", "question2"),
        "is_duplicate",
        ("0", "1"),
        # The count of train depends on the release, and on its few broken rows.
        {**_rows(363846, 40430, 390965), "train": (363846, 363849, 363870)},
        exact=6,
    ),
    "RTE": Task(PAIR, "label", ("entailment", "not_entailment"), _rows(2490, 277, 3000)),
    "SST-2": Task(("sentence",), "label", ("0", "1"), _rows(67349, 872, 1821)),
    "STS-B": Task(PAIR, "score", (), _rows(5749, 1500, 1379), scale=5.0),
    "ORDER": Task(("sentence",), "label", ("0", "1"), {}),  # the built-in task of the quick start
}
GLUE = tuple(name for name in TASKS if name != "ORDER")

FAIRSEQ_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# Columns that identify a prediction; a test file without one is numbered from 0.
ID_COLUMNS = ("index", "id")
MRPC_REMEDY = """\
the download broke off before GLUE's split of MRPC into train and dev. \
In {folder}, fetch https://dl.fbaipublicfiles.com/glue/data/mrpc_dev_ids.tsv and run
    awk -F'\\t' 'NR == FNR {{ dev[$1, $2]; next }} FNR == 1 {{ print > "train.tsv" }}
        {{ print > (FNR == 1 || ($2, $3) in dev ? "dev.tsv" : "train.tsv") }}' \\
        mrpc_dev_ids.tsv msr_paraphrase_train.txt"""
KNOWN_ROWS = {
    ("MRPC", 4076): "train and dev are still one file: GLUE's split by its dev_ids is missing",
    ("QNLI", 108436): "this is QNLI v1, which GLUE has replaced: download QNLIv2.zip",
    ("QNLI", 5732): "this is QNLI v1, which GLUE has replaced: download QNLIv2.zip",
    ("QNLI", 5740): "this is QNLI v1, which GLUE has replaced: download QNLIv2.zip",
    ("MRPC", 389): "rows were swallowed by a program that took quotation marks for quoting",
    ("STS-B", 1470): "rows were swallowed by a program that took quotation marks for quoting",
}


QUOTING = "; quotation marks do not quote here: no cell holds a tab or the end of a line"
# What columns are called, as far as it is not what sentences say.
_COLUMN = re.compile(
    r"id|idx|index|label|score|"
    r"(sentence|text|question|premise|hypothesis|review|query)[ _]?[12ab]?",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def find_file(folder: Path, name: str, file: str) -> Path:
    """Return the path of a task's file.

    Raises:
        DataError: it is missing, or is one of the things that broken downloads leave.
    """
    path = folder / name / f"{file}.tsv"
    if not path.is_file():
        if (path.parent / "msr_paraphrase_train.txt").is_file():
            raise DataError(f"{path} is missing: {MRPC_REMEDY.format(folder=path.parent)}")
        archive = folder / f"{name}.zip"
        if archive.is_file() and not path.parent.is_dir():
            raise DataError(f"{path} is missing: unpack {archive}")
        raise DataError(f"{path} is missing; --glue-dir is the folder that has {name}/{file}.tsv")
    with path.open("rb") as binary:
        head = binary.read(512)
    for pattern, what in NOT_DATA.items():
        if re.match(pattern, head, re.IGNORECASE):
            raise DataError(f"{path} is {what}")
    return path


def check_rows(path: Path, name: str, task: Task, rows: int) -> None:
    """Compare the number of rows with the official one.

    Raises:
        DataError: they differ.
    """
    official = task.rows.get(path.stem, (rows,))
    if rows in official:
        return
    hint = KNOWN_ROWS.get((name, rows), "is the download complete and unchanged?")
    raise DataError(
        f"{path}: {rows} rows, official are {' or '.join(map(str, official))}; {hint} "
        "(--any-rows goes on with them)"
    )


class Table(NamedTuple):
    """A file's rows, by column."""

    path: Path
    sentences: List[Tuple[str, ...]]  # one tuple a sentence column
    labels: Tuple[str, ...]  # empty: not labelled
    ids: Tuple[str, ...]
    lines: List[int]  # where in the file, from 1
    dropped: int  # rows
    original_labels: Tuple[str, ...] = ()  # where labels were replaced on purpose


def read_lines(path: Path) -> List[List[str]]:
    """Return the fields of every line; empty lines at the end do not count."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            lines = [line.rstrip("\r\n").split("\t") for line in file]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); save it as that") from error
    if len(lines) == 1 and any("\r" in cell for cell in lines[0]):
        raise DataError(f"{path}: its lines end in a carriage return alone; save it with \\n")
    while lines and lines[-1] == [""]:
        lines.pop()
    return lines


def read_table(path: Path, task: Task, labelled: bool = True) -> Table:
    """Read a TSV file of a task.

    Raises:
        DataError: a column is missing, or a row is cut.
    """
    rows = read_lines(path)
    columns = (*task.sentences, task.label) if labelled else task.sentences
    header, begin = task.names, 1
    if path.stem in task.skip_first and rows:
        del rows[0]
        begin = 2
    elif rows and set(columns) <= set(rows[0]):
        header, begin = tuple(rows.pop(0)), 2
    elif not header:
        found = ", ".join(rows[0]) if rows else "nothing"
        raise DataError(f"{path}, line 1: expected columns {', '.join(columns)}, found {found}")
    twice = next((column for column in columns if header.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{path}, line 1: more than one column is named {twice}; rename the others")
    where = [header.index(column) for column in columns]
    needed = 1 + max(where)
    exact = task.exact if labelled else 0
    kept, lines = [], []
    for line, row in enumerate(rows, start=begin):
        if exact and len(row) != exact:
            continue
        if len(row) < needed or (task.own and len(row) != len(rows[0])):
            short = len(row) < needed
            expected = f"{needed} or more" if short else f"{len(rows[0])} as in the first row"
            hint = QUOTING if any(cell.startswith('"') for cell in row) else ""
            raise DataError(f"{path}, line {line}: {len(row)} columns, expected {expected}{hint}")
        kept.append(row)
        lines.append(line)
    if not kept:
        raise DataError(f"{path} has no rows")
    by_column = [tuple(row[column] for row in kept) for column in where]
    labels = tuple(label.strip() for label in by_column.pop()) if labelled else ()
    ids = next((header.index(column) for column in ID_COLUMNS if column in header), None)
    names = tuple(str(i) if ids is None else row[ids] for i, row in enumerate(kept))
    return Table(path, by_column, labels, names, lines, len(rows) - len(kept))


def has_labels(path: Path, task: Task) -> bool:
    """Tell by its first line whether a file of an own task has the column of the labels."""
    first = (read_lines(path) or [[]])[0]
    return task.names.index(task.label) < len(first) if task.names else task.label in first


def check_labels(table: Table, task: Task) -> None:
    """Raise a DataError that names the first label or score that is not one of the task's."""
    for line, label in zip(table.lines, table.labels):
        if task.labels and label not in task.labels:
            expected = f"one of {', '.join(task.labels)}"
        elif not task.labels and not _is_score(label, 0.0 if task.own else task.scale):
            expected = "a number" if task.own else f"a number from 0 to {task.scale:g}"
        else:
            continue
        if table.path.stem in task.test:
            expected += "; remove the column from the file if its labels are not known"
        raise DataError(f"{table.path}, line {line}: label {label!r}, expected {expected}")


def _is_score(text: str, highest: float) -> bool:
    try:
        score = float(text)
    except ValueError:
        return False
    return math.isfinite(score) and (not highest or 0 <= score <= highest)


# What a sentence by_appearance like -> what to say of its rows, and what may be done.
HINTS = {
    '".*"".*"': (
        "look quoted as in CSV",
        "; quotation marks are taken as text: if they are not, write the file without quoting",
    ),
    "": ("have a sentence without text", ""),
}


def hints(table: Table) -> List[str]:
    """Return a sentence about each thing in a table that is often not meant."""
    found = []
    for pattern, (what, remedy) in HINTS.items():
        lines = [
            line
            for line, *cells in zip(table.lines, *table.sentences)
            if any(re.fullmatch(pattern, cell.strip()) for cell in cells)
        ]
        if lines:
            where = f"the first in line {lines[0]}"
            found.append(f"{table.path}: {len(lines)} rows {what}, {where}{remedy}")
    return found


def own_task(
    folder: Path, name: str, columns: Sequence[str], scale: float, header: Optional[str] = None
) -> Task:
    """Return a task of the user's; its classes are the labels of its train.tsv, sorted.

    Args:
        columns: as for --columns; by name (the files have a header line) or by number, from 1
            (they have none).
        scale: scores are divided by it; 0: the labels are classes.
        header: yes or no, for numbered columns: whether the files begin with a header line, which
            is dropped; None: see by their content.

    Raises:
        DataError: the files or the options are not right.
    """
    sentences, label = tuple(columns[0].split(",")), columns[1]
    if not 1 <= len(sentences) <= 2:
        raise DataError(f"--columns {' '.join(columns)}: one or two sentences, as in 1,2 3")
    if len({*sentences, label}) <= len(sentences):
        raise DataError(
            f"--columns {' '.join(columns)}: a column is named twice; sentences and label have "
            "columns of their own"
        )
    names: Tuple[str, ...] = ()
    if all(re.fullmatch("[1-9][0-9]*", column) for column in (*sentences, label)):
        names = tuple(f"column {i + 1}" for i in range(max(map(int, (*sentences, label)))))
        sentences, label = tuple(f"column {column}" for column in sentences), f"column {label}"
    task = Task(sentences, label, (), {}, names, scale=scale or 1.0, own=True)
    train = find_file(folder, name, "train")
    if not names and header == "no":
        raise DataError(
            f"--header no: --columns {' '.join(columns)} are names, which a header line has; give "
            "their numbers, from 1"
        )
    if names and header != "no":
        files = ("train", *task.valid, *task.test)
        if header is None and not _has_header(train, task, bool(scale)):
            files = _tests_with_header(train, task, bool(scale))
        task = task._replace(skip_first=files)
    if scale:
        return task
    labels = sorted(set(read_table(train, task).labels))
    numbers: Dict[float, str] = {}
    by_appearance: Dict[str, str] = {}
    folded: Dict[str, str] = {}
    for label in labels:
        if not label or label in FAIRSEQ_SYMBOLS:
            raise DataError(f"{train}: a label is {label!r}, which fairseq cannot keep; rename it")
        same = folded.setdefault(label.casefold(), label)
        if same != label:
            print(f"{train}: labels {same!r} and {label!r} differ in case: they are two classes")
        same = by_appearance.setdefault(_visible(label), label)
        if same != label:
            raise DataError(
                f"{train}: the labels {same!a} and {label!a} look the same; write it in one way"
            )
        same = numbers.setdefault(float(label), label) if _NUMBER.fullmatch(label) else label
        if same != label:
            raise DataError(
                f"{train}: the labels {same!r} and {label!r} are the same number; write it in one "
                "way, or give --regression if they are scores"
            )
    if len(labels) < 2:
        raise DataError(
            f"{train}: every row has the label {labels[0]!r}, so that there is nothing to learn; "
            f"is {columns[1]} in --columns {' '.join(columns)} the column of the labels?"
        )
    return task._replace(labels=tuple(labels))


def _visible(text: str) -> str:
    """Return what is seen of a text: composed, without characters of no width."""
    composed = unicodedata.normalize("NFKC", text)
    return "".join(c for c in composed if unicodedata.category(c) != "Cf").strip()


def _has_header(train: Path, task: Task, scores: bool) -> bool:
    """See by their content whether files of numbered columns begin with a header line.

    The first line of train.tsv is one if no other row has its label and another file begins with
    the same sentences; with scores, if its label is no number, and that of the next row is.

    Raises:
        DataError: it is undecidable, or only some of the files have one.
    """
    *columns, label_column = (task.names.index(column) for column in (*task.sentences, task.label))

    def sentences(row: Sequence[str]) -> List[str]:
        return [row[i] for i in columns if i < len(row)]

    def label(row: Sequence[str]) -> str:
        return row[label_column].strip() if label_column < len(row) else ""

    first, *rest = read_lines(train) or [[]]
    others = [train.with_name(f"{file}.tsv") for file in (*task.valid, *task.test)]
    files = {path: read_lines(path) for path in others if path.is_file()}
    labels = {label(row) for row in rest}
    for lines in files.values():
        labels |= {label(row) for row in lines if sentences(row) != sentences(first)}
    if scores:
        header = bool(rest) and not _is_score(label(first), 0) and _is_score(label(rest[0]), 0)
    else:
        header = bool(rest) and label(first) not in labels
    begins = {
        path: sentences(lines[0]) == sentences(first) for path, lines in files.items() if lines
    }
    if header and not scores and not any(begins.values()):
        raise DataError(
            f"{train}, line 1: no other row has the label {label(first)!r}; give --header yes if "
            "it is a header line, --header no if it is a row"
        )
    if header and not all(begins.values()):
        path = next(path for path, same in begins.items() if not same)
        raise DataError(
            f"{train} begins with a header line, {path} with another line; make them alike, or "
            "give --header yes if every file has one, --header no if none has"
        )
    if header:
        print(f"{train}: line 1 is taken for a header line; --header no takes it for a row")
    return header


def _tests_with_header(train: Path, task: Task, scores: bool) -> Tuple[str, ...]:
    """See which test files of numbered columns begin with a header line, where train.tsv does not.

    Its cells are names of columns; or its label is none of train.tsv's and those of the other rows
    are; or it has a word over a column of numbers.
    """
    columns = [task.names.index(column) for column in task.sentences]
    label_column = task.names.index(task.label)
    labels = {r[label_column].strip() for r in read_lines(train) if label_column < len(r)}

    def is_header(first: Sequence[str], rest: Sequence[Sequence[str]]) -> bool:
        if all(_COLUMN.fullmatch(cell) for cell in first):
            return True
        for at, (top, *below) in enumerate(zip(first, *rest)):
            if at == label_column and not scores:
                known = top not in labels and labels.issuperset(below)
            else:
                known = at not in columns and not _is_score(top, 0)
                known = known and all(_is_score(cell, 0) for cell in below)
            if known:
                return True
        return False

    found = []
    for file in task.test:
        path = train.with_name(f"{file}.tsv")
        lines = read_lines(path) if path.is_file() else []
        first, *rest = [[cell.strip() for cell in row] for row in lines] or [[]]
        if rest and is_header(first, rest):
            print(f"{path}: line 1 is taken for a header line; --header no takes it for a row")
            found.append(file)
    return tuple(found)
