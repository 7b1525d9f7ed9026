"""Options of the programs that prepare data: which BPE makes tokens of text, with which files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from deltasam_fairseq.data.binarize import Encoding, tools
from deltasam_fairseq.data.files import DataError, cached_path, sha256
from deltasam_fairseq.options import ranged

FAIRSEQ_URL = "https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe"
# GPT-2's own files: the checksums are those of OpenAI's.
GPT2_ENCODER = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_VOCAB = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# BPE -> its files, and where they are if the command line does not say
BPE_FILES: Dict[str, Dict[str, Optional[str]]] = {
    "gpt2": {
        "gpt2_encoder_json": f"{FAIRSEQ_URL}/encoder.json#sha256={GPT2_ENCODER}",
        "gpt2_vocab_bpe": f"{FAIRSEQ_URL}/vocab.bpe#sha256={GPT2_VOCAB}",
    },
    "sentencepiece": {"sentencepiece_model": None},
    "wordpiece": {"wordpiece_vocab": None},
}


def add_encoding_options(options: argparse.ArgumentParser, workers: bool = True) -> None:
    """Add what `encoding_of` reads, and --workers unless a program has no use for it."""
    add = options.add_argument
    add("--dict", required=True, help="dict.txt of the checkpoint")
    add("--bpe", choices=sorted(BPE_FILES), default="gpt2", help="of the checkpoint")
    add("--sentencepiece-model", help="for --bpe sentencepiece")
    add("--gpt2-encoder-json", help="for --bpe gpt2 (default: fetched once)")
    add("--gpt2-vocab-bpe", help="for --bpe gpt2 (default: fetched once)")
    add("--wordpiece-vocab", help="for --bpe wordpiece: BERT's vocab.txt")
    add("--wordpiece-cased", action="store_true", help="for --bpe wordpiece: keep case and accents")
    if workers:
        add(
            "--workers",
            type=ranged(int, at_least=1),
            default=1,
            help="processes; any number gives the same",
        )


def encoding_of(args: argparse.Namespace) -> Tuple[Encoding, Dict[str, Any]]:
    """Return the encoding that the options ask for, and what task.json says of it."""
    options: Dict[str, Any] = {}
    for bpe, files in BPE_FILES.items():
        remedy = " ".join(f"--{name.replace('_', '-')} FILE" for name in files)
        for name, default in files.items():
            option, given = "--" + name.replace("_", "-"), getattr(args, name)
            if bpe != args.bpe and given:
                raise DataError(f"{option} is for --bpe {bpe}, not for --bpe {args.bpe}")
            if bpe == args.bpe:
                where = given or default
                if where is None:
                    raise DataError(f"--bpe {bpe}: give {option}")
                options[name] = str(cached_path(where, option, remedy))
    dictionary = cached_path(args.dict, "--dict")
    sums = {name: sha256(Path(path)) for name, path in {**options, "dict": dictionary}.items()}
    if args.wordpiece_cased:
        if args.bpe != "wordpiece":
            raise DataError("--wordpiece-cased is for --bpe wordpiece")
        options["wordpiece_cased"] = True
    encoding = Encoding(args.bpe, tuple(options.items()), str(dictionary))
    try:
        tools(encoding)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"--bpe {args.bpe}, --dict {args.dict}: {error}") from error
    return encoding, {"name": args.bpe, "options": options, "sha256": sums}
