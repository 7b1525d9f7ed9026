"""Turn plain sentences into the folder that the task sentence_embedding reads.

    python -m deltasam_fairseq.sts.prepare --train sentences.txt --valid STSBenchmark/sts-dev.csv \\
        --out sts-bin --dict roberta.base/dict.txt --bpe gpt2

--train is a file of one sentence a line, or a file of STS-B's layout (.csv), of which both
sentences of every pair are taken.  --valid is STS-B's dev file, or any file of lines ``score,
sentence, sentence`` with tabs between.  Text stays text, as the views of a sentence differ from
epoch to epoch; ``sts-bin/`` holds it with the dict.txt and the BPE's files.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from deltasam_fairseq.data.binarize import numbers, unknown_share
from deltasam_fairseq.data.encoding_options import BPE_FILES, add_encoding_options, encoding_of
from deltasam_fairseq.data.files import DataError, atomic_write
from deltasam_fairseq.data.programs import run_program
from deltasam_fairseq.data.splits import RECORD, entries_of
from deltasam_fairseq.options import ranged
from deltasam_fairseq.sts.datasets import read_sts_b, require_two_scores
from deltasam_fairseq.sts.folder import TASK, Pair, lines_of, score_of


def read_train(args: argparse.Namespace) -> List[str]:
    """Return the sentences to train on: none empty, as many as are asked for."""
    if args.train.suffix == ".csv":
        pairs = read_sts_b(args.train, "train", args.any_rows, "--train")
        sentences = [text for _, *both in pairs for text in both]
    else:
        sentences = [line.strip() for line in lines_of(args.train, "--train")]
    full = [sentence for sentence in sentences if sentence]
    if len(full) < len(sentences):
        print(f"train: {len(sentences) - len(full)} empty lines are skipped")
    once = list(dict.fromkeys(full))
    if len(once) < len(full):
        what = "are dropped" if args.drop_duplicates else "stay; --drop-duplicates drops them"
        print(f"train: {len(full) - len(once)} sentences that repeat an earlier one {what}")
    found = once if args.drop_duplicates else full
    wanted = args.sentences or len(found)
    if len(once) < 2 or len(found) < wanted:
        raise DataError(
            f"--train {args.train}: {len(found)} sentences, "
            + (
                "contrastive learning needs two different ones; give a file with one a line"
                if len(once) < 2
                else f"--sentences is {wanted}; give at most {len(found)}"
            )
        )
    return found if wanted == len(found) else random.Random(args.seed).sample(found, wanted)


def read_valid(args: argparse.Namespace) -> List[Pair]:
    """Return the scored pairs to validate with."""
    lines = lines_of(args.valid, "--valid")
    if not lines:
        raise DataError(f"--valid {args.valid}: is empty")
    if lines[0].count("\t") >= 6:
        return read_sts_b(args.valid, "dev", args.any_rows, "--valid")
    pairs = []
    for number, line in enumerate(lines, start=1):
        place, fields = f"--valid {args.valid}, line {number}", line.split("\t")
        if len(fields) != 3 or not all(field.strip() for field in fields):
            raise DataError(f"{place}: not score, sentence, sentence with tabs between")
        pairs.append((score_of(fields[0], place), fields[1].strip(), fields[2].strip()))
    require_two_scores(pairs, f"--valid {args.valid}")
    return pairs


def prepare(args: argparse.Namespace) -> None:
    """Read and check all that is asked for, then write it."""
    if args.train is None and args.valid is None:
        raise DataError("give --train or --valid")
    if args.out.exists() and not args.out.is_dir():
        raise DataError(f"--out {args.out}: is a file; give a folder")
    encoding, bpe = encoding_of(args)
    files: Dict[str, str] = {}
    entries: Dict[str, Any] = dict(entries_of(args.out))
    texts: Dict[str, List[str]] = {}
    if args.train is not None:
        sentences = texts[f"--train {args.train}"] = read_train(args)
        files["train.txt"] = "".join(f"{sentence}\n" for sentence in sentences)
        entries["train"] = {"file": args.train.name, "sentences": len(sentences)}
    if args.valid is not None:
        pairs = read_valid(args)
        texts[f"--valid {args.valid}"] = [text for _, *both in pairs for text in both]
        files["valid.tsv"] = "".join(f"{score}\t{a}\t{b}\n" for score, a, b in pairs)
        entries["valid"] = {"file": args.valid.name, "pairs": len(pairs)}
    for source, found in texts.items():
        unknown_share(source, encoding, [row[:-1] for row in numbers(encoding, found[:1000])])
    for name in BPE_FILES[args.bpe]:
        path = Path(bpe["options"][name])
        bpe["options"][name] = path.name
        atomic_write(args.out / path.name, path.read_bytes())
    atomic_write(args.out / "dict.txt", Path(encoding.dictionary).read_bytes())
    for file, text in files.items():
        atomic_write(args.out / file, text)
    record = {"version": 1, "task": TASK, "bpe": bpe, "splits": entries}
    atomic_write(args.out / RECORD, json.dumps(record, indent=1) + "\n")
    if args.train is not None:
        print(f"train: {len(sentences)} sentences -> {args.out}")
    if args.valid is not None:
        print(f"valid: {len(pairs)} pairs -> {args.out}")


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m deltasam_fairseq.sts.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--train", type=Path, help="sentences to train on, one a line; X.csv: of STS-B's layout")
    add("--valid", type=Path, help="scored pairs to validate with: STS-B's sts-dev.csv")
    add("--out", type=Path, required=True, help="folder to write")
    add("--sentences", type=ranged(int, at_least=2), help="draw so many of --train (default: all)")
    add("--seed", type=int, default=1, help="of the draw (default: 1)")
    add("--drop-duplicates", action="store_true", help="keep each sentence of --train once")
    add_encoding_options(options, workers=False)
    add("--any-rows", action="store_true", help="take files of STS-B's layout with other rows")
    return options


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Do what the command line says; return the exit code."""
    return run_program(parser(), prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
