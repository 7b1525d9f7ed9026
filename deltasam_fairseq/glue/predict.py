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

from deltasam_fairseq.checkpoints import Loaded
from deltasam_fairseq.checkpoints.data_record import label_names
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


@torch.no_grad()
def scores(loaded: Sequence[Loaded], split: str, batch_size: int) -> torch.Tensor:
    """Return the models' mean class probabilities (N, classes), or mean predictions (N, 1).

    Raises:
        DataError: a sentence is longer than the positions of a model.
    """
    task = loaded[0].task
    task.load_dataset(split)
    dataset = task.dataset(split)
    _check_lengths(loaded, dataset, f"--data {task.cfg.data}, {split}")
    iterator = task.get_batch_iterator(dataset, max_sentences=batch_size)
    found: List[torch.Tensor] = [torch.empty(0)] * len(dataset)
    for sample in iterator.next_epoch_itr(shuffle=False):
        sample = utils.move_to_cuda(sample) if torch.cuda.is_available() else sample
        mean = torch.stack([_output(each, sample["net_input"]) for each in loaded]).mean(dim=0)
        for index, row in zip(sample["id"].tolist(), mean.cpu()):
            found[index] = row
    return torch.stack(found)


def _check_lengths(loaded: Sequence[Loaded], dataset: Any, name: str) -> None:
    lengths = [dataset.size(i) for i in range(len(dataset))]
    longest, limit = max(lengths), min(each.model.max_positions() for each in loaded)
    if longest > limit:
        raise DataError(
            f"{name}: row {lengths.index(longest) + 1} has {longest} tokens, more than the {limit} "
            "positions of the model (its --max-positions); cut it in the TSV file and run "
            "glue.prepare again"
        )


def _output(loaded: Loaded, inputs: Dict[str, Any]) -> torch.Tensor:
    criterion = loaded.cfg.criterion
    head = {"classification_head_name": criterion.classification_head_name}
    output = loaded.model(**inputs, features_only=True, **head)[0].float()
    return output if criterion.regression_target else output.softmax(dim=-1)


def answers(record: Dict[str, Any], task: Any, rows: torch.Tensor) -> List[str]:
    """Return one line a sentence: its label's name, or its score on the task's scale, within it.

    Raises:
        DataError: the model has other classes, or label/dict.txt is not that of the data.
    """
    if record["scale"] is not None:
        found = rows.view(-1) * record["scale"]
        if record["task"] in TASKS:  # of a task of the user's the range is not known
            found = found.clamp(0, record["scale"])
        return [f"{score:.3f}" for score in found.tolist()]
    labels = list(record["labels"])
    symbols = label_names(task.label_dictionary)
    if rows.size(1) != len(labels) or symbols != labels:
        raise DataError(
            f"the checkpoint has {rows.size(1)} classes and labels {symbols}, the data has {labels}"
        )
    return [labels[i] for i in rows.argmax(dim=1).tolist()]


def predict(args: argparse.Namespace) -> None:
    """Predict every test split and write its file."""
    record = record_of(args.data)
    loaded = load_and_check(args)
    for split in sorted(s for s in record["splits"] if s.startswith("test")):
        rows = scores(loaded, split, args.batch_size)
        ids = (args.data / "id" / f"{split}.txt").read_text(encoding="utf-8").split("\n")[:-1]
        lines = answers(record, loaded[0].task, rows)
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
