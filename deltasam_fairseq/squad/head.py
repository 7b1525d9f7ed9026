"""The head of extractive question answering: where an answer begins, and where it ends.

    (start_t, end_t) = W x_t + b

Source: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", section 4.2.
"""

from typing import Any

from fairseq.models.roberta import RobertaModel
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from torch import Tensor, nn

SPAN_HEAD = "span_prediction_head"


class SpanHead(nn.Module):
    """Two scores for every token, by one linear layer without dropout.

    Args:
        input_dim: features of a token.
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.out_proj = nn.Linear(input_dim, 2)
        init_bert_params(self.out_proj)

    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        """Scores of start and end, shape (B, T, 2), of features of shape (B, T, C)."""
        return self.out_proj(features)


def register_span_head(model: Any) -> None:
    """Give a model a `SpanHead`, beside its classification heads and called as they are.

    Args:
        model: RoBERTa, or a model derived from it, such as ``--arch bert``.

    Raises:
        ValueError: for any other model.
    """
    if not isinstance(model, RobertaModel):
        raise ValueError(
            f"--arch of {type(model).__name__}: span prediction needs an encoder with heads; use "
            "--arch roberta_base or roberta_large (XLM-R is one too), or bert"
        )
    model.classification_heads[SPAN_HEAD] = SpanHead(model.args.encoder_embed_dim)
