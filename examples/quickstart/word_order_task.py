"""Make a sentence classification task out of plain sentences: are the words in order?

Half of the sentences stay as they were written (label 1); in the other half a few neighbouring
words swap (label 0).  The files are in the layout of GLUE's SST-2.

    python -m examples.quickstart.word_order_task --text text.txt \\
        --train 4000 --dev 1000 --out glue/ORDER
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import List, Sequence, Set


def disturb(sentence: str, swaps: int, rng: random.Random) -> str:
    """Exchange ``swaps`` pairs of unequal neighbours; the first word and the full stop stay."""
    words = sentence[:-1].split()
    positions = [i for i in range(1, len(words) - 1) if words[i].lower() != words[i + 1].lower()]
    rng.shuffle(positions)
    taken: Set[int] = set()
    for i in positions:
        if swaps and not {i, i + 1} & taken:
            words[i], words[i + 1] = words[i + 1], words[i]
            taken |= {i, i + 1}
            swaps -= 1
    return " ".join(words) + sentence[-1]


def rows(sentences: Sequence[str], swaps: int, rng: random.Random) -> List[str]:
    """Return one ``sentence<tab>label`` a sentence; every second one is disturbed."""
    labelled = [
        (disturb(sentence, swaps, rng), 0) if i % 2 else (sentence, 1)
        for i, sentence in enumerate(sentences)
    ]
    rng.shuffle(labelled)
    return [f"{sentence}\t{label}" for sentence, label in labelled]


def main() -> None:
    """Write ``train.tsv`` and ``dev.tsv`` from the first sentences of the text."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart.word_order_task", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--text", type=Path, required=True, help="one sentence a line")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=4000, help="sentences to train on")
    parser.add_argument("--dev", type=int, default=1000, help="sentences to validate on")
    parser.add_argument("--swaps", type=int, default=3, help="pairs exchanged in a sentence")
    parser.add_argument("--seed", type=int, default=1, help="seed of the disturbance")
    args = parser.parse_args()

    sentences = args.text.read_text(encoding="utf-8").splitlines()
    rng = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    end = args.dev + args.train
    for name, part in (("dev", sentences[: args.dev]), ("train", sentences[args.dev : end])):
        table = ["sentence\tlabel", *rows(part, args.swaps, rng)]
        (args.out / f"{name}.tsv").write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
