"""Make a generation task out of plain sentences: write a telegram out in full.

The source is a sentence in the words that a telegram would keep, lower-cased, without small words
and full stop; the target is the sentence.  Both are written as a fairseq dataset with one
sentencepiece vocabulary.

    python -m examples.generation.telegrams --text text.txt --valid 500 --test 500 --out data

``data/`` then holds ``spm.model``, the dictionaries, ``{train,valid,test}.short-full.*``, and the
splits as text, ``train.short``, ``train.full`` and so on.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import List

from deltasam_fairseq.data.binarize import Dictionary, bpe_encoder, write_dataset
from deltasam_fairseq.options import ranged
from examples.common.pretraining_data import train_vocabulary

SOURCE, TARGET = "short", "full"
SMALL_WORDS = frozenset(
    "a an the this that these those it its is are was were be been being am do does did has have "
    "had will would can could should may might must of to in on at by for from with as into than "
    "and or but if there which who".split()
)


def telegram(sentence: str) -> str:
    """Return the sentence without small words, full stop and capitals; never nothing."""
    words = sentence.lower().rstrip(".!?").split()
    return " ".join([word for word in words if word not in SMALL_WORDS] or words)


def main() -> None:
    """Write the three splits: the first lines of the text are for validation and test."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.generation.telegrams", description=__doc__.splitlines()[0]
    )
    count = ranged(int, at_least=1)
    parser.add_argument("--text", type=Path, required=True, help="one sentence a line")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--valid", type=count, default=500, help="sentences to validate on")
    parser.add_argument("--test", type=count, default=500, help="sentences to test on")
    parser.add_argument("--train", type=count, help="sentences to train on (default: all others)")
    parser.add_argument("--vocab-size", type=count, default=1000, help="pieces of the vocabulary")
    args = parser.parse_args()

    lines = args.text.read_text(encoding="utf-8").splitlines()
    splits, start = {}, 0
    for name in ("valid", "test", "train"):
        size = getattr(args, name)
        splits[name] = lines[start:] if size is None else lines[start : start + size]
        start += len(splits[name])
        if not splits[name]:
            parser.error(f"--text {args.text}: {len(lines)} lines, none left for {name}")
    args.out.mkdir(parents=True, exist_ok=True)
    train_vocabulary(both_sides(splits["train"]), args.vocab_size, args.out)
    encode = bpe_encoder("sentencepiece", sentencepiece_model=str(args.out / "spm.model"))
    dictionary = Dictionary.load(str(args.out / "dict.txt"))
    for side in (SOURCE, TARGET):
        shutil.copy(args.out / "dict.txt", args.out / f"dict.{side}.txt")
    for name, part in splits.items():
        prefix = args.out / f"{name}.{SOURCE}-{TARGET}"
        for side, sentences in ((SOURCE, list(map(telegram, part))), (TARGET, part)):
            text = "".join(sentence + "\n" for sentence in sentences)
            (args.out / f"{name}.{side}").write_text(text, encoding="utf-8")
            pieces = map(encode, sentences)
            write_dataset(pieces, dictionary, prefix.with_name(f"{prefix.name}.{side}"))
    print(f"{len(splits['train'])} pairs, {len(dictionary)} types -> {args.out}")


def both_sides(sentences: List[str]) -> List[str]:
    """Return the sentences and their telegrams, what the shared vocabulary is trained on."""
    return [text for sentence in sentences for text in (telegram(sentence), sentence)]


if __name__ == "__main__":
    main()
