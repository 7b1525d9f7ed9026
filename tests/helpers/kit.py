"""What scripts/gpu/first_run.sh finds on a machine: a model of MiniLM's size, RTE, and TREC."""

from pathlib import Path

import pytest
import torch

WORDS = "a b c d e f g h".split()


def write_kit(folder: Path) -> Path:
    """Write it with random weights and another vocabulary."""
    reason = "MiniLM is converted by transformers; pip install transformers"
    transformers = pytest.importorskip("transformers", reason=reason)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(tokens),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=512,
    )
    transformers.BertModel(config).save_pretrained(folder / "minilm")
    (folder / "minilm" / "vocab.txt").write_text("\n".join(tokens) + "\n")
    rows = [(WORDS[i % 8], WORDS[i % 5], i % 2) for i in range(60)]
    pairs = "".join(
        f"{i}\t{a}\t{b}\t{['entailment', 'not_entailment'][y]}\n"
        for i, (a, b, y) in enumerate(rows)
    )
    texts = "".join(f"{a} {b}\tc{y}\n" for a, b, y in rows)
    for file in ("train.tsv", "dev.tsv"):
        for task, head, lines in (
            ("glue/RTE", "index\tsentence1\tsentence2\tlabel", pairs),
            ("text/TREC", "sentence\tlabel", texts),
        ):
            (folder / task).mkdir(parents=True, exist_ok=True)
            (folder / task / file).write_text(f"{head}\n{lines}")
    return folder
