"""Write GLUE's submission files from fine-tuned checkpoints.

    python -m deltasam_fairseq.glue.predict --data data/RTE \\
        --path RTE/adam-seed1/checkpoint_best.pt --out submission

``data/RTE`` is what glue.prepare makes of a folder with a ``test.tsv``.  Written is
``submission/RTE.tsv``: the ids of test.tsv and the labels as GLUE names them, or scores on the
task's own scale (STS-B: 0 to 5).  MNLI gives MNLI-m.tsv and MNLI-mm.tsv.  Several checkpoints are
averaged: class probabilities, or scores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from fairseq import utils
from fairseq.data import Dictionary

from deltasam_fairseq.data.files import DataError, atomic_write
from deltasam_fairseq.data.programs import load_and_check, prediction_parser, run_program
from deltasam_fairseq.data.splits import read_record
from deltasam_fairseq.glue.tasks import TASKS

NAMES = {("MNLI", "test"): "MNLI-m", ("MNLI", "test1"): "MNLI-mm"}


def record_of(data: Path) -> Dict[str, Any]:
    """Return what glue.prepare recorded about the data.

    Raises:
        DataError: there is no record, or no test split.
    """
    record = read_record(data)
    if not record:
        raise DataError(
            f"--data {data}: no task.json; make it with python -m deltasam_fairseq.glue.prepare"
        )
    if not any(split.startswith("test") for split in record["splits"]):
        raise DataError(
            f"--data {data}: it has no test split; run python -m deltasam_fairseq.glue.prepare "
            "on a folder of GLUE with test.tsv"
        )
    return record


def check_origin(path: Path, cfg: Any, origin: Path, record: Dict[str, Any]) -> None:
    """Compare the task of the data with that of the data which the checkpoint was trained on.

    Args:
        path: of the checkpoint.
        cfg: its configuration.
        origin: folder of the data that it was trained on.
        record: of the data to predict.

    Raises:
        DataError: they differ in task, kind or labels, as far as it can be known.
    """
    made = read_record(origin)
    if made and made["task"] != record["task"]:
        raise DataError(f"--path {path}: trained on {made['task']}, the data is {record['task']}")
    remedy = f"run glue.prepare with the columns that {origin} was made with"
    if made and made.get("sentences") != record.get("sentences"):
        raise DataError(
            f"--path {path}: trained on rows of {made['sentences']} sentences, the data has "
            f"{record['sentences']}; {remedy}"
        )
    columns = [found.get("columns", []) for found in (made, record)]
    if sorted(columns[0]) == sorted(columns[1]) and columns[0] != columns[1]:
        raise DataError(
            f"--path {path}: trained on the columns {', '.join(columns[0])} in this order, the "
            f"data has {', '.join(columns[1])}; {remedy}"
        )
    names = origin / "label" / "dict.txt"
    if names.is_file() and record["scale"] is None:
        labels = Dictionary.load(str(names)).symbols[Dictionary().nspecial :]
        if labels[: len(record["labels"])] != list(record["labels"]):
            raise DataError(
                f"--path {path}: trained with the labels {' '.join(labels)} in this order, the "
                f"data has {' '.join(record['labels'])}: its classes mean other labels; train it "
                "on data that glue.prepare made"
            )
    elif not origin.is_dir():
        print(
            f"{path}: the data that it was trained on is not here, so its labels are not compared"
        )
    scores = (cfg["criterion"] or {}).get("regression_target", False)
    found = "scores" if scores else f"{cfg['task'].get('num_classes', 0)} classes"
    wanted = "scores" if record["scale"] is not None else f"{len(record['labels'])} classes"
    if found != wanted:
        raise DataError(f"--path {path}: trained for {found}, the data has {wanted}")


@torch.no_grad()
def scores(models: Sequence[Any], task: Any, cfg: Any, split: str, batch_size: int) -> torch.Tensor:
    """Return the models' mean class probabilities (N, classes), or mean predictions (N, 1)."""
    task.load_dataset(split)
    dataset = task.dataset(split)
    lengths = [dataset.size(i) for i in range(len(dataset))]
    limit = min(model.max_positions() for model in models)
    if max(lengths) > limit:
        raise DataError(
            f"--data {task.cfg.data}, {split}: row {lengths.index(max(lengths)) + 1} has "
            f"{max(lengths)} tokens, more than the {limit} positions of the model (its "
            "--max-positions); cut it in the TSV file and run glue.prepare again"
        )
    regression = cfg.criterion.regression_target
    kwargs = {
        "features_only": True,
        "classification_head_name": cfg.criterion.classification_head_name,
    }
    iterator = task.get_batch_iterator(dataset, max_sentences=batch_size)
    found: List[torch.Tensor] = [torch.empty(0)] * len(dataset)
    for sample in iterator.next_epoch_itr(shuffle=False):
        sample = utils.move_to_cuda(sample) if torch.cuda.is_available() else sample
        outputs = [model(**sample["net_input"], **kwargs)[0].float() for model in models]
        outputs = outputs if regression else [output.softmax(dim=-1) for output in outputs]
        mean = torch.stack(outputs).mean(dim=0).cpu()
        for index, row in zip(sample["id"].tolist(), mean):
            found[index] = row
    return torch.stack(found)


def answers(record: Dict[str, Any], task: Any, rows: torch.Tensor) -> List[str]:
    """Return one line a sentence: its label's name, or its score on the task's scale, within it.

    Raises:
        DataError: the model was trained with other labels.
    """
    if record["scale"] is not None:
        found = rows.view(-1) * record["scale"]
        if record["task"] in TASKS:  # of a task of the user's the range is not known
            found = found.clamp(0, record["scale"])
        return [f"{score:.3f}" for score in found.tolist()]
    labels = record["labels"]
    symbols = task.label_dictionary.symbols[task.label_dictionary.nspecial :][: len(labels)]
    if rows.size(1) != len(labels) or list(symbols) != list(labels):
        raise DataError(
            f"the checkpoint has {rows.size(1)} classes and labels {symbols}, the data has {labels}"
        )
    return [labels[i] for i in rows.argmax(dim=1).tolist()]


def predict(args: argparse.Namespace) -> None:
    """Predict every test split and write its file."""
    record = record_of(args.data)
    models, cfg, task = load_and_check(
        args, record, lambda path, cfg, origin: check_origin(path, cfg, origin, record)
    )
    for split in sorted(s for s in record["splits"] if s.startswith("test")):
        rows = scores(models, task, cfg, split, args.batch_size)
        ids = (args.data / "id" / f"{split}.txt").read_text(encoding="utf-8").split("\n")[:-1]
        lines = answers(record, task, rows)
        assert len(ids) == len(lines)
        path = args.out / f"{NAMES.get((record['task'], split), record['task'])}.tsv"
        text = "".join(f"{i}\t{line}\n" for i, line in zip(ids, lines))
        atomic_write(path, f"index\tprediction\n{text}")
        print(f"{path}: {len(lines)} rows")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Do what the command line says; return the exit code."""
    return run_program(prediction_parser("glue.predict", __doc__, "sentences"), predict, argv)


if __name__ == "__main__":
    sys.exit(main())
