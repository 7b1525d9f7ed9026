"""Fine-tune with and without sharpness-aware minimization, and compare.

Without arguments everything is made here, from text that is on every machine: a sentencepiece
model, a small pretrained RoBERTa and a task in GLUE's format, some of whose training labels are
wrong (--label-noise 0: none).  With --glue-dir and --checkpoint
the same runs on your data and your model.  What follows ``--`` goes to fairseq-train as it is.

    python -m examples.quickstart.run
    python -m examples.quickstart.run --glue-dir GLUE --task CoLA \\
        --checkpoint roberta.base/model.pt --bpe gpt2 --seeds 1 2 3 --out results/cola -- --fp16
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from pathlib import Path
from typing import List, Optional, Tuple

from deltasam_fairseq.glue.tasks import TASKS
from deltasam_fairseq.glue.write_splits import PARTS
from deltasam_fairseq.options import ranged
from examples.common.program import LOGGED, TO_FAIRSEQ, read_arguments
from examples.common.runner import exit_code, run_all
from examples.common.stage import Stage, module, sharpness_stage
from examples.quickstart.settings import (
    ACCURACY,
    ADAM,
    CRITERIONS,
    HELD_OUT,
    METRICS,
    NOISE,
    NOISY_RECIPE,
    PLAIN,
    PRETRAINING,
    RECIPES,
    SMALL_RECIPE,
    SMALL_ROBERTA,
    SWAPS,
    VOCABULARY,
    Recipe,
    criterion_options,
)

ROOT = Path(__file__).resolve().parents[2]
BUILT_IN = "ORDER"  # the task made here


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m examples.quickstart.run",
        description=__doc__.splitlines()[0],
        epilog=TO_FAIRSEQ,
    )
    add, count = options.add_argument, ranged(int, at_least=1)
    add("--glue-dir", type=Path, help="folder with a folder a task (default: a task made here)")
    add("--task", help=f"one of {', '.join(sorted(TASKS))} (default: {BUILT_IN})")
    add("--checkpoint", type=Path, help="pretrained RoBERTa (default: a small one made here)")
    add("--arch", default="roberta_base", help="of --checkpoint (default: roberta_base)")
    add("--dict", type=Path, help="of --checkpoint (default: dict.txt beside it)")
    add("--bpe", choices=("gpt2", "sentencepiece"), default="gpt2", help="of --checkpoint")
    add("--sentencepiece-model", type=Path, help="for --bpe sentencepiece")
    add("--gpt2-encoder-json", type=Path, help="for --bpe gpt2 (default: fetched by fairseq)")
    add("--gpt2-vocab-bpe", type=Path, help="for --bpe gpt2 (default: fetched by fairseq)")
    add("--optimizers", nargs="+", default=["adam", "sam_adam", "delta_sam_adam"])
    add("--criterions", nargs="+", default=[PLAIN], help=f"of {', '.join(CRITERIONS)}")
    add("--seeds", "--seed", nargs="+", type=int, default=[1], help="of fine-tuning (default: 1)")
    add("--lr", type=float, help="learning rate (default: by task, see settings.py)")
    add("--batch-size", type=count, help="sentences (default: by task)")
    add("--epochs", type=count, help="epochs of fine-tuning (default: by task)")
    add("--sam-rho", type=float, help="radius of the ascent (default: by task)")
    add("--delta-sam-beta", type=float, help="strength of the reweighting (default: by task)")
    add(
        "--label-noise",
        type=ranged(float, at_least=0, below=1),
        metavar="SHARE",
        help=f"share of the training labels to replace by wrong ones (default: {NOISE} of the "
        "task made here, 0 of --glue-dir)",
    )
    add("--any-rows", action="store_true", help="of --glue-dir: other rows than GLUE's own files")
    add("--cores", type=count, default=min(2, os.cpu_count() or 1), help="threads (default: 2)")
    add("--out", type=Path, default=Path("results/quickstart"), help="folder of the results")
    return options


def check(args: argparse.Namespace) -> Optional[str]:
    """Return an error in the arguments, with its remedy, or None; set defaults."""
    args.task = args.task or (BUILT_IN if args.glue_dir is None else None)
    if args.task is None:
        return f"--task is missing: name one of {', '.join(sorted(TASKS))}"
    if args.task not in TASKS:
        return f"--task {args.task}: not known; name one of {', '.join(sorted(TASKS))}"
    if args.task != BUILT_IN and args.glue_dir is None:
        return f"--task {args.task}: needs the data; give --glue-dir, the folder with {args.task}/"
    if args.label_noise is None:
        args.label_noise = NOISE if args.glue_dir is None else 0.0
    if args.label_noise and not TASKS[args.task].labels:
        return f"--label-noise {args.label_noise:g}: {args.task} has scores, not classes; give 0"
    if args.glue_dir is not None:
        for name in TASKS[args.task].splits().values():
            path = args.glue_dir / args.task / f"{name}.tsv"
            if not path.is_file():
                return f"--glue-dir {args.glue_dir}: {path} is missing; give GLUE's folder"
    if args.checkpoint is not None:
        args.dict = args.dict or args.checkpoint.parent / "dict.txt"
        if not args.checkpoint.is_file():
            return f"--checkpoint {args.checkpoint}: no such file; give fairseq's model.pt"
        if not args.dict.is_file():
            return f"--dict {args.dict}: no such file; give the dict.txt of the checkpoint"
        if args.bpe == "sentencepiece" and args.sentencepiece_model is None:
            return "--bpe sentencepiece: give its model with --sentencepiece-model"
    for name in ("sentencepiece_model", "gpt2_encoder_json", "gpt2_vocab_bpe"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            return f"--{name.replace('_', '-')} {path}: no such file"
    known = ("adam", "sam_", "delta_sam_")
    for optimizer in args.optimizers:
        if not optimizer.startswith(known):
            return f"--optimizers {optimizer}: not known; for example adam sam_adam delta_sam_adam"
    for criterion in args.criterions:
        if criterion not in CRITERIONS:
            return f"--criterions {criterion}: not known; name some of {', '.join(CRITERIONS)}"
    return None


def text_stages(work: Path) -> List[Stage]:
    """Return the stages that make the text, the vocabulary and the small pretrained RoBERTa."""
    lm, text, skip = work / "lm", work / "text", sum(HELD_OUT.values())
    words = ["--text", text / "text.txt", "--skip", skip, "--vocab-size", VOCABULARY]
    collect = module("examples.common.toy_text", "--out", "{out}/text.txt")
    vocabulary = module("examples.common.pretraining_data", *words, "--out", "{out}")
    pretrain = module("fairseq_cli.train", lm, *PRETRAINING, "--seed", 1, *LOGGED)
    return [
        Stage("collect English sentences", collect, text, seconds=20),
        Stage("train the vocabulary", vocabulary, lm, [text], seconds=8),
        Stage("pretrain a small RoBERTa", pretrain, work / "roberta", [lm], seconds=110),
    ]


def data_stages(args: argparse.Namespace, work: Path) -> Tuple[List[Stage], Path]:
    """Return the stages that make the task's data, and the folder with it."""
    stages = []
    glue, inputs = args.glue_dir, []
    if glue is None:
        glue, text = work / "glue", work / "text"
        sizes = [word for split, size in HELD_OUT.items() for word in (f"--{split}", size)]
        words = ["--text", text / "text.txt", "--swaps", SWAPS, *sizes]
        words += ["--out", f"{{out}}/{BUILT_IN}"]
        make = module("examples.quickstart.word_order_task", *words)
        stages.append(Stage("make the task", make, glue, [text]))
        inputs.append(glue)
    options: List[object] = ["--bpe", args.bpe]
    for name in ("sentencepiece_model", "gpt2_encoder_json", "gpt2_vocab_bpe"):
        if getattr(args, name) is not None:
            options += [f"--{name.replace('_', '-')}", getattr(args, name)]
    dictionary = args.dict
    if args.checkpoint is None:
        lm = work / "lm"
        dictionary = lm / "dict.txt"
        options = ["--bpe", "sentencepiece", "--sentencepiece-model", lm / "spm.model"]
        inputs.append(lm)
    options += ["--any-rows"] if args.any_rows else []
    options += ["--label-noise", f"{args.label_noise:g}"] if args.label_noise else []
    data = work / "data" / args.task
    command = module(
        "deltasam_fairseq.glue.prepare",
        *("--glue-dir", glue, "--task", args.task, "--dict", dictionary, *options),
        *("--out", "{out}"),
    )
    stages.append(Stage(f"encode {args.task}", command, data, inputs, seconds=5))
    return stages, data


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the task's hyperparameters with what the command line says put in."""
    recipe = RECIPES.get(args.task, RECIPES["SST-2"])
    if args.checkpoint is None:
        recipe = NOISY_RECIPE if args.label_noise else SMALL_RECIPE
    given = {
        "lr": args.lr,
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "rho": args.sam_rho,
        "beta": args.delta_sam_beta,
    }
    return recipe._replace(**{key: value for key, value in given.items() if value is not None})


def number_of_sentences(args: argparse.Namespace) -> int:
    """Return the number of training sentences, which the learning rate schedule needs."""
    if args.glue_dir is None:
        return HELD_OUT["train"]
    with (args.glue_dir / args.task / "train.tsv").open("rb") as file:
        return sum(1 for _ in file) - int(TASKS[args.task].header)


def fine_tuning_stages(
    args: argparse.Namespace, extra: List[str], work: Path, data: Path
) -> List[Stage]:
    """Return a training and a measuring stage for every criterion, optimizer and seed."""
    recipe, task = recipe_of(args), TASKS[args.task]
    metric = METRICS.get(args.task, ACCURACY)
    updates = recipe.epochs * -(-number_of_sentences(args) // recipe.batch_size)
    if args.checkpoint is None:
        checkpoint, model = work / "roberta" / "checkpoint_last.pt", SMALL_ROBERTA
        inputs = [data, work / "roberta"]
        seconds = {"adam": 5, "sam_adam": 8, "delta_sam_adam": 10}  # an epoch
        seconds = {name: recipe.epochs * each for name, each in seconds.items()}
    else:
        checkpoint, model = args.checkpoint, ["--arch", args.arch, "--max-positions", "512"]
        inputs, seconds = [data], {}
    splits = [split for split in task.splits() if split != "train"]
    subsets = ",".join([*splits, *(PARTS if args.label_noise else ())])
    stages = []
    for seed in args.seeds:
        for criterion, optimizer in itertools.product(args.criterions, args.optimizers):
            method = optimizer if criterion == PLAIN else f"{criterion}+{optimizer}"
            out = args.out / "runs" / args.task / f"{method}-seed{seed}"
            sam = ["--sam-rho", recipe.rho] if "sam_" in optimizer else []
            if optimizer.startswith("delta_sam_"):
                sam += ["--delta-sam-beta", recipe.beta]
            command = module(
                "fairseq_cli.train",
                *(data, "--user-dir", ROOT / "deltasam_fairseq"),
                *("--task", "sentence_prediction", "--criterion", criterion),
                *criterion_options(criterion, args.task),
                *("--num-classes", len(task.labels) or 1, "--init-token", 0),
                *(("--separator-token", 2) if len(task.sentences) > 1 else ()),
                *("--shorten-method", "truncate", *model, "--finetune-from-model", checkpoint),
                *("--dropout", recipe.dropout, "--attention-dropout", recipe.dropout),
                *("--optimizer", optimizer, *sam, *(ADAM if optimizer.endswith("adam") else [])),
                *("--weight-decay", recipe.weight_decay, "--lr", recipe.lr),
                *("--lr-scheduler", "polynomial_decay", "--total-num-update", updates),
                *("--warmup-updates", int(recipe.warmup * updates)),
                *("--batch-size", recipe.batch_size, "--required-batch-size-multiple", 1),
                *("--max-epoch", recipe.epochs, "--max-update", updates, "--seed", seed),
                *("--valid-subset", subsets),
                *(*metric.flags, "--best-checkpoint-metric", metric.name),
                *("--maximize-best-checkpoint-metric", "--no-epoch-checkpoints", *extra, *LOGGED),
            )
            name = f"{method}, seed {seed}"
            stages.append(
                Stage(f"fine-tune {name}", command, out, inputs, seconds.get(optimizer, 0))
            )
            if "--no-save" not in extra:
                measured = ["--batch-size", recipe.batch_size, "--sam-rho-list", recipe.rho]
                measured += ["--delta-sam-beta", recipe.beta]
                title = f"sharpness of {name}"
                stage = sharpness_stage(title, out, data, "checkpoint_last.pt", *measured)
                stages.append(stage._replace(seconds=6))
    return stages


def main() -> int:
    """Run what is missing, then print the table; return the exit code."""
    options = parser()
    args, extra = read_arguments(options, check)
    args.out = args.out.absolute()
    work = args.out / "work"
    stages = text_stages(work) if args.checkpoint is None else []
    if args.glue_dir is None and args.checkpoint is not None:
        stages = text_stages(work)[:1]
    prepared, data = data_stages(args, work)
    runs = fine_tuning_stages(args, extra, work, data)
    report = args.out / args.task
    metric = METRICS.get(args.task, ACCURACY).name
    folders = [str(stage.out) for stage in runs if not stage.out.name.endswith("-sharpness")]
    begin = time.monotonic()
    expected = sum(stage.seconds for stage in (*stages, *prepared, *runs))
    print(f"results: {args.out}" + (f" (about {expected} s)" if args.checkpoint is None else ""))
    command = module("examples.common.report", *folders, "--metric", metric, "--out", "{out}")
    table = Stage("report", command, report, [stage.out for stage in runs], seconds=3)
    code = exit_code(lambda: run_all([*stages, *prepared, *runs, table], args.cores), options.prog)
    if code:
        return code
    print(f"\n{(report / 'report.md').read_text(encoding='utf-8')}")
    print(f"{report}: report.md, report.csv, curves.png ({time.monotonic() - begin:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
