"""Train sentence embeddings plain, with R3F, with delta-SAM and with both, and compare on STS.

A checkpoint of BERT or RoBERTa and plain sentences in, Table 2 of the delta-SAM paper out.  What
follows ``--`` goes to fairseq-train as it is.

    python -m examples.sts.run --sts STS --train sentences.txt --checkpoint roberta.base/model.pt
    python -m examples.sts.run --sts STS --checkpoint bert/model.pt --arch bert \\
        --bpe wordpiece --bpe-options wordpiece-vocab=bert/vocab.txt --out results/bert -- --fp16
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple

from deltasam_fairseq.data.files import DataError
from deltasam_fairseq.options import ranged
from deltasam_fairseq.sts.datasets import SETS, available, read_set
from deltasam_fairseq.sts.embeddings import POOLINGS
from examples.common.program import LOGGED, TO_FAIRSEQ, read_arguments
from examples.common.runner import exit_code, run_all
from examples.common.stage import Stage, module, option_words
from examples.sts.report import ROWS

ROOT = Path(__file__).resolve().parents[2]


class Recipe(NamedTuple):
    """What the delta-SAM paper and Mirror-BERT's code have for a backbone."""

    pooling: str
    rho: float
    beta: float
    eps: float  # of R3F's noise


RECIPES = {
    "bert": Recipe("mean_padded", 0.05, 3, 5e-2),
    "roberta": Recipe("cls", 0.01, 5, 1e-3),
}
# Mirror-BERT's: 50 updates of 200 sentences.
TRAINING: Tuple[object, ...] = (
    *("--max-length", 50, "--span-mask", 5, "--temperature", 0.04),
    *("--dropout", 0.1, "--attention-dropout", 0.1),
    *("--adam-betas", "(0.9, 0.999)", "--adam-eps", "1e-08", "--weight-decay", 0.01),
    *("--lr", 2e-5, "--lr-scheduler", "fixed", "--max-epoch", 1, "--find-unused-parameters"),
    *("--best-checkpoint-metric", "spearman", "--maximize-best-checkpoint-metric"),
    *("--no-epoch-checkpoints", "--no-last-checkpoints", "--no-save-optimizer-state"),
)


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m examples.sts.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=TO_FAIRSEQ,
    )
    add, count = options.add_argument, ranged(int, at_least=1)
    add("--sts", type=Path, required=True, help="folder with STSBenchmark, SICK, STS12-en-test ...")
    add("--train", type=Path, help="sentences, one a line (default: those of STS-B's train side)")
    add("--sentences", type=count, default=10000, help="drawn from --train (default: 10000)")
    add("--drop-duplicates", action="store_true", help="keep each sentence of --train once")
    add("--checkpoint", type=Path, required=True, help="pretrained BERT or RoBERTa of fairseq")
    add("--arch", default="roberta_base", help="of --checkpoint (default: roberta_base)")
    add("--dict", type=Path, help="of --checkpoint (default: dict.txt beside it)")
    add("--bpe", choices=("gpt2", "sentencepiece", "wordpiece"), default="gpt2", help="its BPE")
    add("--bpe-options", nargs="*", default=[], metavar="OPTION[=VALUE]", help="of sts.prepare")
    add("--recipe", choices=RECIPES, help="(default: bert for --bpe wordpiece, else roberta)")
    add("--pooling", choices=POOLINGS, help="(default: by --recipe)")
    add("--sam-rho", type=float, help="radius of the ascent (default: by --recipe)")
    add("--delta-sam-beta", type=float, help="of the reweighting (default: by --recipe)")
    add("--eps", type=float, help="size of R3F's noise (default: by --recipe)")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help=f"of {', '.join(ROWS)}")
    add("--sets", nargs="+", choices=SETS, metavar="SET", help="to measure (default: all of --sts)")
    add("--any-rows", action="store_true", help="of --sts: other rows than published")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="(default: 1 to 5)")
    add("--batch-size", type=count, default=200, help="sentences of an update (default: 200)")
    add("--cores", type=count, default=2, help="threads (default: 2)")
    add("--out", type=Path, default=Path("results/sts"), help="folder of the results")
    return options


def check(args: argparse.Namespace) -> Optional[str]:
    """Return an error in the arguments, with its remedy, or None; set defaults."""
    sts_b = args.sts / "STSBenchmark"
    if not sts_b.is_dir():
        return f"--sts {args.sts}: has no folder STSBenchmark; give the folder of the STS sets"
    args.train = args.train or sts_b / "sts-train.csv"
    args.dict = args.dict or args.checkpoint.parent / "dict.txt"
    needed = {"train": args.train, "checkpoint": args.checkpoint, "dict": args.dict}
    for name, path in {**needed, "sts": sts_b / "sts-dev.csv"}.items():
        if not path.is_file():
            return f"--{name} {path}: no such file"
    try:
        for name in args.sets or available(args.sts):
            read_set(args.sts, name, args.any_rows)
    except DataError as error:
        return str(error)
    if args.batch_size > args.sentences:
        return f"--batch-size {args.batch_size}: more than --sentences {args.sentences}"
    args.recipe = args.recipe or ("bert" if args.bpe == "wordpiece" else "roberta")
    pooling, rho, beta, eps = RECIPES[args.recipe]
    defaults = {"pooling": pooling, "sam_rho": rho, "delta_sam_beta": beta, "eps": eps}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return None


def data_stage(args: argparse.Namespace) -> Stage:
    """Return the stage that prepares the sentences and the validation pairs."""
    words: List[object] = ["--train", args.train.absolute(), "--sentences", args.sentences]
    words += ["--valid", (args.sts / "STSBenchmark" / "sts-dev.csv").absolute()]
    words += ["--dict", args.dict.absolute(), "--bpe", args.bpe]
    words += [word for option in args.bpe_options for word in option_words(option)]
    words += ["--drop-duplicates"] if args.drop_duplicates else []
    words += ["--any-rows"] if args.any_rows else []
    command = module("deltasam_fairseq.sts.prepare", *words, "--out", "{out}")
    return Stage("prepare the sentences", command, args.out / "data", seconds=6)


def training(args: argparse.Namespace, data: Path, row: str, seed: int) -> List[str]:
    """Return the fairseq-train command of a run."""
    r3f = ["--criterion", "nt_xent"]
    if "r3f" in row:
        r3f = ["--criterion", "nt_xent_r3f", "--eps", args.eps]
    sam = ["--optimizer", "adam"]
    if "delta_sam" in row:
        sam = ["--optimizer", "delta_sam_adam", "--sam-rho", args.sam_rho]
        sam += ["--delta-sam-beta", args.delta_sam_beta]
    return module(
        "fairseq_cli.train",
        *(data, "--user-dir", ROOT / "deltasam_fairseq", "--task", "sentence_embedding"),
        *("--arch", args.arch, "--finetune-from-model", args.checkpoint.absolute()),
        *("--pooling", args.pooling, "--batch-size", args.batch_size, "--seed", seed),
        *(*r3f, *sam, *TRAINING, *LOGGED),
    )


def run_stages(args: argparse.Namespace, extra: List[str], data: Path) -> List[Stage]:
    """Return the stages of all runs, seed by seed: train, then measure."""
    stages = []
    for seed, row in itertools.product(args.seeds, args.rows):
        out, name = args.out / "runs" / f"{row}-seed{seed}", f"{row}, seed {seed}"
        command = [*training(args, data, row, seed), *extra]
        stages.append(Stage(f"train {name}", command, out, [data]))
        words = ["--sts", args.sts.absolute(), "--data", data]
        words += ["--path", out / "checkpoint_best.pt", "--json", "{out}/sts.json"]
        words += ["--sets", *args.sets] if args.sets else []
        words += ["--any-rows"] if args.any_rows else []
        measure = module("deltasam_fairseq.sts", *words)
        scores = args.out / "scores" / out.name
        stages.append(Stage(f"measure {name}", measure, scores, [out, data]))
    return stages


def main() -> int:
    """Run what is missing, then print the table; return the exit code."""
    options = parser()
    args, extra = read_arguments(options, check)
    args.out = args.out.absolute()
    data = data_stage(args)
    runs = run_stages(args, extra, data.out)
    words = [args.out, "--recipe", args.recipe, "--out", "{out}"]
    inputs = [stage.out for stage in runs]
    table = Stage("report", module("examples.sts.report", *words), args.out / "report", inputs)
    code = exit_code(lambda: run_all([data, *runs, table], args.cores), options.prog)
    if not code:
        print(f"\n{(table.out / 'report.md').read_text(encoding='utf-8')}\n{table.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
