"""Compare both sides of a conversion: tokens of the same lines, outputs of the same tokens.

The tokens have to be equal.  The outputs may differ by

    max |ours - theirs| <= 1e-4 max(1, max |theirs|)

as both libraries sum float32 in orders of their own.  Measured with MiniLM's weights (6 layers):
2e-6 as it is, 5e-3 with a layer norm's epsilon of 1e-5 for 1e-12.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Sequence

import torch
from fairseq.data import Dictionary
from torch import Tensor

from deltasam_fairseq.convert.families import Family
from deltasam_fairseq.convert.vocabulary import BPE, Vocabulary
from deltasam_fairseq.models import token_types

TOLERANCE = 1e-4
OWN_LINES, OWN_WORDS = 200, 4  # of the vocabulary's own words: lines, words of each
ROWS, BATCH = 48, 8  # lines whose outputs are compared
LINES = """\
The quick brown fox jumps over the lazy dog.
A man's naïve résumé: un-moved, re-read -- it isn't "fine"; (really?) [yes]!
cat[1] dog(2) e.g. foo_bar, x=y+z; a/b\\c #tag @name 50% $3.20 £4 €5 <b> & ~`|{}^*
I'LL SAY they've WON't we'd I'm you're he's 'tis rock'n'roll don't-a--b...
 leading blank, two  blanks,   three, trailing\x20
12 1,234.56 007 3rd 2nd-best 1e-5 0x1F 20:15 2026-11-27 ½ ² ① Ⅳ
http://www.example.org/a?b=c&d=e#f user.name@example.org C:\\temp\\file.txt
Ünïcödé: Ångström, Žižek, Łódź, İstanbul, straße, ŒUVRE, ﬁnal ﬂow, e\u0301 a\u030a n\u0303
Привет, мир! Ёлка и йод. ГДЕ ЖЕ Они?
Καλημέρα κόσμε, Ελλάδα; ΣΊΣΥΦΟΣ
你好,世界。 我們在 2026 年學習 machine翻译。
こんにちは世界。カタカナ と ひらがな、ﾊﾝｶｸ 「かぎ」
안녕하세요 세계! 한국어 문장입니다.
مرحبا بالعالم، كَيْفَ حالك؟
שלום עולם, מַה שְּׁלוֹמְךָ?
नमस्ते दुनिया, कैसे हैं आप?
สวัสดีชาวโลก ภาษาไทย
வணக்கம் உலகம் · বাংলা ভাষা · ગુજરાતી
Xin chào thế giới, tiếng Việt có dấu
🙂 👩‍💻 ☃ ♥ → ∑ ≤ ∞ “quotes” ‘single’ «angle» – — … • § ° ™
tab\there zero\u200bwidth soft\u00adhyphen nbsp\u00a0x wide\u3000space \ufeffmark \ufffd
""".split("\n")[:-1]


class Side(NamedTuple):
    """fairseq's side of a comparison."""

    family: Family
    dictionary: Dictionary
    hf_ids: Tensor  # Hugging Face's id of each word of the dictionary, shape (V,)


def sample_lines(vocabulary: Vocabulary, text: Optional[Path]) -> List[str]:
    """Lines in many scripts, lines of the vocabulary's own words, and those of a text file."""
    words, tokenizer = [], vocabulary.tokenizer
    for _, token in sorted(vocabulary.tokens.items()):
        word = tokenizer.convert_tokens_to_string([token]) if vocabulary.merges else token
        word = (word if vocabulary.merges else re.sub("^##", "", word)).strip()
        if word and "\ufffd" not in word and token not in tokenizer.all_special_tokens:
            words.append(word)
    words = words[:: max(1, len(words) // (OWN_LINES * OWN_WORDS))]
    own = [" ".join(words[i : i + OWN_WORDS]) for i in range(0, len(words), OWN_WORDS)]
    own += [line.title() + "." for line in own[::4]]
    return [*LINES, *own, *(text.read_text(encoding="utf-8").splitlines() if text else [])]


def compare_tokens(
    side: Side, vocabulary: Vocabulary, bpe: Any, lines: Sequence[str]
) -> List[List[int]]:
    """Encode lines, alone and in pairs, with both tokenizers.

    Returns:
        fairseq's rows of token numbers, with the special tokens.

    Raises:
        ValueError: a difference; the text has the line and both lists of tokens.
    """
    rows, tokenizer = [], vocabulary.tokenizer
    for texts in [*((line,) for line in lines), *zip(LINES[:8], LINES[1:9])]:
        theirs = tokenizer(*texts)
        between = " </s>" * side.family.separators + " "
        coded = f"<s> {between.join(bpe.encode(text) for text in texts)} </s>"
        row = side.dictionary.encode_line(coded, add_if_not_exist=False, append_eos=False).long()
        types = token_types(row[None], side.dictionary.eos())[0].tolist()
        both = [list(theirs["input_ids"]), side.hf_ids[row].tolist()]
        same_types = list(theirs.get("token_type_ids", types)) == types
        if both[0] != both[1] or not same_types and side.family.token_types > 1:
            tokens = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in both]
            raise ValueError(
                f"the tokenizers differ on {' and '.join(map(repr, texts))}\n"
                f"  Hugging Face: {tokens[0]}\n"
                f"  fairseq, --bpe {BPE[side.family.arch]}: {tokens[1]}\n"
                "the model would not read in one what it was trained on in the other"
            )
        rows.append(row.tolist())
    return rows


@torch.no_grad()
def compare_outputs(
    side: Side,
    theirs: Any,
    ours: Any,
    logits: Optional[Callable[[Tensor], Tensor]],
    rows: Sequence[Sequence[int]],
) -> None:
    """Run both models on rows of fairseq's token numbers.

    Args:
        side: the dictionary of the rows.
        theirs: of transformers; its first output is the logits.
        ours: fairseq's RoBERTa or bert.
        logits: makes them of ours' hidden states, shape (B, T, C); None: only these are compared.
        rows: without padding, each begins with <s> and ends with </s>.

    Raises:
        ValueError: they differ by more than the tolerance, or are not finite.
    """
    pad, eos, longest = side.dictionary.pad(), side.dictionary.eos(), ours.args.max_positions
    chosen = [*rows[:: max(1, len(rows) // ROWS)], rows[-1]]  # the last is a pair
    body = [token for row in rows for token in row[1:-1] if token not in (pad, eos)]
    chosen.append([*rows[0][:1], *(body * longest)[: longest - 2], eos])  # all positions
    chosen = sorted((row[:longest] for row in chosen), key=len)
    for i in range(0, len(chosen), BATCH):
        batch = [torch.tensor(row) for row in chosen[i : i + BATCH]]
        tokens = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad)
        words = tokens.ne(pad)
        inputs = {"input_ids": side.hf_ids[tokens], "attention_mask": words.long()}
        if side.family.token_types > 1:
            inputs["token_type_ids"] = token_types(tokens, eos)
        expected = theirs(**inputs, output_hidden_states=True)
        features = ours(tokens, features_only=True)[0]
        outputs = [("hidden states", features[words], expected.hidden_states[-1][words])]
        if logits is not None:
            found, wanted = logits(features), expected[0]
            outputs.append(
                ("logits", found, wanted)
                if wanted.dim() == 2
                else ("MLM logits", found[words], wanted[words])
            )
        for name, found, wanted in outputs:
            difference = float((found - wanted).abs().max())
            allowed = TOLERANCE * max(1.0, float(wanted.abs().max()))
            if not difference <= allowed:
                raise ValueError(
                    f"the {name} of Hugging Face's and fairseq's model differ by {difference:.2g} "
                    f"on the same tokens, allowed are {allowed:.2g}: the weights mean something "
                    "else than this program takes them for"
                )
