"""Train a sentencepiece model on plain text and write the text for fairseq's masked_lm task.

    python -m examples.common.pretraining_data --text text.txt --skip 8000 --out lm

``lm/`` then holds ``spm.model``, ``dict.txt`` and the datasets ``train`` and ``valid``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import List

import sentencepiece

from deltasam_fairseq.data.binarize import Dictionary, bpe_encoder, write_dataset

SPECIAL = {"<unk>", "<s>", "</s>"}  # fairseq's dictionary has its own


def train_vocabulary(lines: List[str], size: int, out: Path, kind: str = "unigram") -> None:
    """Write ``spm.model`` and the matching fairseq ``dict.txt``; the same lines give the same."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(out / "spm"),
        vocab_size=size,
        model_type=kind,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=1,
    )
    pieces = [line.split("\t")[0] for line in (out / "spm.vocab").read_text("utf-8").splitlines()]
    entries = [f"{piece} 1\n" for piece in pieces if piece not in SPECIAL]
    (out / "dict.txt").write_text("".join(entries), encoding="utf-8")


def main() -> None:
    """Skip the first ``--skip`` lines, validate on the next ones, train on the rest."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.common.pretraining_data", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--text", type=Path, required=True, help="one sentence a line")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--skip", type=int, default=0, help="first lines, kept for the task")
    parser.add_argument("--valid", type=int, default=500, help="lines to validate on")
    parser.add_argument("--vocab-size", type=int, default=4000, help="pieces of the vocabulary")
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    args = parser.parse_args()

    lines = args.text.read_text(encoding="utf-8").splitlines()[args.skip :]
    args.out.mkdir(parents=True, exist_ok=True)
    train_vocabulary(lines, args.vocab_size, args.out, args.model_type)
    encode = bpe_encoder("sentencepiece", sentencepiece_model=str(args.out / "spm.model"))
    dictionary = Dictionary.load(str(args.out / "dict.txt"))
    for split, part in (("valid", lines[: args.valid]), ("train", lines[args.valid :])):
        # An empty line ends a document: every sentence is one (--sample-break-mode complete_doc).
        documents = (text for line in part for text in (encode(line), ""))
        write_dataset(documents, dictionary, args.out / split)
    print(f"{len(lines)} sentences, {len(dictionary)} types -> {args.out}")


if __name__ == "__main__":
    main()
