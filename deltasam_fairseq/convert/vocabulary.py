"""Vocabularies: Hugging Face's tokens and ids, fairseq's symbols."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, NamedTuple

from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

from deltasam_fairseq.bpe import read_vocabulary
from deltasam_fairseq.convert.families import MASK, Family, read_json


class Vocabulary(NamedTuple):
    """The tokens of a model by id, and the merges of its BPE in their order ("a b")."""

    tokens: Dict[int, str]
    merges: List[str]


def read_vocabulary_of(folder: Path, model_type: str) -> Vocabulary:
    """Read vocab.txt (BERT), vocab.json and merges.txt (RoBERTa), or else tokenizer.json.

    Raises:
        FileNotFoundError: none of them is there.
        ValueError: tokenizer.json is of another kind.
    """
    tokenizer = folder / "tokenizer.json"
    merges: List[str] = []
    if model_type == "bert" and (folder / "vocab.txt").is_file():
        tokens = dict(enumerate(read_vocabulary(folder / "vocab.txt")))
    elif model_type == "roberta" and all(
        (folder / f).is_file() for f in ("vocab.json", "merges.txt")
    ):
        tokens = {i: token for token, i in read_json(folder / "vocab.json").items()}
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    elif tokenizer.is_file():
        content = read_json(tokenizer)
        if not isinstance(content["model"]["vocab"], dict):
            raise ValueError(f"{tokenizer} is neither WordPiece nor BPE; no other is supported")
        tokens = {i: token for token, i in content["model"]["vocab"].items()}
        tokens.update((added["id"], added["content"]) for added in content["added_tokens"])
        pairs = content["model"].get("merges", [])
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    else:
        wanted = "vocab.txt" if model_type == "bert" else "vocab.json with merges.txt"
        raise FileNotFoundError(f"{folder} has neither {wanted} nor tokenizer.json")
    if (folder / "added_tokens.json").is_file():
        added = read_json(folder / "added_tokens.json")
        tokens.update((i, token) for token, i in added.items())
    return Vocabulary(tokens, merges)


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
