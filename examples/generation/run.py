"""Train a small transformer to write telegrams out in full, with every method, and compare BLEU.

    python -m examples.generation.run
    python -m examples.generation.run --methods adam delta_sam_adam --seeds 1 2 3 -- --dropout 0.2

Everything is made here, from text that is on every machine; nothing is downloaded.  What follows
``--`` goes to every fairseq-train as it is.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from deltasam_fairseq.markdown import markdown_table, spread
from deltasam_fairseq.options import ranged
from examples.common.fairseq_log import read_log
from examples.common.program import LOGGED, TO_FAIRSEQ, read_arguments
from examples.common.runner import LOG, exit_code, run_all
from examples.common.stage import Stage, module, read_stamp

USER_DIR = Path(__file__).resolve().parents[2] / "deltasam_fairseq"
TASK = ["--task", "translation", "--source-lang", "short", "--target-lang", "full"]


class Method(NamedTuple):
    """What a method adds to the command that all share.

    Attributes:
        flags: of fairseq-train.
        schedule: of the learning rate; ``{updates}`` and ``{warmup}`` stand for numbers of updates.
        checkpoint: the file that the test sentences are written with.
    """

    flags: Sequence[str]
    schedule: Sequence[str] = (
        *("--lr-scheduler", "polynomial_decay"),
        *("--total-num-update", "{updates}", "--warmup-updates", "{warmup}"),
    )
    checkpoint: str = "checkpoint_best.pt"


# A new method is an entry here.
ADAM = ("--adam-betas", "(0.9, 0.98)")
METHODS: Dict[str, Method] = {
    "adam": Method(["--optimizer", "adam", *ADAM]),
    "sam_adam": Method(["--optimizer", "sam_adam", *ADAM, "--sam-rho", "0.05"]),
    "delta_sam_adam": Method(["--optimizer", "delta_sam_adam", *ADAM, "--sam-rho", "0.05"]),
}

UPDATES = 1000
WARMUP = 0.2  # share of the updates
TRAINING = [
    *("--arch", "transformer_iwslt_de_en", "--share-all-embeddings"),
    *("--encoder-layers", "2", "--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "256"),
    *("--decoder-layers", "2", "--decoder-embed-dim", "64", "--decoder-ffn-embed-dim", "256"),
    *("--dropout", "0", "--max-tokens", "1024", "--clip-norm", "1", "--lr", "0.01"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--required-batch-size-multiple", "1", "--no-epoch-checkpoints"),
]


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m examples.generation.run",
        description=__doc__.splitlines()[0],
        epilog=TO_FAIRSEQ,
    )
    add, count = options.add_argument, ranged(int, at_least=1)
    add("--methods", nargs="+", default=["adam", "delta_sam_adam"], help=f"of {', '.join(METHODS)}")
    add("--seeds", nargs="+", type=int, default=[1], help="of training (default: 1)")
    add("--updates", type=count, default=UPDATES, help=f"of training (default: {UPDATES})")
    add("--text", type=Path, help="one sentence a line (default: what is on this machine)")
    add("--train-sentences", type=count, help="default: all that are found, about 28000")
    add("--held-out", type=count, default=500, help="sentences to validate on, and to test on")
    add("--vocabulary", type=count, default=1000, help="sentencepiece pieces (default: 1000)")
    add("--beam", type=count, default=5, help="of the search (default: 5)")
    add("--cores", type=count, default=2, help="threads (default: 2)")
    add("--out", type=Path, default=Path("results/generation"), help="folder of the results")
    return options


def data_stages(args: argparse.Namespace, work: Path) -> List[Stage]:
    """Return the stages that collect the text, unless it is given, and make the task of it."""
    stages, inputs, text = [], [], args.text
    if text is None:
        command = module("examples.common.toy_text", "--out", "{out}/text.txt")
        stages.append(Stage("collect English sentences", command, work / "text", seconds=20))
        inputs, text = [work / "text"], work / "text" / "text.txt"
    given = ["--valid", args.held_out, "--test", args.held_out, "--vocab-size", args.vocabulary]
    given += [] if args.train_sentences is None else ["--train", args.train_sentences]
    command = module("examples.generation.telegrams", "--text", text, *given, "--out", "{out}")
    return [*stages, Stage("make the task", command, work / "data", inputs, seconds=5)]


def run_folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Return the folder of a training; what it wrote for the test is beside it."""
    return args.out / "runs" / f"{name}-seed{seed}"


def test_folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Return the folder with the test sentences that a model wrote."""
    return args.out / "runs" / f"{name}-seed{seed}-test"


def method_stages(
    args: argparse.Namespace, extra: List[str], data: Path, name: str, seed: int
) -> List[Stage]:
    """Return the stages that train a model and let it write the test sentences."""
    method, run = METHODS[name], run_folder(args, name, seed)
    numbers = {"updates": args.updates, "warmup": int(WARMUP * args.updates)}
    train = module(
        "fairseq_cli.train",
        *(data, "--user-dir", USER_DIR, *TASK, *TRAINING),
        *("--max-update", args.updates, "--seed", seed, *method.flags),
        *(word.format(**numbers) for word in method.schedule),
        *(*LOGGED, *extra),
    )
    generate = module(
        "fairseq_cli.generate",
        *(data, "--user-dir", USER_DIR, *TASK),
        *("--path", run / method.checkpoint, "--gen-subset", "test", "--max-tokens", 4000),
        # By itself fairseq makes batches of eight, and none of fewer sentences.
        *("--required-batch-size-multiple", 1, "--num-workers", 0),
        *("--beam", args.beam, "--scoring", "sacrebleu"),
        *("--bpe", "sentencepiece", "--sentencepiece-model", data / "spm.model"),
    )
    title, out = f"{name}, seed {seed}", test_folder(args, name, seed)
    return [
        Stage(f"train {title}", train, run, [data]),
        Stage(f"generate with {title}", generate, out, [run]),
    ]


def bleu(folder: Path) -> float:
    """Return the BLEU that fairseq-generate printed in the end."""
    log = (folder / LOG).read_text(encoding="utf-8")
    return float(re.findall(r"BLEU4? = ([\d.]+)", log)[-1])


def read_outputs(folder: Path) -> Dict[int, str]:
    """Return the sentences that fairseq-generate printed, by their number in the test."""
    log = (folder / LOG).read_text(encoding="utf-8")
    return {int(i): text for i, text in re.findall(r"^D-(\d+)\t\S+\t(.*)$", log, re.M)}


def valid_loss(folder: Path) -> float:
    """Return the lowest loss on the validation sentences, in bits a token."""
    epochs = read_log(folder / "train.log").epochs
    return min(epoch["valid_loss"] for epoch in epochs if "valid_loss" in epoch)


def report(args: argparse.Namespace, data: Path) -> str:
    """Return the comparison in Markdown: a table, and what the models wrote."""
    import sacrebleu

    sources, targets = (
        (data / f"test.{side}").read_text(encoding="utf-8").splitlines()
        for side in ("short", "full")
    )
    score = sacrebleu.corpus_bleu(sources, [targets]).score
    table = [["the source as it is", f"{score:.1f}", "", ""]]
    for name in args.methods:
        runs = [run_folder(args, name, seed) for seed in args.seeds]
        scores = [bleu(test_folder(args, name, seed)) for seed in args.seeds]
        loss = statistics.mean(map(valid_loss, runs))
        seconds = statistics.mean(read_stamp(run)["seconds"] for run in runs)
        table.append([name, spread(scores), f"{loss:.2f}", f"{seconds:.0f}"])
    rows = [markdown_table(["method", "BLEU", "valid loss", "training, s"], table)]
    outputs = {name: read_outputs(test_folder(args, name, args.seeds[0])) for name in args.methods}
    for i in range(min(3, len(sources))):
        rows += ["", f"- {sources[i]}", f"  - wanted: {targets[i]}"]
        rows += [f"  - {name}: {texts.get(i, '')}" for name, texts in outputs.items()]
    return "\n".join(rows) + "\n"


def check(args: argparse.Namespace) -> Optional[str]:
    """Return an error in the arguments, with its remedy, or None."""
    args.methods, args.seeds = list(dict.fromkeys(args.methods)), list(dict.fromkeys(args.seeds))
    for name in args.methods:
        if name not in METHODS:
            return f"--methods {name}: not known; name some of {', '.join(METHODS)}"
    if args.text is not None and not args.text.is_file():
        return f"--text {args.text}: no such file; give one with a sentence a line"
    return None


def main() -> int:
    """Run what is missing, then print the table; return the exit code."""
    options = parser()
    args, extra = read_arguments(options, check)
    args.out = args.out.absolute()
    args.text = None if args.text is None else args.text.absolute()
    data = args.out / "work" / "data"
    stages = data_stages(args, args.out / "work")
    for seed in args.seeds:
        for name in args.methods:
            stages += method_stages(args, extra, data, name, seed)
    code = exit_code(lambda: run_all(stages, args.cores), options.prog)
    if code:
        return code
    text = report(args, data)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{args.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
