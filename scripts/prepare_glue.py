"""Turn a GLUE task's TSV files into the folder that fairseq's sentence_prediction task reads.

    python scripts/prepare_glue.py --glue-dir GLUE --task CoLA --out CoLA-bin \\
        --dict roberta.base/dict.txt --bpe gpt2 \\
        --gpt2-encoder-json encoder.json --gpt2-vocab-bpe vocab.bpe

``CoLA-bin/`` then holds ``input0/``, ``input1/`` (tasks of sentence pairs) and ``label/``, each
with its ``dict.txt`` and the datasets ``train`` and ``valid`` (MNLI: also ``valid1``, the
mismatched part).  GLUE's TSV files know no quoting: a quotation mark is part of the sentence.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple


class Task(NamedTuple):
    """Where a task keeps its sentences and labels: column numbers, from 0, or -1 from the end."""

    sentences: Tuple[int, ...]
    label: int
    labels: Tuple[str, ...]  # in the order of their class numbers; empty for regression
    header: bool = True
    valid: Tuple[str, ...] = ("dev",)
    exact: int = 0  # rows that have another number of columns are left out; 0: are an error


TASKS: Dict[str, Task] = {
    "CoLA": Task((3,), 1, ("0", "1"), header=False),
    "MNLI": Task(
        (8, 9),
        -1,
        ("contradiction", "entailment", "neutral"),
        valid=("dev_matched", "dev_mismatched"),
    ),
    "MRPC": Task((3, 4), 0, ("0", "1")),
    "QNLI": Task((1, 2), -1, ("entailment", "not_entailment")),
    "QQP": Task((3, 4), 5, ("0", "1"), exact=6),  # its files have a few broken rows
    "RTE": Task((1, 2), -1, ("entailment", "not_entailment")),
    "SST-2": Task((0,), 1, ("0", "1")),
    "STS-B": Task((-3, -2), -1, ()),
    "ORDER": Task((0,), 1, ("0", "1")),  # the built-in task of the quick start
}
STS_B_RANGE = 5.0  # its scores are 0 to 5; the model learns 0 to 1


def split_files(name: str) -> Dict[str, str]:
    """Return the split of fairseq's data -> the TSV file, without its ending."""
    valid = {"valid" + (str(i) if i else ""): file for i, file in enumerate(TASKS[name].valid)}
    return {"train": "train", **valid}


def read_table(path: Path, task: Task) -> List[List[str]]:
    """Return the rows of a TSV file without its header.

    Raises:
        ValueError: a row does not have the columns of the task, or a label that is not known.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        table = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    table = table[int(task.header) :]
    if task.exact:
        table = [row for row in table if len(row) == task.exact]
    columns = (*task.sentences, task.label)
    needed = max(column + 1 if column >= 0 else -column for column in columns)
    for number, row in enumerate(table, start=1 + int(task.header)):
        if len(row) < needed:
            raise ValueError(f"{path}, line {number}: {len(row)} columns, expected {needed}")
        if task.labels and row[task.label] not in task.labels:
            raise ValueError(
                f"{path}, line {number}: label {row[task.label]!r}, expected {task.labels}"
            )
    return table


def main() -> None:
    """Encode and write every split of the task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--glue-dir", type=Path, required=True, help="folder with GLUE's tasks")
    parser.add_argument("--task", choices=sorted(TASKS), required=True, help="task in that folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dict", type=Path, required=True, help="dict.txt of the checkpoint")
    parser.add_argument("--bpe", choices=("sentencepiece", "gpt2"), default="gpt2")
    parser.add_argument("--sentencepiece-model", help="for --bpe sentencepiece")
    parser.add_argument("--gpt2-encoder-json", help="for --bpe gpt2; unset: fetched")
    parser.add_argument("--gpt2-vocab-bpe", help="for --bpe gpt2; unset: fetched")
    args = parser.parse_args()

    # Imported here: the quick start reads TASKS before it knows whether fairseq is there.
    from binarize import Dictionary, bpe_encoder, write_dataset

    names = ("sentencepiece_model", "gpt2_encoder_json", "gpt2_vocab_bpe")
    options = {name: getattr(args, name) for name in names if getattr(args, name)}
    encode = bpe_encoder(args.bpe, **options)
    dictionary = Dictionary.load(str(args.dict))
    task = TASKS[args.task]
    labels = Dictionary()  # numbers the classes in the order of task.labels
    for label in task.labels:
        labels.add_symbol(label)

    for split, name in split_files(args.task).items():
        table = read_table(args.glue_dir / args.task / f"{name}.tsv", task)
        for i, column in enumerate(task.sentences):
            lines = (encode(row[column]) for row in table)
            write_dataset(lines, dictionary, args.out / f"input{i}" / split)
            shutil.copyfile(args.dict, args.out / f"input{i}" / "dict.txt")
        values = [row[task.label] for row in table]
        folder = args.out / "label"
        folder.mkdir(exist_ok=True)
        if task.labels:
            write_dataset(values, labels, folder / split)
            labels.save(str(folder / "dict.txt"))
        else:
            scores = "".join(f"{float(value) / STS_B_RANGE}\n" for value in values)
            (folder / f"{split}.label").write_text(scores)
        print(f"{args.task} {split}: {len(table)} rows -> {args.out}")


if __name__ == "__main__":
    main()
