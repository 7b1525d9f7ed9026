"""Answer the questions of a prepared data set with a fine-tuned model, in SQuAD's own format.

    python -m deltasam_fairseq.squad.predict --data SQuAD-bin \\
        --path checkpoint_best.pt --out predictions

``predictions/predictions.json`` is {question's id: answer}, what SQuAD's evaluate-v1.1.py and
evaluate-v2.0.py read.  For SQuAD 2.0 the answer is empty where there is none, and
``null_odds.json`` holds by how much "none" was the likelier (evaluate-v2.0.py -n).  Where the
answers are known, ``metrics.json`` has exact match and F1, and both are printed.  Several
checkpoints are averaged: the probabilities of start and end.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from fairseq import utils

from deltasam_fairseq.data.files import DataError, atomic_write
from deltasam_fairseq.data.programs import load_and_check, prediction_parser, run_program
from deltasam_fairseq.options import ranged
from deltasam_fairseq.squad.metrics import score_answer
from deltasam_fairseq.squad.questions import TASK, read_span_record
from deltasam_fairseq.squad.spans import Candidate


def check_task(path: Path, cfg: Any, record: Dict[str, Any]) -> None:
    """Raise a DataError if a checkpoint is of another task, or has too few positions."""
    name = cfg["task"].get("_name")
    if name != TASK:
        raise DataError(f"--path {path}: of --task {name}, not of --task {TASK}")
    positions, longest = cfg["task"]["max_positions"], record["max_seq_length"]
    if longest > positions:
        raise DataError(
            f"--path {path}: the model has --max-positions {positions}, the windows of the data "
            f"have up to {longest} tokens; prepare them with --max-seq-length {positions}"
        )


@torch.no_grad()
def candidates(
    models: Sequence[Any], task: Any, criterion: Any, split: str, batch_size: int
) -> Dict[int, Candidate]:
    """Return the best answer to every question, by its number, from all of its windows."""
    task.needs_answers = False
    task.load_dataset(split)
    iterator = task.get_batch_iterator(task.dataset(split), max_sentences=batch_size)
    found: Dict[int, Candidate] = {}
    for sample in iterator.next_epoch_itr(shuffle=False):
        sample = utils.move_to_cuda(sample) if torch.cuda.is_available() else sample
        scores = [criterion.batch(model, sample, 1.0).scores().double() for model in models]
        mean = torch.stack(scores).logsumexp(dim=0) - torch.tensor(float(len(models))).log()
        for number, text, score, null in criterion.answers(sample, criterion.spans(mean, sample)):
            new = Candidate(score, null, text)
            found[number] = new.joined(found[number]) if number in found else new
    return found


def write(args: argparse.Namespace, entry: Dict[str, Any], task: Any, found: Dict) -> None:
    """Write the files, and print the metrics if the answers are known."""
    threshold = args.null_threshold if entry["version_2"] else float("inf")
    answers: Dict[str, str] = {}
    odds: Dict[str, float] = {}
    values: List[Any] = []
    for number, candidate in sorted(found.items()):
        question = task.questions[number]
        odds[question.id] = candidate.null_odds
        answers[question.id] = "" if candidate.null_odds > threshold else candidate.answer
        if entry["labelled"]:
            values.append(score_answer(answers[question.id], question.answers, question.version_2))
    files: Dict[str, Any] = {"predictions.json": answers}
    if entry["version_2"]:
        files["null_odds.json"] = odds
    if values:
        exact, f1 = (100 * sum(column) / len(values) for column in zip(*values))
        files["metrics.json"] = {"exact_match": exact, "f1": f1, "total": len(values)}
        print(f"exact_match {exact:.2f}, f1 {f1:.2f}")
    for name, content in files.items():
        atomic_write(args.out / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    print(f"{args.out / 'predictions.json'}: {len(answers)} answers")


def threshold(text: str) -> float:
    """Return a number for argparse; infinite ones answer all questions, or none."""
    number = float(text)
    if math.isnan(number):
        raise ValueError
    return number


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = prediction_parser("squad.predict", __doc__, "windows")
    add = options.add_argument
    add("--split", default="valid", help="of the data: valid, test, ... (default: valid)")
    add(
        "--max-answer-length",
        type=ranged(int, at_least=1),
        help="in tokens (default: as in training)",
    )
    add("--null-threshold", type=threshold, help="odds of 'no answer' (default: as in training)")
    return options


def predict(args: argparse.Namespace) -> None:
    """Answer the questions of a split and write the files."""
    try:
        record = read_span_record(args.data)
    except ValueError as error:
        raise DataError(f"--data {error}") from error
    splits = record["splits"]
    if args.split not in splits:
        raise DataError(f"--split {args.split}: {args.data} has {', '.join(splits)}")
    loaded = load_and_check(args, lambda path, cfg: check_task(path, cfg, record))
    cfg, task = loaded[0].cfg, loaded[0].task
    for name in ("max_answer_length", "null_threshold"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(cfg.criterion, name))
        setattr(cfg.criterion, name, getattr(args, name))
    criterion = task.build_criterion(cfg.criterion)
    models = [each.model for each in loaded]
    found = candidates(models, task, criterion, args.split, args.batch_size)
    write(args, splits[args.split], task, found)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Do what the command line says; return the exit code."""
    return run_program(parser(), predict, argv)


if __name__ == "__main__":
    sys.exit(main())
