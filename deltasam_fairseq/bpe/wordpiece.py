"""BERT's WordPiece as a fairseq BPE, without the network and without transformers.

    fairseq-... --bpe wordpiece --wordpiece-vocab vocab.txt

fairseq's own ``--bpe bert`` needs transformers, and knows neither <unk> nor <mask>.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional, Tuple

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass

logger = logging.getLogger(__name__)

# BERT's special pieces and fairseq's symbols for them.
SPECIAL = {
    "[CLS]": "<s>",
    "[PAD]": "<pad>",
    "[SEP]": "</s>",
    "[UNK]": "<unk>",
    "[MASK]": "<mask>",
}
_BERT_NAMES = {symbol: piece for piece, symbol in SPECIAL.items()}
CASED_SHARE = 0.01  # of pieces with upper case: a cased vocabulary has a third, an uncased one none
LONGEST_WORD = 100  # characters; BERT takes a longer word for [UNK]


@dataclass
class WordPieceConfig(FairseqDataclass):
    """What the WordPiece splitter needs to know."""

    wordpiece_vocab: Optional[str] = field(
        default=None,
        metadata={"help": "BERT's vocab.txt, one piece a line; needed with --bpe wordpiece"},
    )
    wordpiece_cased: bool = field(
        default=False,
        metadata={"help": "keep upper case and accents (bert-*-cased); default: remove both"},
    )


def read_vocabulary(path: Path) -> List[str]:
    """The pieces of a vocab.txt in the order of their ids.

    Raises:
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the vocab.txt of the BERT model")
    with path.open(encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


@register_bpe("wordpiece", dataclass=WordPieceConfig)
class WordPieceBPE:
    """Splits text as BERT does; special pieces have fairseq's names (``<unk>`` for [UNK]).

    ``[SEP]`` as text is the separator, as in transformers: what follows gets the second token
    type, where transformers goes by the two arguments. ``[PAD]`` is padding. Warns once.

    Raises:
        ImportError: the package tokenizers is not installed.
        ValueError: no --wordpiece-vocab, or one without BERT's special pieces.
        FileNotFoundError: no such file.
    """

    def __init__(self, cfg: WordPieceConfig) -> None:
        try:
            from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
        except ImportError as error:
            raise ImportError("--bpe wordpiece needs tokenizers: pip install tokenizers") from error
        if not cfg.wordpiece_vocab:
            raise ValueError("--bpe wordpiece needs --wordpiece-vocab, the BERT model's vocab.txt")
        pieces = read_vocabulary(Path(cfg.wordpiece_vocab))
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        missing = [piece for piece in SPECIAL if piece not in vocabulary]
        if missing:
            raise ValueError(
                f"--wordpiece-vocab {cfg.wordpiece_vocab}: {', '.join(missing)} not found; "
                "is it the vocab.txt of a BERT model?"
            )
        upper = [p for p in pieces if p != p.lower() and p not in SPECIAL]
        if not cfg.wordpiece_cased and len(upper) > CASED_SHARE * len(pieces):
            logger.warning(
                f"--wordpiece-vocab {cfg.wordpiece_vocab} is of a cased model: {len(upper)} pieces "
                f"such as {upper[-1]} are never used without --wordpiece-cased"
            )
        self._warned = False
        self._tokenizer = Tokenizer(
            models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD)
        )
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cfg.wordpiece_cased)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.add_special_tokens(list(SPECIAL))
        self._decoder = decoders.WordPiece()

    def encode(self, x: str) -> str:
        """A sentence in, its pieces joined by spaces out: "unaffable" -> "una ##ffa ##ble"."""
        return " ".join(piece for piece, _, _ in self.pieces(x))

    def pieces(self, x: str) -> List[Tuple[str, int, int]]:
        """The pieces of a sentence, and where in it each begins and ends, in characters."""
        encoded = self._tokenizer.encode(x, add_special_tokens=False)
        special = sorted({"[SEP]", "[PAD]"}.intersection(encoded.tokens))
        if special and not self._warned:
            self._warned = True
            logger.warning(
                f"{' and '.join(special)} as text in {x[:60]!r}: BERT's special tokens, not words; "
                "behind a separator the second sentence begins. Give two sentences as two columns"
            )
        found = zip(encoded.tokens, encoded.offsets)
        return [(SPECIAL.get(piece, piece), begin, end) for piece, (begin, end) in found]

    def decode(self, x: str) -> str:
        """The reverse, up to case, accents and spaces; special pieces get BERT's names."""
        return self._decoder.decode([_BERT_NAMES.get(piece, piece) for piece in x.split()])

    def is_beginning_of_word(self, x: str) -> bool:
        """Whether a piece begins a word; for --mask-whole-words."""
        return not x.startswith("##")
