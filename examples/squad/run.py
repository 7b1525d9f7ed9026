"""Fine-tune on questions and answers in SQuAD's format, with and without delta-SAM, and compare.

Without arguments everything is made here: the questions, a vocabulary, and a small RoBERTa that
starts from nothing.  With --train, --valid and --checkpoint the same runs on SQuAD and a model of
yours.  What follows ``--`` goes to fairseq-train as it is.

    python -m examples.squad.run
    python -m examples.squad.run --train train-v1.1.json --valid dev-v1.1.json \\
        --checkpoint roberta.base/model.pt --seeds 1 2 3 --out results/squad1 -- --fp16
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple

from deltasam_fairseq.options import ranged
from examples.common.program import LOGGED, read_arguments
from examples.common.runner import exit_code, run_all
from examples.common.stage import Stage, module, option_words, sharpness_stage

ROOT = Path(__file__).resolve().parents[2]


class Recipe(NamedTuple):
    """Hyperparameters of fine-tuning; the command line replaces them behind ``--``."""

    lr: float
    batch_size: int
    updates: int
    warmup: float  # share of all updates
    model: Tuple[str, ...] = ()
    prepare: Tuple[str, ...] = ()


# Of RoBERTa's paper (Liu et al. 2019) for SQuAD 1.1: two epochs, with windows as by default.
SQUAD = Recipe(1.5e-5, 48, 3680, 0.06)
# The built-in case: 120 thousand weights, no dropout, as it has all to learn in a minute.
SMALL = Recipe(
    *(2e-3, 32, 500, 0.2),
    model=(
        *("--max-positions", "64", "--encoder-layers", "2", "--encoder-embed-dim", "64"),
        *("--encoder-ffn-embed-dim", "256", "--encoder-attention-heads", "4"),
        *("--dropout", "0", "--attention-dropout", "0"),
    ),
    prepare=("--max-seq-length", "64", "--doc-stride", "16", "--max-query-length", "16"),
)
QUESTIONS = ("--train", "4000", "--dev", "500")
VOCABULARY = 400  # pieces


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m examples.squad.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, count = options.add_argument, ranged(int, at_least=1)
    add("--train", type=Path, help="SQuAD's train file (default: questions made here)")
    add("--valid", type=Path, help="SQuAD's dev file")
    add("--checkpoint", type=Path, help="pretrained RoBERTa or BERT of fairseq")
    add("--arch", default="roberta_base", help="of --checkpoint (default: roberta_base)")
    add("--dict", type=Path, help="of --checkpoint (default: dict.txt beside it)")
    add("--bpe", choices=("gpt2", "sentencepiece", "wordpiece"), default="gpt2", help="its BPE")
    add("--bpe-options", nargs="*", default=[], metavar="OPTION[=VALUE]", help="of squad.prepare")
    add("--optimizers", nargs="+", default=["adam", "delta_sam_adam"])
    add("--seeds", nargs="+", type=int, default=[1], help="of fine-tuning (default: 1)")
    add("--sam-rho", type=float, default=0.05, help="radius of the ascent (default: 0.05)")
    add("--delta-sam-beta", type=float, default=3.0, help="of the reweighting (default: 3)")
    add("--cores", type=count, default=2, help="threads (default: 2)")
    add("--out", type=Path, default=Path("results/squad"), help="folder of the results")
    return options


def check(args: argparse.Namespace) -> Optional[str]:
    """Return an error in the arguments, with its remedy, or None; set defaults."""
    given = {name: getattr(args, name) for name in ("train", "valid", "checkpoint")}
    missing = [f"--{name}" for name, path in given.items() if path is None]
    if 0 < len(missing) < 3:
        return f"{', '.join(missing)} missing: your data needs all three, the built-in case none"
    if not missing:
        args.dict = args.dict or args.checkpoint.parent / "dict.txt"
        for name, path in {**given, "dict": args.dict}.items():
            if not path.is_file():
                return f"--{name} {path}: no such file"
    return None


def data_stages(args: argparse.Namespace, work: Path) -> List[Stage]:
    """Return the stages that make the data; the last one's folder is what is trained on."""
    stages: List[Stage] = []
    if args.train is not None:
        files = ["--train", args.train.absolute(), "--valid", args.valid.absolute()]
        files += ["--dict", args.dict.absolute(), "--bpe", args.bpe]
        files += [word for option in args.bpe_options for word in option_words(option)]
    else:
        qa, lm = work / "qa", work / "vocabulary"
        make = module("examples.squad.make_data", *QUESTIONS, "--out", "{out}")
        words = ["--text", qa / "text.txt", "--vocab-size", VOCABULARY, "--model-type", "bpe"]
        vocabulary = module("examples.common.pretraining_data", *words, "--out", "{out}")
        stages = [
            Stage("make questions", make, qa),
            Stage("train the vocabulary", vocabulary, lm, [qa], seconds=6),
        ]
        files = ["--train", qa / "train.json", "--valid", qa / "dev.json", "--bpe", "sentencepiece"]
        files += ["--dict", lm / "dict.txt", "--sentencepiece-model", lm / "spm.model"]
        files += SMALL.prepare
    command = module("deltasam_fairseq.squad.prepare", *files, "--out", "{out}")
    inputs = [stage.out for stage in stages]
    return [*stages, Stage("prepare the windows", command, work / "data", inputs, seconds=6)]


def training(args: argparse.Namespace, data: Path, optimizer: str, seed: int) -> List[str]:
    """Return the fairseq-train command of a run."""
    recipe = SMALL if args.checkpoint is None else SQUAD
    start = [] if args.checkpoint is None else ["--finetune-from-model", args.checkpoint.absolute()]
    sam = ["--sam-rho", args.sam_rho] if "sam_" in optimizer else []
    sam += ["--delta-sam-beta", args.delta_sam_beta] if "delta_sam_" in optimizer else []
    return module(
        "fairseq_cli.train",
        *(data, "--user-dir", ROOT / "deltasam_fairseq"),
        *("--task", "span_prediction", "--criterion", "span_prediction"),
        *("--arch", args.arch, *recipe.model, *start),
        *("--optimizer", optimizer, "--adam-betas", "(0.9, 0.98)", "--adam-eps", "1e-06", *sam),
        *("--weight-decay", "0.01", "--clip-norm", "1", "--lr", recipe.lr, "--seed", seed),
        *("--lr-scheduler", "polynomial_decay", "--total-num-update", recipe.updates),
        *("--warmup-updates", round(recipe.warmup * recipe.updates)),
        *("--batch-size", recipe.batch_size, "--max-update", recipe.updates),
        *("--best-checkpoint-metric", "f1", "--maximize-best-checkpoint-metric"),
        *("--no-epoch-checkpoints", "--find-unused-parameters", *LOGGED),
    )


def run_stages(args: argparse.Namespace, extra: List[str], data: Path) -> List[Stage]:
    """Return the stages of all runs: fine-tune, measure the sharpness, answer the questions."""
    stages = []
    for optimizer, seed in itertools.product(args.optimizers, args.seeds):
        name = f"{optimizer}-seed{seed}"
        out = args.out / "runs" / name
        command = [*training(args, data, optimizer, seed), *extra]
        stages.append(Stage(f"fine-tune with {name}", command, out, [data]))
        measured = ["--batch-size", 32, "--sam-rho-list", args.sam_rho]
        measured += ["--delta-sam-beta", args.delta_sam_beta]
        stages.append(
            sharpness_stage(f"sharpness of {name}", out, data, "checkpoint_last.pt", *measured)
        )
        answers = args.out / "answers" / name
        words = ["--data", data, "--path", out / "checkpoint_best.pt", "--out", "{out}"]
        predict = module("deltasam_fairseq.squad.predict", *words)
        stages.append(Stage(f"answers of {name}", predict, answers, [out]))
    return stages


def main() -> int:
    """Run what is missing, then print the table; return the exit code."""
    options = parser()
    args, extra = read_arguments(options, check)
    args.out = args.out.absolute()
    data = data_stages(args, args.out / "work")
    runs = run_stages(args, extra, data[-1].out)
    folders = [stage.out for stage in runs if stage.title.startswith("fine-tune")]
    inputs = [stage.out for stage in runs]
    words = [*map(str, folders), "--metric", "f1", "--out", "{out}"]
    table = Stage("report", module("examples.common.report", *words), args.out / "report", inputs)
    code = exit_code(lambda: run_all([*data, *runs, table], args.cores), options.prog)
    if not code:
        print(f"\n{(table.out / 'report.md').read_text(encoding='utf-8')}\n{table.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
