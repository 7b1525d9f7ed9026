"""Prepare a task for the experiment with wrong labels, with splits that tell what was learnt.

The splits: ``train`` and ``valid``, held out of the same rows, with wrong labels in both; ``dev``,
clean; ``kept`` and ``replaced``, the rows of ``train`` whose labels are right and wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from deltasam_fairseq.glue import prepare
from deltasam_fairseq.glue.tasks import TASKS, find_file, own_task, read_table
from deltasam_fairseq.glue.training_rows import draw_rows, replace_labels
from deltasam_fairseq.glue.write_splits import held_out

Row = Tuple[str, ...]  # sentences, label


def read_rows(folder: Path, name: str) -> Tuple[Dict[str, List[Row]], Tuple[str, ...]]:
    """Return the rows of train.tsv and dev.tsv, and the classes of a task.

    Args:
        folder: with the task's folder.
        name: one of GLUE's tasks, or a folder of files with the columns sentence and label.
    """
    files = {file: find_file(folder, name, file) for file in ("train", "dev")}
    first = files["train"].open(encoding="utf-8").readline().rstrip("\n")
    own = name not in TASKS or first == "sentence\tlabel"
    task = own_task(folder, name, ("sentence", "label"), 0) if own else TASKS[name]
    tables = {file: read_table(path, task) for file, path in files.items()}
    rows = {file: list(zip(*table.sentences, table.labels)) for file, table in tables.items()}
    return rows, task.labels


def splits_of(
    rows: Sequence[Row], classes: Sequence[str], count: int, noise: float, share: float, seed: int
) -> Dict[str, List[Row]]:
    """Return the rows of every split but ``dev``.

    Args:
        rows: of train.tsv.
        classes: that a label is replaced by.
        count: rows to draw, of which ``share`` are held out; all where there are fewer.
        noise: share of wrong labels.
        seed: of the draw and of the noise.
    """
    drawn = [rows[i] for i in draw_rows(len(rows), min(count, len(rows)), seed)]
    labels, changed = replace_labels([row[-1] for row in drawn], classes, noise, seed)
    noisy = [(*row[:-1], label) for row, label in zip(drawn, labels)]
    out = held_out(len(noisy), share)
    train = [i for i in range(len(noisy)) if not out[i]]
    wrong = set(changed)
    found = {
        "train": train,
        "valid": [i for i in range(len(noisy)) if out[i]],
        "kept": [i for i in train if i not in wrong],
        "replaced": [i for i in train if i in wrong],
    }
    return {split: [noisy[i] for i in where] for split, where in found.items() if where}


def write_tsv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with a header line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["sentence", "sentence2"][: len(rows[0]) - 1] + ["label"]
    lines = ["\t".join(row) for row in (names, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    """Write the splits; return the exit code."""
    options = argparse.ArgumentParser(
        prog="python -m examples.glue.noisy_data", description=__doc__.splitlines()[0]
    )
    add = options.add_argument
    add("--source", type=Path, required=True, help="folder with the task's folder of TSV files")
    add("--task", required=True)
    add("--rows", type=int, required=True, help="of train.tsv, with those held out")
    add("--noise", type=float, default=0.0, help="share of wrong labels")
    add("--hold-out", type=float, default=0.2, help="share of the rows")
    add("--seed", type=int, default=1)
    add("--model", type=Path, required=True, help="folder with dict.txt and vocab.txt")
    add("--out", type=Path, required=True)
    args = options.parse_args()
    files, classes = read_rows(args.source, args.task)
    changes = (args.rows, args.noise, args.hold_out, args.seed)
    splits = {**splits_of(files["train"], classes, *changes), "dev": files["dev"]}
    columns = "sentence" if len(splits["dev"][0]) == 2 else "sentence,sentence2"
    for name in [split for split in splits if split != "train"]:
        folder = args.out if name == "valid" else args.out / "parts" / name
        write_tsv(args.out / "tsv" / name / "train.tsv", splits["train"])
        write_tsv(args.out / "tsv" / name / "dev.tsv", splits[name])
        words = ["--glue-dir", args.out / "tsv", "--task", name, "--columns", columns, "label"]
        words += ["--dict", args.model / "dict.txt", "--bpe", "wordpiece"]
        words += ["--wordpiece-vocab", args.model / "vocab.txt", "--out", folder]
        code = prepare.main(list(map(str, words)))
        if code:
            return code
        if name != "valid":
            for path in folder.glob("*/valid.*"):
                path.rename(args.out / path.parent.name / path.name.replace("valid", name, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
