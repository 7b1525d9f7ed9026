"""Fine-tune on GLUE: tasks x methods x seeds, and the report that compares them.

    python -m examples.glue.run --glue-dir GLUE --checkpoint roberta.large/model.pt \\
        --backbone roberta_large --tasks CoLA RTE --methods adam sam delta_sam r3f+delta_sam \\
        --seeds 1 2 3 4 5 --out results/glue

Every run is a fairseq-hydra-train command made of ``config/``: what all share, a backbone, a
recipe (backbone and task), methods.  What follows ``--`` are overrides for all of them.  The same
command skips what is done and goes on with what was cut.  ``--list`` shows the runs, ``--only N``
makes the N-th alone, as slurm.sbatch does.

Your own task: any folder with train.tsv and dev.tsv beside GLUE's, its columns by --task-columns.
A task without a recipe takes the default one of its backbone, or of --recipe, --epochs of it.  For
experiments, --train-rows and --label-noise make the training data smaller and wrong in part.

    python -m examples.glue.run --glue-dir DATA --tasks TREC --task-columns sentence label \\
        --train-rows 1000 --label-noise 0.4 --checkpoint minilm/model.pt --backbone minilm ...
"""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from typing import Dict

from examples.common.runner import exit_code, run_all, run_side_by_side
from examples.common.stage import is_done, module, sharpness_stage, split_words
from examples.glue.options import absolute, check, parser
from examples.glue.stages import (
    device_environments,
    method_overrides,
    parts_overrides,
    preparation,
    teacher_of,
    training,
    with_teacher,
)


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
