"""Fine-tune on GLUE: tasks x methods x seeds, and the report that compares them.

    python -m examples.glue.run --glue-dir GLUE --checkpoint roberta.large/model.pt \\
        --backbone roberta_large --tasks CoLA RTE --methods adam sam delta_sam r3f+delta_sam \\
        --seeds 1 2 3 4 5 --out results/glue

Every run is a fairseq-hydra-train command made of ``config/``: what all share, a backbone, a
recipe (backbone and task), methods.  What follows ``--`` are overrides for all of them.  The same
command skips what is done and goes on with what was cut.  ``--list`` shows the runs, ``--only N``
makes the N-th alone, as slurm.sbatch does.

Your own task: any folder with train.tsv and dev.tsv beside GLUE's, its columns by --task-columns.
A task without a recipe takes the backbone's default one, --epochs of it.  For experiments,
--train-rows and --label-noise make the training data smaller and wrong in part.

    python -m examples.glue.run --glue-dir DATA --tasks TREC --task-columns sentence label \\
        --train-rows 1000 --label-noise 0.4 --checkpoint minilm/model.pt --backbone minilm ...
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from deltasam_fairseq.data.splits import entries_of, read_record
from deltasam_fairseq.glue.tasks import GLUE, TASKS, find_file, own_task, read_table
from deltasam_fairseq.glue.write_splits import PARTS
from deltasam_fairseq.options import ranged
from examples.common.runner import exit_code, run_all, run_side_by_side
from examples.common.stage import Stage, is_done, module, option_words, sharpness_stage, split_words

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).resolve().parent / "config"

PYTHON = sys.executable
OPTIMIZERS = ("adam", "sam", "delta_sam")
# SAM's family, at the rho that was chosen for SAM
AT_RHO = ("m_sharpness_4", "m_sharpness_1", "rw_sam", "functional_sam", "gsam", "fisher_sam")
FAMILY = ("asam", "tram", "tram_theta", *AT_RHO)
HYPERPARAMETERS: Dict[str, Sequence[str]] = {  # of each optimizer, that search.py chooses
    **dict.fromkeys(("adam", *FAMILY), ()),
    **dict.fromkeys(("sam", *AT_RHO), ("sam_rho",)),
    "delta_sam": ("sam_rho", "delta_sam_beta"),
}
LR = "lr"  # of every optimizer, chosen too where search.py has --lr
REGULARISERS = ("r3f", "r4f", "r_drop", "freelb", "smart", "vat", "distill")
AVERAGES = ("swa", "ema")
OWN_RECIPES = {"minilm": "bert_base", "minilm_3": "bert_base"}  # of backbones without their own
DEFAULT = "default"  # recipe of a backbone for tasks that have none; it counts epochs
BATCH = 16  # of a default recipe
METRICS = {"CoLA": "mcc", "MRPC": "acc_and_f1", "QQP": "acc_and_f1"}  # else accuracy, correlation
WARMUP = 0.06  # share of the updates, of a default recipe
PRECISIONS: Dict[str, List[str]] = {
    "fp32": [],
    "fp16": ["common.fp16=true"],
    "bf16": ["common.bf16=true"],
}


def names(folder: Path) -> List[str]:
    """Return the names of a group of configurations."""
    return sorted(p.stem for p in folder.iterdir())


def common_options(program: str, description: str) -> argparse.ArgumentParser:
    """Return the options of this program and of examples.glue.search.

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
    options = common_options("examples.glue.run", __doc__.splitlines()[0])
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


def method_overrides(
    method: str, task: str, chosen: Optional[Dict[str, float]] = None
) -> List[str]:
    """Return the overrides that take the files of config/ which a method is made of.

    A method is an optimizer, a regulariser, an average of weights, or several with plus signs
    between: ``r3f+delta_sam``, ``delta_sam+swa``.  Without an optimizer it is plain
    Adam.  ``chosen`` has the rho and beta to use instead of the recipe's, by the names of the
    optimizer's options.

    Raises:
        ValueError: for a name that is none of them.
    """
    parts = method.split("+")
    known = OPTIMIZERS + FAMILY + REGULARISERS + AVERAGES
    for part in parts:
        if part not in known:
            raise ValueError(
                f"--methods {method}: {part!r} is not known; of {', '.join(known)} take one "
                "optimizer, one regulariser, one average, or several joined by +"
            )
    optimizers = [part for part in parts if part in OPTIMIZERS + FAMILY]
    regularisers = [part for part in parts if part in REGULARISERS]
    averages = [part for part in parts if part in AVERAGES]
    if max(map(len, (optimizers, regularisers, averages))) > 1:
        raise ValueError(f"--methods {method}: at most one optimizer, one regulariser, one average")
    optimizer = optimizers[0] if optimizers else "adam"
    overrides = [f"+method={optimizer}"]
    overrides += [f"optimization.lr=[{chosen[LR]:g}]"] if chosen and LR in chosen else []
    overrides += [f"optimizer.{o}={chosen[o]:g}" for o in HYPERPARAMETERS[optimizer] if chosen]
    for name in regularisers:
        own = CONFIG / "regulariser" / f"{name}_{task}.yaml"
        overrides.append(f"+regulariser={own.stem if own.is_file() else name}")
    return overrides + [f"+averaging={name}" for name in averages]


def teacher_of(args: argparse.Namespace, method: str, task: str) -> Optional[Path]:
    """Return the checkpoint that a run learns from; None for a method without a teacher.

    Raises:
        ValueError: for one that needs a teacher and has none.
    """
    if "distill" not in method.split("+"):
        return None
    if args.teacher is None:
        raise ValueError(
            f"--methods {method}: give a fine-tuned model with --teacher, for example of a larger "
            "backbone: --teacher results/large/{task}/adam-seed1/checkpoint_best.pt"
        )
    path = Path(args.teacher.replace("{task}", task)).absolute()
    if not path.is_file():
        raise ValueError(f"--teacher {args.teacher}: {path} is missing; fine-tune it first")
    return path


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


def recipe_of(args: argparse.Namespace, task: str) -> Optional[str]:
    """Return the recipe of a task, or the default one of the recipes; None without either."""
    of_backbone = args.recipe == OWN_RECIPES.get(args.backbone, args.backbone)
    default = f"{args.backbone if of_backbone else args.recipe}/{DEFAULT}"
    found = (f"{args.recipe}/{task}", default)
    return next((one for one in found if (CONFIG / "recipe" / f"{one}.yaml").is_file()), None)


def size_overrides(args: argparse.Namespace, task: str) -> List[str]:
    """Return the overrides of a default recipe that depend on the task's data; else none.

    Raises:
        ValueError: the data does not tell the classes and the number of rows.
    """
    if not str(recipe_of(args, task)).endswith(f"/{DEFAULT}"):
        return []
    if args.glue_dir is not None:
        own = task not in GLUE
        found = own_task(args.glue_dir, task, args.task_columns, 0) if own else TASKS[task]
        rows = len(read_table(find_file(args.glue_dir, task, "train"), found).ids)
        classes = len(found.labels)
        rows = min(rows, args.train_rows or rows)
        rows -= round(getattr(args, "hold_out", 0.0) * rows)
    else:
        record = read_record(args.data / task)
        if not record:
            raise ValueError(
                f"--data {args.data}: {args.data / task}/task.json is missing, and {task} has no "
                "recipe of its own; prepare it with python -m deltasam_fairseq.glue.prepare"
            )
        classes, rows = len(record["labels"]), record["splits"]["train"]["rows"]
    updates = args.epochs * -(-rows // args.batch_size)
    metric = METRICS.get(task, "accuracy" if classes else "pearson_and_spearman")
    criterion = [] if classes else ["regression_target"]
    criterion += [] if metric == "accuracy" else [f"report_{metric}"]
    return [
        f"task.num_classes={classes or 1}",
        f"dataset.batch_size={args.batch_size}",
        f"optimization.max_update={updates}",
        f"lr_scheduler.total_num_update={updates}",
        f"lr_scheduler.warmup_updates={int(WARMUP * updates)}",
        *(f"criterion.{name}=true" for name in criterion),
        f"checkpoint.best_checkpoint_metric={metric}",
    ]


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


def parts_overrides(args: argparse.Namespace, task: str) -> List[str]:
    """Return the override that also validates on the training rows with right and with wrong
    labels, where labels were replaced; else none.
    """
    if args.glue_dir is None:
        splits = list(entries_of(args.data / task))
    else:
        splits = list(TASKS[task].splits()) if task in GLUE else ["valid"]
        splits += PARTS if args.label_noise else ()
    valid = [s for s in splits if s.startswith(("valid", "dev")) or s in PARTS]
    return [f"dataset.valid_subset='{','.join(valid)}'"] if set(PARTS) <= set(valid) else []


def preparation(args: argparse.Namespace, held_out: Optional[float] = None) -> List[Stage]:
    """Return the stages that encode the tasks; sets where their data is.

    Args:
        held_out: share of train.tsv to validate with, in place of dev.tsv.
    """
    if args.data is not None:
        return []
    args.data = args.out / "data"
    bpe = [word for option in args.bpe_options for word in option_words(option)]
    changes = ["--noise-seed", str(args.noise_seed)]
    changes += ["--train-rows", str(args.train_rows)] if args.train_rows else []
    changes += ["--label-noise", f"{args.label_noise:g}"] if args.label_noise else []
    return [
        Stage(
            f"encode {task}",
            [
                *module("deltasam_fairseq.glue.prepare", "--glue-dir", args.glue_dir),
                *("--task", task, "--dict", str(args.dict), "--bpe", args.bpe, *bpe),
                *(("--any-rows",) if args.any_rows else ()),
                *(() if task in GLUE else ("--columns", *args.task_columns)),
                *(changes if args.train_rows or args.label_noise else ()),
                *(() if held_out is None else ("--hold-out", f"{held_out:g}")),
                *("--out", "{out}"),
            ],
            args.data / task,
            files=[
                path
                for path in sorted((args.glue_dir / task).glob("*.tsv"))
                if not (held_out and path.name.startswith("dev"))  # which is not read then
            ],
        )
        for task in args.tasks
    ]


def quoted(path: Path) -> str:
    """Return a path as the value of a hydra override, which may have signs of hydra's grammar."""
    return "'" + str(path).replace("'", "\\'") + "'"


def training(
    args: argparse.Namespace, task: str, name: str, overrides: Sequence[str], seed: int, gpus: int
) -> Stage:
    """Return the stage of one run.

    Args:
        name: of the method, for its folder.
        overrides: that make the method, and more; the last one for an option counts.
        gpus: how many there are.
    """
    precision = args.precision or ("fp16" if gpus else "fp32")
    command = [
        *(PYTHON, "-m", "fairseq_cli.hydra_train"),
        *("--config-dir", str(CONFIG), "--config-name", "glue"),
        f"+backbone={args.backbone}",
        f"+recipe={recipe_of(args, task)}",
        f"common.user_dir={quoted(ROOT / 'deltasam_fairseq')}",
        f"common.seed={seed}",
        f"common.cpu={str(not gpus).lower()}",
        *PRECISIONS[precision],
        f"task.data={quoted(args.data / task)}",
        f"checkpoint.finetune_from_model={quoted(args.checkpoint)}",
        "checkpoint.save_dir='{out}'",
        "common.log_file='{out}/train.log'",
        "hydra.run.dir='{out}/hydra'",
        "distributed_training.distributed_world_size=1",
        # No thread that reads ahead: the cores are for the runs, and collating is short.
        "dataset.data_buffer_size=0",
        *args.sizes[task],
        *overrides,
    ]
    removed = ["checkpoint_last.pt"] + (["checkpoint_best.pt"] if args.keep == "none" else [])
    data = args.data / task
    groups = [word[1:].split("=", 1) for word in command if word.startswith("+") and "=" in word]
    return Stage(
        f"{task} {name} seed {seed}",
        command,
        args.out / task / f"{name}-seed{seed}",
        [data],
        removed_when_done=removed,
        files=[
            CONFIG / "glue.yaml",
            *(CONFIG / group / f"{value}.yaml" for group, value in groups),
            *(data / "task.json", args.checkpoint),
        ],
    )


def with_teacher(stage: Stage, teacher: Optional[Path]) -> Stage:
    """Add the teacher, if there is one, to the stage of a run; another teacher remakes it."""
    if teacher is None:
        return stage
    return stage._replace(
        command=[*stage.command, f"criterion.distill_teacher={quoted(teacher)}"],
        files=[*stage.files, teacher],
    )


def absolute(args: argparse.Namespace) -> None:
    """Make the paths independent of the folder that a command runs in."""
    for name in ("out", "checkpoint", "dict", "glue_dir", "data"):
        path = getattr(args, name)
        setattr(args, name, None if path is None else path.absolute())


def device_environments(args: argparse.Namespace, gpus: int) -> List[Dict[str, str]]:
    """Return one environment for each run that goes on at the same time: its GPU, if any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = visible.split(",") if visible else [str(i) for i in range(gpus)]
    return [
        {"CUDA_VISIBLE_DEVICES": own[i % gpus]} if gpus else {}
        for i in range(args.jobs or max(gpus, 1))
    ]


def main() -> int:
    """Run what is missing, then write the report; return the exit code."""
    options = parser()
    words, overrides = split_words(sys.argv[1:])
    args = options.parse_args(words)
    wrong = check(args)
    if wrong is not None:
        options.exit(2, f"{options.prog}: {wrong}\n")

    import torch

    absolute(args)
    gpus = torch.cuda.device_count()
    parts = {task: parts_overrides(args, task) for task in args.tasks}
    encoding = preparation(args)
    # The runs of a seed together, so that early reports compare methods.
    runs = [
        with_teacher(
            training(
                args,
                task,
                method,
                method_overrides(method, task, args.chosen.get(task)) + parts[task] + overrides,
                seed,
                gpus,
            ),
            teacher_of(args, method, task),
        )
        for seed, task, method in itertools.product(args.seeds, args.tasks, args.methods)
    ]
    jobs = [[stage] for stage in runs]
    if args.sharpness:
        best, measured = "checkpoint_best.pt", ("--batch-size", 16, "--sam-rho-list", 0.05)
        for job in jobs:
            run, title = job[0], f"sharpness of {job[0].title}"
            job.append(sharpness_stage(title, run.out, run.inputs[0], best, *measured))
    if args.list:
        for number, stage in enumerate(runs):
            print(f"{number:4} {stage.title}")
        return 0
    if args.sharpness:
        unkept = [s for s in runs if is_done(s) and not (s.out / "checkpoint_best.pt").is_file()]
        if unkept:
            wrong = (
                f"--sharpness: {len(unkept)} existing runs kept no checkpoint, such as "
                f"{unkept[0].out}; remove their folders, to have them made again, or give another "
                "--out"
            )
            options.exit(2, f"{options.prog}: {wrong}\n")
    if args.only is not None and not 0 <= args.only < len(runs):
        wrong = f"--only {args.only}: there are runs 0 to {len(runs) - 1}"
        options.exit(2, f"{options.prog}: {wrong}\n")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs are ended with this one
    failed: Dict[str, str] = {}

    def work() -> None:
        run_all(encoding, args.cores)
        if args.only is not None:
            run_all(jobs[args.only], args.cores)
        else:
            failed.update(run_side_by_side(jobs, args.cores, device_environments(args, gpus)))

    code = exit_code(work, options.prog)
    if code or args.only is not None:
        return code
    for message in failed.values():
        print(message, file=sys.stderr)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs are done")
    report = module("examples.glue.report", args.out, "--out", args.out / "report")
    code = subprocess.call(report)
    return 1 if failed else code


if __name__ == "__main__":
    sys.exit(main())
