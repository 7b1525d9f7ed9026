"""BERT: fairseq's RoBERTa with token type embeddings and a choice of the layer norm's epsilon.

    x_t = LayerNorm(word_t + position_t + type_t)

fairseq registers bert_base and bert_large as architectures of its old model masked_lm, so the
names here carry their sizes as Google's do: ``bert`` or ``bert_l12_h768`` is BERT base.
Source: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers".
"""

import argparse
import contextlib
from typing import Any, Optional, Tuple

from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta import RobertaModel
from fairseq.models.roberta.model import RobertaEncoder
from fairseq.models.roberta.model import base_architecture as roberta_architecture
from fairseq.models.transformer import TransformerEncoder
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-12
TOKEN_TYPES = 2


def token_types(tokens: Tensor, eos: int) -> Tensor:
    """Which sentence of a pair every token belongs to.

        type_t = min(1, number of </s> before t)

    Args:
        tokens: shape (B, T), as in ``<s> a a </s> b b </s> <pad>``.
        eos: index of </s>, BERT's [SEP].

    Returns:
        shape (B, T), int64: ``0 0 0 0 1 1 1 1``. One sentence alone: 0, but for the padding,
        whose embedding fairseq sets to zero and whose keys it masks.
    """
    ends = tokens.eq(eos).long()
    return (ends.cumsum(dim=1) - ends).clamp(max=TOKEN_TYPES - 1)


class BertSentenceEncoder(TransformerEncoder):
    """fairseq's encoder, which adds the type embedding to the word embedding."""

    def __init__(self, args: Any, dictionary: Any, embed_tokens: nn.Embedding) -> None:
        super().__init__(args, dictionary, embed_tokens)
        self.embed_types = nn.Embedding(TOKEN_TYPES, embed_tokens.embedding_dim)

    def forward_embedding(
        self, src_tokens: Tensor, token_embedding: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """As in fairseq; src_tokens of shape (B, T) give two tensors of shape (B, T, C)."""
        if token_embedding is None:
            token_embedding = self.embed_tokens(src_tokens)
        types = token_types(src_tokens, self.dictionary.eos())
        return super().forward_embedding(src_tokens, token_embedding + self.embed_types(types))


class BertEncoder(RobertaEncoder):
    """RoBERTa's encoder and MLM head, with BERT's embeddings and epsilon."""

    def __init__(self, args: Any, dictionary: Any) -> None:
        super().__init__(args, dictionary)
        for module in self.modules():
            if hasattr(module, "eps"):  # torch's LayerNorm and apex's
                module.eps = args.layer_norm_eps

    def build_encoder(
        self, args: Any, dictionary: Any, embed_tokens: nn.Embedding
    ) -> BertSentenceEncoder:
        encoder = BertSentenceEncoder(args, dictionary, embed_tokens)
        encoder.apply(init_bert_params)
        return encoder


@register_model("bert")
class BertModel(RobertaModel):
    """BERT, as ``--arch bert``; all that fairseq does with RoBERTa it does with this.

    A pair is ``<s> a </s> b </s>``: give sentence_prediction ``--init-token 0`` and no
    ``--separator-token``. Limiting case: with type embeddings of zero and ``--layer-norm-eps
    1e-5`` it is RoBERTa.
    """

    @staticmethod
    def add_args(parser: argparse.ArgumentParser) -> None:
        RobertaModel.add_args(parser)
        parser.add_argument(
            "--layer-norm-eps",
            type=float,
            metavar="EPS",
            help="added to the variance in every layer norm, above 0, default "
            f"{LAYER_NORM_EPS} as in BERT (RoBERTa: 1e-5)",
        )

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "BertModel":
        """As RobertaModel.build_model, which names its encoder's class."""
        with open_dict(args) if OmegaConf.is_config(args) else contextlib.nullcontext():
            base_architecture(args)
            if getattr(args, "max_positions", None) is None:
                args.max_positions = (
                    getattr(args, "tokens_per_sample", None) or task.max_positions()
                )
            encoder = BertEncoder(args, task.source_dictionary)
        return cls(args, encoder)


def _defaults(args: Any, **values: Any) -> None:
    for name, value in values.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


@register_model_architecture("bert", "bert")
@register_model_architecture("bert", "bert_l12_h768")
def base_architecture(args: Any) -> None:
    """BERT base: 12 layers, 768 features, 12 heads."""
    _defaults(args, layer_norm_eps=LAYER_NORM_EPS)
    roberta_architecture(args)


@register_model_architecture("bert", "bert_l24_h1024")
def large_architecture(args: Any) -> None:
    """BERT large: 24 layers, 1024 features, 16 heads."""
    _defaults(args, encoder_layers=24, encoder_embed_dim=1024)
    _defaults(args, encoder_ffn_embed_dim=4096, encoder_attention_heads=16)
    base_architecture(args)


@register_model_architecture("bert", "minilm_l6_h384")
def minilm_architecture(args: Any) -> None:
    """MiniLM-L6-H384: 6 layers, 384 features, 12 heads."""
    _defaults(args, encoder_layers=6, encoder_embed_dim=384)
    _defaults(args, encoder_ffn_embed_dim=1536, encoder_attention_heads=12)
    base_architecture(args)
