"""Convert RoBERTa and BERT checkpoints between Hugging Face and fairseq.

    python -m deltasam_fairseq.convert to-fairseq --from HF_FOLDER --out DIR
    python -m deltasam_fairseq.convert to-hf --from checkpoint_best.pt \\
        --data DATA --out DIR --tokenizer HF_FOLDER

``to-fairseq`` writes model.pt, dict.txt and the tokenizer's files, and prints the options to
fine-tune with.  ``to-hf`` writes a folder for AutoModelForSequenceClassification, of
a model trained with --task sentence_embedding one for AutoModel.  Both then encode a few hundred
lines and run both models on them; a difference is an error.  Nothing is fetched; transformers is
needed (pip install transformers).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from deltasam_fairseq.checkpoints import CheckpointDamagedError, CheckpointRefusedError
from deltasam_fairseq.convert.to_fairseq import to_fairseq
from deltasam_fairseq.convert.to_huggingface import to_hf

UNREADABLE = (CheckpointDamagedError, CheckpointRefusedError)


def main() -> None:
    """Convert, or say in one line why not."""
    parser = argparse.ArgumentParser(
        prog="python -m deltasam_fairseq.convert", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("to-fairseq", help="a Hugging Face folder -> model.pt, dict.txt")
    command.add_argument("--from", dest="source", type=Path, required=True, help="folder to read")
    command.add_argument("--out", type=Path, required=True, help="folder to make")
    command.add_argument(
        "--num-classes",
        type=int,
        help="make a head of BERT's pooler and a fresh output layer, at least 1; default: the "
        "head that the checkpoint has, or none",
    )
    command = commands.add_parser("to-hf", help="a fine-tuned checkpoint -> a Hugging Face folder")
    command.add_argument("--from", dest="source", type=Path, required=True, help="checkpoint (.pt)")
    command.add_argument("--data", type=Path, required=True, help="data that it was trained on")
    command.add_argument("--out", type=Path, required=True, help="folder to make")
    command.add_argument("--tokenizer", type=Path, help="folder with the tokenizer's files")
    for command in commands.choices.values():
        command.add_argument("--text", type=Path, help="file of lines for the comparison, too")
    args = parser.parse_args()
    torch.manual_seed(1)  # of layers that the checkpoint does not have
    try:
        if args.command == "to-fairseq":
            lines = to_fairseq(args.source, args.out, args.num_classes, args.text)
        else:
            lines = to_hf(args.source, args.data, args.out, args.tokenizer, args.text)
    except (ValueError, OSError, ImportError, *UNREADABLE) as error:
        parser.error(str(error))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
