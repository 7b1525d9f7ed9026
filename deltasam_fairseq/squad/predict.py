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
from typing import Any, Dict, List, Sequence

import torch
from fairseq import checkpoint_utils, utils

from deltasam_fairseq.checkpoints import (
    CheckpointDamagedError,
    CheckpointRefusedError,
)
from deltasam_fairseq.data.encoding_options import positive
from deltasam_fairseq.data.files import DataError, atomic_write
from deltasam_fairseq.glue.write_splits import without_paths
from deltasam_fairseq.squad.metrics import score_answer
from deltasam_fairseq.squad.questions import read_record
from deltasam_fairseq.squad.spans import Candidate

TASK = "span_prediction"


def check(args: argparse.Namespace) -> Dict[str, Any]:
    """Return what task.json says of the split.

    Raises:
        DataError: a file or the split is not there.
    """
    try:
        record = read_record(args.data)
    except ValueError as error:
        raise DataError(f"--data {error}") from error
    for path in args.path:
        check_checkpoint(path, record)
    if args.out.exists() and not args.out.is_dir():
        raise DataError(f"--out {args.out}: is a file; give a folder")
    splits = record["splits"]
    if args.split not in splits:
        raise DataError(f"--split {args.split}: {args.data} has {', '.join(splits)}")
    return splits[args.split]


def check_checkpoint(path: Path, record: Dict[str, Any]) -> None:
    """Compare the data that a checkpoint was trained on with the data to predict.

    Raises:
        DataError: it cannot be read, has too few positions, or is of another task or
            encoding, as far as it can be known.
    """
    if not path.is_file():
        raise DataError(f"--path {path}: no such file")
    try:
        options = checkpoint_utils.load_checkpoint_to_cpu(str(path))["cfg"]["task"] or {}
    except (CheckpointDamagedError, CheckpointRefusedError) as error:
        raise DataError(f"--path: {error}") from error  # names the file itself
    except (AttributeError, KeyError, TypeError) as error:  # of fairseq's, which expects its own
        raise DataError(
            f"--path {path}: no checkpoint of fairseq ({type(error).__name__}: {error}); give one "
            "that fairseq-train has written"
        ) from error
    name = options.get("_name")
    if name != TASK:
        raise DataError(f"--path {path}: of --task {name}, not of --task {TASK}")
    positions, longest = options["max_positions"], record["max_seq_length"]
    if longest > positions:
        raise DataError(
            f"--path {path}: the model has --max-positions {positions}, the windows of the data "
            f"have up to {longest} tokens; prepare them with --max-seq-length {positions}"
        )
    origin = Path(options.get("data") or "")
    if not (origin / "task.json").is_file():
        return
    made = read_record(origin)
    for key in ("bpe", "separators"):
        if without_paths(made.get(key)) != without_paths(record.get(key)):
            raise DataError(
                f"--path {path}: trained on data of another {key}; run squad.prepare with what "
                f"{origin} was made with"
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


def main() -> int:
    """Answer the questions of a split; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder made by squad.prepare")
    add("--split", default="valid", help="of the data: valid, test, ... (default: valid)")
    add("--path", type=Path, nargs="+", required=True, help="fine-tuned checkpoints")
    add("--out", type=Path, required=True, help="folder to write")
    add("--batch-size", type=positive(int), default=32, help="windows at a time (default: 32)")
    add("--max-answer-length", type=positive(int), help="in tokens (default: as in training)")
    add("--null-threshold", type=threshold, help="odds of 'no answer' (default: as in training)")
    args = parser.parse_args()
    try:
        entry = check(args)
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
            [str(path) for path in args.path], arg_overrides={"data": str(args.data)}
        )
        for name in ("max_answer_length", "null_threshold"):
            if getattr(args, name) is None:
                setattr(args, name, getattr(cfg.criterion, name))
            setattr(cfg.criterion, name, getattr(args, name))
        criterion = task.build_criterion(cfg.criterion)
        for model in models:
            model.eval()
            if torch.cuda.is_available():
                model.cuda()
        write(args, entry, task, candidates(models, task, criterion, args.split, args.batch_size))
    except DataError as error:
        print(f"squad.predict: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
