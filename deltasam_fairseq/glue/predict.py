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
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import Dictionary

from deltasam_fairseq.data.files import DataError
from deltasam_fairseq.glue.tasks import TASKS
from deltasam_fairseq.glue.write_splits import without_paths

NAMES = {("MNLI", "test"): "MNLI-m", ("MNLI", "test1"): "MNLI-mm"}


def read_record(data: Path) -> Dict[str, Any]:
    """Return what glue.prepare wrote about the data.

    Raises:
        DataError: it is not there, or there is no test split.
    """
    path = data / "task.json"
    if not path.is_file():
        raise DataError(
            f"--data {data}: no task.json; make it with python -m deltasam_fairseq.glue.prepare"
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    if not any(split.startswith("test") for split in record["splits"]):
        raise DataError(
            f"--data {data}: it has no test split; run python -m deltasam_fairseq.glue.prepare "
            "on a folder of GLUE with test.tsv"
        )
    return record


def check_origin(path: Path, record: Dict[str, Any]) -> None:
    """Compare the task of the data with that of the data which the checkpoint was trained on.

    Raises:
        DataError: they differ in task, kind, labels or encoding, as far as it can be known.
    """
    if not path.is_file():
        raise DataError(f"--path {path}: no such file")
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    options = state["cfg"]["task"] or {}
    origin = Path(options.get("data") or "") / "task.json"
    if origin.is_file():
        made = json.loads(origin.read_text(encoding="utf-8"))
        if made["task"] != record["task"]:
            raise DataError(
                f"--path {path}: trained on {made['task']}, the data is {record['task']}"
            )
        if without_paths(made["bpe"]) != without_paths(record["bpe"]):
            raise DataError(
                f"--path {path}: trained on data of another BPE or dictionary; run glue.prepare "
                f"with what {origin.parent} was made with"
            )
    names = origin.parent / "label" / "dict.txt"
    if names.is_file() and record["scale"] is None:
        labels = Dictionary.load(str(names)).symbols[Dictionary().nspecial :]
        if labels[: len(record["labels"])] != list(record["labels"]):
            raise DataError(
                f"--path {path}: trained with the labels {' '.join(labels)} in this order, the "
                f"data has {' '.join(record['labels'])}: its classes mean other labels; train it "
                "on data that glue.prepare made"
            )
    elif not origin.parent.is_dir():
        print(
            f"{path}: the data that it was trained on is not here, so its labels are not compared"
        )
    scores = (state["cfg"]["criterion"] or {}).get("regression_target", False)
    classes = options.get("num_classes", 0)
    found = "scores" if scores else f"{classes} classes"
    wanted = "scores" if record["scale"] is not None else f"{len(record['labels'])} classes"
    if found != wanted:
        raise DataError(f"--path {path}: trained for {found}, the data has {wanted}")


@torch.no_grad()
def scores(models: Sequence[Any], task: Any, cfg: Any, split: str, batch_size: int) -> torch.Tensor:
    """Return the models' mean class probabilities (N, classes), or mean predictions (N, 1)."""
    task.load_dataset(split)
    dataset = task.dataset(split)
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


def main() -> int:
    """Predict every test split and write the files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder made by glue.prepare")
    add("--path", type=Path, nargs="+", required=True, help="fine-tuned checkpoints of that task")
    add("--out", type=Path, required=True, help="folder to write")
    add("--batch-size", type=int, default=32, help="sentences at a time (default: 32)")
    args = parser.parse_args()
    try:
        record = read_record(args.data)
        for path in args.path:
            check_origin(path, record)
        if args.out.exists() and not args.out.is_dir():
            raise DataError(f"--out {args.out}: is a file; give a folder")
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
            [str(path) for path in args.path], arg_overrides={"data": str(args.data)}
        )
        for model in models:
            model.eval()
            if torch.cuda.is_available():
                model.cuda()
        args.out.mkdir(parents=True, exist_ok=True)
        for split in sorted(s for s in record["splits"] if s.startswith("test")):
            rows = scores(models, task, cfg, split, args.batch_size)
            ids = (args.data / "id" / f"{split}.txt").read_text(encoding="utf-8").split("\n")[:-1]
            lines = answers(record, task, rows)
            assert len(ids) == len(lines)
            name = NAMES.get((record["task"], split), record["task"])
            path = args.out / f"{name}.tsv"
            text = "".join(f"{i}\t{line}\n" for i, line in zip(ids, lines))
            partial = path.with_suffix(".partial")
            partial.write_text(f"index\tprediction\n{text}", encoding="utf-8")
            partial.replace(path)
            print(f"{path}: {len(lines)} rows")
    except DataError as error:
        print(f"glue.predict: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
