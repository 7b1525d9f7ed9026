"""Tokenizers: Hugging Face's tokens and ids, fairseq's symbols and BPEs.

transformers says what a folder's tokenizer does. Its version 5 builds BERT's and RoBERTa's from
the vocabulary and tokenizer_config.json and takes no notice of other steps in tokenizer.json,
which its version 4 and the library tokenizers carry out: so both readings are checked.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

from deltasam_fairseq.convert.families import FAMILIES, MASK, Family, import_transformers

VOCABULARY_FILES = {"bert": ["vocab.txt"], "roberta": ["vocab.json", "merges.txt"]}
TOKENIZER_FILES = (
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
# What fairseq's BPE does, in the words of tokenizer.json; strip_accents is checked beside it.
BPE = {"bert": "wordpiece", "roberta": "gpt2"}
STEPS: Dict[str, Dict[str, Dict[str, Any]]] = {
    "bert": {
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
    },
    "roberta": {
        "normalizer": {},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "ignore_merges": False,
        },
    },
}


class Vocabulary(NamedTuple):
    """What a tokenizer knows."""

    tokens: Dict[int, str]  # by id
    merges: List[str]  # of its BPE, in their order ("a b")
    cased: bool = True
    tokenizer: Any = None  # transformers'


def load_vocabulary(folder: Path, model_type: str) -> Vocabulary:
    """Read a folder's tokenizer.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does something that --bpe wordpiece (BERT) or gpt2 (RoBERTa) does not.
    """
    transformers = import_transformers()
    files = VOCABULARY_FILES[model_type]
    whole = folder / "tokenizer.json"
    if not (whole.is_file() or all((folder / name).is_file() for name in files)):
        raise FileNotFoundError(f"{folder} has neither {' with '.join(files)} nor tokenizer.json")
    config = transformers.AutoConfig.for_model(model_type)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), config=config, local_files_only=True
        )
    except Exception as error:  # tokenizers has its own
        raise ValueError(f"{folder}: transformers cannot read the tokenizer: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"{folder}: {type(tokenizer).__name__} is not supported")
    name = f"{folder}: transformers' {type(tokenizer).__name__}"
    readings = {name: json.loads(tokenizer.backend_tokenizer.to_str())}
    if whole.is_file():
        from tokenizers import Tokenizer

        readings[str(whole)] = json.loads(Tokenizer.from_file(str(whole)).to_str())
    found = [read_steps(steps, model_type, name) for name, steps in readings.items()]
    if whole.is_file() and (folder / files[0]).is_file():
        require_same_ids(folder / files[0], found[-1].tokens)
    if found[0] != found[-1]:
        what = "upper case" if found[0][:2] == found[-1][:2] else "the vocabulary"
        raise ValueError(
            f"{' and '.join(readings)} differ in {what}: make tokenizer_config.json "
            "(do_lower_case) and the vocabulary's files agree with what the model was trained with"
        )
    return found[0]._replace(tokenizer=tokenizer)


def read_steps(steps: Dict[str, Any], model_type: str, name: str) -> Vocabulary:
    """The vocabulary of a tokenizer.json; ``name`` is for the errors.

    Raises:
        ValueError: fairseq's BPE does not what it says.
    """
    bpe, family = BPE[model_type], FAMILIES[model_type]
    for step, wanted in STEPS[model_type].items():
        found = {k: v for k, v in (steps[step] or {}).items() if k not in ("vocab", "merges")}
        same = all((found.get(key) or None) == (value or None) for key, value in wanted.items())
        if not same or bool(found) != bool(wanted):
            raise ValueError(
                f"{name}: its {step} is {found or None}, which --bpe {bpe} does not do; supported "
                f"is {wanted or None}. Encode the text with that tokenizer yourself, or take a "
                "model with the usual one"
            )
    normalizer = steps["normalizer"] or {"lowercase": False}
    if normalizer.get("strip_accents") not in (None, normalizer["lowercase"]):
        raise ValueError(
            f"{name}: its normalizer is {normalizer}; --bpe wordpiece removes accents when it "
            "lower-cases, and only then"
        )
    added = [token["content"] for token in steps["added_tokens"]]
    added = [token for token in added if token not in family.special]
    if added:
        raise ValueError(
            f"{name}: {len(added)} added tokens, {', '.join(added[:5])}: it keeps each in one "
            f"piece, --bpe {bpe} splits them. If your data has none of them, remove them from the "
            "tokenizer's files; otherwise the model cannot be converted"
        )
    tokens = {i: token for token, i in steps["model"]["vocab"].items()}
    pairs = steps["model"].get("merges", [])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    return Vocabulary(tokens, merges, not normalizer["lowercase"])


def require_same_ids(path: Path, tokens: Dict[int, str]) -> None:
    """Raise a ValueError if vocab.txt or vocab.json, which older programs read, has other ids."""
    text = path.read_text(encoding="utf-8")
    lines = {token: i for i, token in enumerate(text.split("\n"))}
    ids = json.loads(text) if path.suffix == ".json" else lines
    for i, token in tokens.items():
        if ids.get(token, i) != i:
            raise ValueError(
                f"{path}: {token} is number {ids[token]}, in tokenizer.json {i}; keep the file "
                "that the model was trained with and remove the other"
            )


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy Hugging Face's files as they are: transformers 5 would not write vocab.txt."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def write_bpe(vocabulary: Vocabulary, model_type: str, out: Path) -> Dict[str, Any]:
    """Write the files of fairseq's BPE; returns its options, files by their names in ``out``."""
    if model_type == "roberta":
        (out / "encoder.json").write_text(json.dumps(gpt2_ids(vocabulary.merges), indent=2) + "\n")
        merges = "".join(f"{merge}\n" for merge in vocabulary.merges)
        (out / "vocab.bpe").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
        return {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"}
    ids = range(max(vocabulary.tokens) + 1)
    pieces = "".join(f"{vocabulary.tokens.get(i, f'[unused-{i}]')}\n" for i in ids)
    (out / "vocab.txt").write_text(pieces, encoding="utf-8")
    cased = {"wordpiece_cased": True} if vocabulary.cased else {}
    return {"wordpiece_vocab": "vocab.txt", **cased}


def gpt2_ids(merges: List[str]) -> Dict[str, int]:
    """GPT-2's encoder.json from its merges: the 256 bytes, the merges, the end of text."""
    tokens = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)]
    return {token: i for i, token in enumerate([*tokens, "<|endoftext|>"])}


def fairseq_symbols(vocabulary: Vocabulary, family: Family, size: int) -> List[str]:
    """The symbol in fairseq's dict.txt of every row of a Hugging Face embedding.

    That is the token itself for BERT and, as in the official dict.txt, its GPT-2 id for RoBERTa.
    Rows without a token, or with one that no text can give, become "madeupword" and their number.

    Raises:
        ValueError: more tokens than rows, far fewer, or no special tokens.
    """
    tokens = vocabulary.tokens
    if max(tokens, default=-1) >= size or len(tokens) < size - 512:
        raise ValueError(
            f"the vocabulary has {len(tokens)} tokens with ids up to {max(tokens, default=-1)}, "
            f"the word embeddings {size} rows: they do not belong together"
        )
    missing = set(family.special) - set(tokens.values())
    if missing:
        raise ValueError(f"the vocabulary lacks {', '.join(sorted(missing))}")
    ids = gpt2_ids(vocabulary.merges) if vocabulary.merges else {}
    row_of = {token: row for row, token in sorted(tokens.items())}  # of twins the last counts
    symbols = []
    for row in range(size):
        token = tokens.get(row, "")
        symbol = family.special.get(token) or str(ids.get(token, token))
        special = symbol in family.special.values() and token not in family.special
        number = ids and token not in ids and token.isdigit()  # would be taken for GPT-2's id
        if special or number or row_of.get(token) != row or symbol.split() != [symbol]:
            symbol = f"madeupword{row:04d}"
        symbols.append(symbol)
    if len(set(symbols)) < size:
        raise ValueError("the vocabulary has words like madeupword0000 of its own, in other rows")
    return symbols


def dictionary_of(symbols: List[str]) -> Dictionary:
    """fairseq's dictionary: <s> <pad> </s> <unk>, then ``symbols`` in their order, <mask> last."""
    dictionary = Dictionary()
    special = {*dictionary.symbols, MASK}
    for i, symbol in enumerate(symbols):
        if symbol not in special:
            dictionary.add_symbol(symbol, n=len(symbols) - i)  # sorting by count changes nothing
    return dictionary
