"""Choose delta-SAM's rho and beta for each task, without a look at GLUE's validation data.

    python -m examples.glue.search --glue-dir GLUE --checkpoint roberta.large/model.pt \\
        --backbone roberta_large --tasks CoLA RTE --out results/search
    python -m examples.glue.run ... --chosen results/search/chosen.json

A share of train.tsv's rows, always the same ones, is held out to validate with (--hold-out); the
rest is trained on.  First Adam, to compare with; with --lr at every learning rate, of which all
methods get its best one.  Then SAM with every rho; then delta-SAM with every beta, at the rho that
was the best of SAM's: six runs a task (docs/choosing_rho.md).  The best is that with the highest
mean over --seeds of the task's own metric at a run's best epoch, of equal ones the first.  With
--by last the last epoch counts, and of those within a standard error of the best the largest rho
is taken, which learns the fewest wrong labels by heart, and the smallest beta.  ``chosen.json`` has
what was chosen and every score.  The same command skips what is done and goes on with what was cut;
other tasks are added to the same ``chosen.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

from deltasam_fairseq.data.files import atomic_write
from deltasam_fairseq.data.splits import entries_of
from deltasam_fairseq.markdown import markdown_table
from examples.common.runner import StageError, exit_code, run_all, run_side_by_side
from examples.common.stage import split_words
from examples.glue import options as glue_options
from examples.glue import stages as glue
from examples.glue.report.runs import read_task

RHO, BETA = "sam_rho", "delta_sam_beta"  # options of the optimizer
Chosen = Dict[str, Dict[str, float]]  # task -> option -> value
Scores = Dict[str, Dict[str, float]]  # task -> trial -> mean score


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = glue_options.common_options("examples.glue.search", __doc__.splitlines()[0])
    add = options.add_argument
    add("--lr", nargs="+", type=float, default=[], help="to try (default: the recipe's alone)")
    rhos = [0.02, 0.05, 0.1]  # docs/choosing_rho.md
    add("--rho", nargs="+", type=float, default=rhos, help="to try (default: 0.02 0.05 0.1)")
    add("--beta", nargs="+", type=float, default=[3, 10], help="to try, above 0 (default: 3 10)")
    add(
        "--by",
        choices=("best", "last"),
        default="best",
        help="epoch whose score counts: last, where training is to run to its end (default: best)",
    )
    add("--hold-out", type=float, default=0.2, help="share of train.tsv (default: 0.2)")
    options.set_defaults(seeds=[1], keep="none", data=None)
    return options


def check(args: argparse.Namespace) -> str:
    """Return an error in the arguments, with its remedy, or an empty string; set defaults."""
    if args.glue_dir is None:
        return "give --glue-dir, GLUE's TSV files: the rows to hold out are taken from train.tsv"
    wrong = check_values(args)
    if wrong:
        return wrong
    if not 0 < args.hold_out < 1:
        return f"--hold-out {args.hold_out:g}: give a share above 0 and below 1, as 0.2"
    return glue_options.check_common(args) or ""


def check_values(args: argparse.Namespace) -> str:
    """Return an error in the values to try, or an empty string; of equal ones keep the first."""
    for name in ("lr", "rho", "beta"):
        values = list(dict.fromkeys(getattr(args, name)))
        setattr(args, name, values)
        if not all(0 < value < float("inf") for value in values):
            return f"--{name} {' '.join(f'{v:g}' for v in values)}: give numbers above 0"
    return ""


def trial_name(method: str, values: Dict[str, float]) -> str:
    """Return the name of a trial's folder."""
    return "-".join([method, *(f"{option.split('_')[-1]}{v:g}" for option, v in values.items())])


def try_out(
    args: argparse.Namespace,
    method: str,
    trials: Dict[str, List[Dict[str, float]]],
    overrides: List[str],
    gpus: int,
    alike: bool = False,
) -> Tuple[Chosen, Scores]:
    """Run a method with several values of its options; return the best ones, and all scores.

    Args:
        method: adam, sam or delta_sam.
        trials: task -> the values to try, in the order of preference.
        alike: take the first that is within a standard error of the best.

    Raises:
        StageError: a run failed, or reached no score; the others were made.
    """
    stages = [
        glue.training(
            args,
            task,
            trial_name(method, values),
            # MNLI's recipe also names the mismatched part, which train.tsv has no rows of.
            [
                *glue.method_overrides(method, task, values),
                "dataset.valid_subset=valid",
                *overrides,
            ],
            seed,
            gpus,
        )
        for seed in args.seeds
        for task in args.tasks
        for values in trials[task]
    ]
    failed = run_side_by_side(
        [[s] for s in stages], args.cores, glue.device_environments(args, gpus)
    )
    if failed:
        raise StageError("\n".join(failed.values()))
    chosen: Chosen = {}
    scores: Scores = {}
    for task in args.tasks:
        names = [trial_name(method, values) for values in trials[task]]
        _, runs = read_task(args.out / task, names)
        scores[task] = {}
        for name in names:
            found = [getattr(r, args.by) for r in runs if r.method == name and r.seed in args.seeds]
            scores[task][name] = sum(found) / len(found)
            if math.isnan(scores[task][name]):
                raise StageError(f"{task} {name}: no score; see its logs in {args.out / task}")
        least = max(scores[task].values())
        if alike:
            entry = entries_of((args.data or args.out / "data") / task)["valid"]
            least -= standard_error(least, entry["rows"])
        chosen[task] = next(
            v for v, name in zip(trials[task], names) if scores[task][name] >= least
        )
    return chosen, scores


def standard_error(score: float, rows: int) -> float:
    """Return that of the share of ``rows`` that are right, percent; of other metrics about."""
    share = min(max(score / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / rows)


def record_of(args: argparse.Namespace, overrides: List[str]) -> Dict[str, Any]:
    """Return what a choice depends on besides the task."""
    return {
        "backbone": args.backbone,
        "recipe": args.recipe,
        "checkpoint": str(args.checkpoint),
        **{key: getattr(args, key) for key in ("hold_out", "seeds", "by", "epochs", "batch_size")},
        **{key: getattr(args, key) for key in ("train_rows", "label_noise", "noise_seed")},
        "overrides": overrides,
    }


def earlier(path: Path, facts: Dict[str, Any]) -> Dict[str, Any]:
    """Return what an earlier call chose for other tasks.

    Raises:
        StageError: it was made in another way, so that it cannot be in the same file.
    """
    if not path.is_file():
        return {"chosen": {}, "scores": {}}
    found: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key, value in facts.items():
        if found.get(key) != value:
            raise StageError(
                f"{path} was made with another {key}, {found.get(key)}, now {value}; give another "
                "--out, or remove it"
            )
    return found


def search(args: argparse.Namespace, overrides: List[str], gpus: int) -> None:
    """Make the runs of both steps and write ``chosen.json``."""
    path, facts = args.out / "chosen.json", record_of(args, overrides)
    before = earlier(path, facts)
    run_all(glue.preparation(args, args.hold_out), args.cores)
    rates = {task: [{glue.LR: lr} for lr in args.lr] or [{}] for task in args.tasks}
    adam, adam_scores = try_out(args, "adam", rates, overrides, gpus)
    last = args.by == "last"
    values = sorted(args.rho, reverse=True) if last else args.rho
    rhos = {task: [{**adam[task], RHO: rho} for rho in values] for task in args.tasks}
    sam, sam_scores = try_out(args, "sam", rhos, overrides, gpus, last)
    values = sorted(args.beta) if last else args.beta
    betas = {task: [{**sam[task], BETA: beta} for beta in values] for task in args.tasks}
    chosen, scores = try_out(args, "delta_sam", betas, overrides, gpus, last)
    steps = (adam_scores, sam_scores, scores)
    scores = {task: {k: v for step in steps for k, v in step[task].items()} for task in args.tasks}
    record = {
        "chosen": {**before["chosen"], **chosen},
        "scores": {**before["scores"], **scores},
        **facts,
    }
    atomic_write(path, json.dumps(record, indent=1) + "\n")
    for task, values in chosen.items():
        print(markdown_table([task, "held-out"], [[k, f"{v:g}"] for k, v in scores[task].items()]))
        print(f"{task}: " + ", ".join(f"{option} {value:g}" for option, value in values.items()))
        print(end=_warning(task, scores[task]))
    print(f"written to {path}; use it with: python -m examples.glue.run --chosen {path}")


def _warning(task: str, scores: Dict[str, float]) -> str:
    """Return what to look at where no method is above Adam."""
    best = max(scores, key=lambda name: scores[name])
    if not best.startswith("adam"):
        return ""
    return f"{task}: {best} is ahead of all on the held-out rows; try a smaller --rho, or keep it\n"


def main() -> int:
    """Choose; return the exit code."""
    options = parser()
    words, overrides = split_words(sys.argv[1:])
    args = options.parse_args(words)
    wrong = check(args)
    if wrong:
        options.exit(2, f"{options.prog}: {wrong}\n")

    import torch

    glue_options.absolute(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs are ended with this one
    gpus = torch.cuda.device_count()
    return exit_code(lambda: search(args, overrides, gpus), options.prog)


if __name__ == "__main__":
    sys.exit(main())
