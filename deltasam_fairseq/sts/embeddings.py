"""Embeddings of sentences: pooled from the features of their tokens, gathered from all ranks."""

import functools
from typing import Any, Tuple

import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils
from fairseq.models.roberta import RobertaModel
from torch import Tensor, nn

from deltasam_fairseq.algorithms import at_least_float32

POOLINGS = ("cls", "mean", "mean_padded")


def pool(features: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Make one vector of the features of a sentence's tokens.

    Args:
        features: of the last layer, shape (B, T, C).
        mask: True where there is a token, shape (B, T).
        pooling: ``cls``: those of <s>; ``mean``: their mean over the tokens, <s> and </s>
            included; ``mean_padded``: their mean over all T positions.

    Returns:
        shape (B, C), at least float32.
    """
    features = at_least_float32(features)
    if pooling == "cls":
        return features[:, 0]
    if pooling == "mean_padded":
        return features.mean(dim=1)
    tokens = mask.unsqueeze(-1).to(features)
    return (features * tokens).sum(dim=1) / tokens.sum(dim=1)


def embed_padding(model: RobertaModel) -> None:
    """Have a model compute features of padding as transformers' does, for ``mean_padded``.

    fairseq feeds zeros to the first layer where there is padding, transformers the embedding of
    padding at its position. No token attends to padding: features of tokens stay as they are.

    Args:
        model: RoBERTa or BERT; it is changed.
    """
    encoder = model.encoder.sentence_encoder
    encoder.layers[0].register_forward_pre_hook(functools.partial(_fill_padding, encoder))


def _fill_padding(encoder: Any, layer: nn.Module, inputs: Tuple[Tensor, ...]) -> Tuple[Tensor, ...]:
    """Replace the zeros in the first layer's input, shape (T, B, C)."""
    x, *others = inputs
    pad, positions = encoder.padding_idx, encoder.embed_positions.weight
    word = encoder.embed_tokens.weight[pad].detach()  # neither of the two trains it
    types = getattr(encoder, "embed_types", None)
    if types is None:  # RoBERTa: all padding has one position, which is not trained either
        embedded = (word + positions[pad].detach()).expand(len(x), 1, -1)
    else:
        embedded = (word + positions[pad + 1 : pad + 1 + len(x)] + types.weight[0]).unsqueeze(1)
    filled = encoder.dropout_module(encoder.layernorm_embedding(embedded).expand_as(x))
    return (torch.where(x.eq(0).all(dim=-1, keepdim=True), filled.to(x), x), *others)


class _Gather(torch.autograd.Function):
    """Rows of all ranks; the gradient of a row is the sum of what all ranks found for it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        group = distributed_utils.get_data_parallel_group()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        group = distributed_utils.get_data_parallel_group()
        grad = grad.contiguous()
        dist.all_reduce(grad, group=group)
        return grad[dist.get_rank(group)]


def ranks() -> int:
    """Return the number of data-parallel processes; 1 without any."""
    return distributed_utils.get_data_parallel_world_size() if dist.is_initialized() else 1


def gather(rows: Tensor) -> Tensor:
    """Gather a tensor of all ranks, with gradients.

    Args:
        rows: shape (n, C), the same on every rank.

    Returns:
        shape (ranks, n, C). A loss that is summed over ranks has the gradients that it has on one.

    Under data parallelism: every rank calls it, and its backward, as often as every other.
    """
    return _Gather.apply(rows) if ranks() > 1 else rows.unsqueeze(0)
