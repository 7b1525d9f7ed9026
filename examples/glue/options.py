"""Options of examples.glue.run, those that examples.glue.search has too, and their checks."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from deltasam_fairseq.glue.tasks import GLUE
from deltasam_fairseq.options import ranged
from examples.glue.stages import (
    AVERAGES,
    CONFIG,
    FAMILY,
    HYPERPARAMETERS,
    LR,
    OPTIMIZERS,
    OWN_RECIPES,
    PRECISIONS,
    REGULARISERS,
    method_overrides,
    recipe_of,
    size_overrides,
    teacher_of,
)

BATCH = 16  # of a default recipe


def names(folder: Path) -> List[str]:
    """Return the names of a group of configurations."""
    return sorted(p.stem for p in folder.iterdir())


def common_options(program: str, description: str) -> argparse.ArgumentParser:
    """Return the options that examples.glue.run and examples.glue.search have.

    Args:
        program: as in ``python -m PROGRAM``.
    """
    options = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        epilog="What follows -- are overrides for every fairseq-hydra-train.",
    )
    add, count = options.add_argument, ranged(int, at_least=1)
    share = ranged(float, above=0, below=1)
    add("--glue-dir", type=Path, help="folder with a folder a task of GLUE's TSV files")
    add("--checkpoint", type=Path, required=True, help="fairseq's model.pt to start from")
    add("--dict", type=Path, help="of --checkpoint (default: dict.txt beside it)")
    add("--backbone", required=True, choices=names(CONFIG / "backbone"))
    add("--recipe", help="folder of config/recipe (default: that of the backbone)")
    add("--tasks", nargs="+", default=list(GLUE), help="of GLUE, or folders of --glue-dir")
    add(
        "--task-columns",
        nargs=2,
        metavar=("SENTENCE[,SENTENCE2]", "LABEL"),
        help="of tasks that are not GLUE's: as --columns of glue.prepare",
    )
    add("--train-rows", type=count, metavar="N", help="rows to train on, drawn")
    add("--label-noise", type=share, metavar="SHARE", help="share of wrong labels to train on")
    add("--noise-seed", type=int, default=1, help="of --train-rows and --label-noise (default: 1)")
    add(
        "--batch-size",
        type=count,
        default=BATCH,
        help=f"sentences, of a default recipe (default: {BATCH})",
    )
    add("--epochs", type=count, default=10, help="of a default recipe (default: 10)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    add(
        "--bpe",
        choices=("gpt2", "sentencepiece", "wordpiece"),
        help="for --glue-dir (default: wordpiece where vocab.txt is beside --dict, else gpt2)",
    )
    add("--any-rows", action="store_true", help="other rows than those of GLUE's own files")
    add("--bpe-options", nargs="*", default=[], metavar="OPTION[=VALUE]", help="of glue.prepare")
    add("--precision", choices=list(PRECISIONS), help="default: fp16 on GPUs, fp32 on CPUs")
    add("--jobs", type=count, help="runs at a time (default: one a GPU, or one)")
    add("--cores", type=count, default=2, help="CPU threads of each run (default: 2)")
    add("--out", type=Path, required=True, help="folder of the results")
    return options


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = common_options(
        "examples.glue.run",
        "Fine-tune on GLUE: tasks x methods x seeds, and the report that compares them.",
    )
    add = options.add_argument
    add("--data", type=Path, help="instead of --glue-dir: folder with prepared <task> folders")
    add(
        "--methods",
        nargs="+",
        default=list(OPTIMIZERS),
        help=f"one optimizer of {' '.join(OPTIMIZERS + FAMILY)}, one of {' '.join(REGULARISERS)}, "
        f"one of {' '.join(AVERAGES)}, or several joined by + (default: {' '.join(OPTIMIZERS)})",
    )
    add("--teacher", help="checkpoint that distill learns from; {task} stands for the task")
    add(
        "--chosen", nargs="+", type=Path, help="chosen.json of search.py: rho and beta of each task"
    )
    add("--keep", choices=("best", "none"), default="best", help="checkpoints to keep")
    add("--sharpness", action="store_true", help="measure that of each run's best checkpoint too")
    add("--list", action="store_true", help="show the runs and end")
    add("--only", type=int, metavar="N", help="make the N-th run alone, from 0; no report")
    return options


def check_common(args: argparse.Namespace) -> Optional[str]:
    """Return an error in the common options, with its remedy, or None; set defaults."""
    args.recipe = args.recipe or OWN_RECIPES.get(args.backbone, args.backbone)
    for name in ("tasks", "seeds"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    args.dict = args.dict or args.checkpoint.parent / "dict.txt"
    if not args.checkpoint.is_file():
        return f"--checkpoint {args.checkpoint}: no such file; give fairseq's model.pt"
    if args.glue_dir is not None and not args.dict.is_file():
        return f"--dict {args.dict}: no such file; give the dict.txt of the checkpoint"
    vocabulary = args.dict.parent / "vocab.txt"
    args.bpe = args.bpe or ("wordpiece" if vocabulary.is_file() else "gpt2")
    if args.bpe == "wordpiece" and not any("wordpiece-vocab" in o for o in args.bpe_options):
        args.bpe_options = [*args.bpe_options, f"wordpiece-vocab={vocabulary}"]
    own = [task for task in args.tasks if task not in GLUE]
    changes = [args.train_rows, args.label_noise, args.task_columns]
    if args.glue_dir is None and any(value is not None for value in changes):
        return "--train-rows, --label-noise, --task-columns: only with --glue-dir"
    if args.glue_dir is not None and own and args.task_columns is None:
        return f"--tasks {own[0]}: not a task of GLUE; give its columns by --task-columns"
    for task in args.tasks:
        if recipe_of(args, task) is None:
            recipe, known = CONFIG / "recipe" / args.recipe, ", ".join(names(CONFIG / "recipe"))
            return f"--recipe {args.recipe}: {recipe / task}.yaml is missing; there are {known}"
    try:
        args.sizes = {task: size_overrides(args, task) for task in args.tasks}
    except ValueError as error:
        return str(error)
    return None


def check(args: argparse.Namespace) -> Optional[str]:
    """Return an error in the arguments, with its remedy, or None; set defaults."""
    args.methods = list(dict.fromkeys(args.methods))
    if (args.glue_dir is None) == (args.data is None):
        return "give either --glue-dir, GLUE's TSV files, or --data, prepared data"
    wrong = check_common(args)
    if wrong is not None:
        return wrong
    for task in args.tasks:
        if args.data is not None and not (args.data / task / "label").is_dir():
            return f"--data {args.data}: {args.data / task}/label is missing; use --glue-dir"
    if args.sharpness and args.keep == "none":
        return "--sharpness with --keep none: it is measured from the checkpoint; use --keep best"
    try:
        args.chosen = read_chosen(args.chosen or [], args.tasks, args.backbone)
        for method, task in itertools.product(args.methods, args.tasks):
            method_overrides(method, task)
            teacher_of(args, method, task)
    except ValueError as e:
        return str(e)
    return None


def read_chosen(
    paths: Sequence[Path], tasks: Sequence[str], backbone: str
) -> Dict[str, Dict[str, float]]:
    """Return what search.py chose: task -> option of the optimizer -> its value.

    Raises:
        ValueError: a file is not one of search.py's, or is of another backbone, or all together
            lack a task.
    """
    chosen: Dict[str, Dict[str, float]] = {}
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            for task, values in record["chosen"].items():
                options = [*HYPERPARAMETERS["delta_sam"], *({LR} & set(values))]
                chosen[task] = {option: float(values[option]) for option in options}
                if not all(0 < value < float("inf") for value in chosen[task].values()):
                    raise ValueError(f"{task}: {values} are not all above 0")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--chosen {path}: not a chosen.json of search.py ({error!r})"
            ) from error
        if record.get("backbone", backbone) != backbone:
            raise ValueError(
                f"--chosen {path}: was chosen for --backbone {record['backbone']}, not {backbone}; "
                "run search.py with this one"
            )
    lacking = [task for task in tasks if task not in chosen]
    if paths and lacking:
        raise ValueError(
            f"--chosen {' '.join(map(str, paths))}: lacks {lacking[0]}; run search.py for it, or "
            "remove it from --tasks"
        )
    return chosen


def absolute(args: argparse.Namespace) -> None:
    """Make the paths independent of the folder that a command runs in."""
    for name in ("out", "checkpoint", "dict", "glue_dir", "data"):
        path = getattr(args, name)
        setattr(args, name, None if path is None else path.absolute())
