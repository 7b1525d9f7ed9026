"""Make the stages of GLUE runs: encode the tasks, train a method with a seed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from deltasam_fairseq.data.splits import entries_of, read_record
from deltasam_fairseq.glue.tasks import GLUE, TASKS, find_file, own_task, read_table
from deltasam_fairseq.glue.write_splits import PARTS
from examples.common.stage import Stage, module, option_words

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).resolve().parent / "config"

PYTHON = sys.executable
OPTIMIZERS = ("adam", "sam", "delta_sam")
# SAM's family, at the rho that was chosen for SAM
AT_RHO = ("m_sharpness_4", "m_sharpness_1", "rw_sam", "functional_sam", "gsam", "fisher_sam")
OF_OUTPUTS = ("functional_sam", "tram", "tram_theta")
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
METRICS = {"CoLA": "mcc", "MRPC": "acc_and_f1", "QQP": "acc_and_f1"}  # else accuracy, correlation
WARMUP = 0.06  # share of the updates, of a default recipe
PRECISIONS: Dict[str, List[str]] = {
    "fp32": [],
    "fp16": ["common.fp16=true"],
    "bf16": ["common.bf16=true"],
}


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
    if optimizer in OF_OUTPUTS and regularisers not in ([], ["distill"]):
        raise ValueError(
            f"--methods {method}: {optimizer} takes losses of one output alone, {regularisers[0]} "
            "has more; drop one"
        )
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


def device_environments(args: argparse.Namespace, gpus: int) -> List[Dict[str, str]]:
    """Return one environment for each run that goes on at the same time: its GPU, if any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = visible.split(",") if visible else [str(i) for i in range(gpus)]
    return [
        {"CUDA_VISIBLE_DEVICES": own[i % gpus]} if gpus else {}
        for i in range(args.jobs or max(gpus, 1))
    ]
