"""Noise that depends on the tokens only, so that a sentence has the same in every batch."""

import torch

from deltasam_fairseq.criterions import freelb
from deltasam_fairseq.criterions.batch import Batch


def content_noise(tokens, padding, dim, dtype):
    """Numbers in [-1, 1], shape (B, T, dim), zero at padding."""
    t = torch.arange(tokens.size(1), dtype=dtype)
    phase = (1.3 * tokens.to(dtype) + 0.7 * t).unsqueeze(-1)
    noise = torch.sin(phase + 2.1 * torch.arange(dim, dtype=dtype))
    return noise * tokens.ne(padding).unsqueeze(-1)


def start_of(delta, mask, magnitude, norm):
    """FreeLB's start with these numbers for its uniform ones."""
    if norm == float("inf"):
        return delta * magnitude
    entries = (mask.sum(dim=1) * delta.size(-1)).to(delta.dtype)
    return delta * (magnitude / entries.sqrt()).view(-1, 1, 1)


def use(patch=setattr):
    """Replace the random draws of all criterions.

    Args:
        patch: ``setattr``, or ``monkeypatch.setattr`` to have it undone.
    """

    def noise(batch, kind, size):
        zeros = batch.zeros()
        padding = batch.embeddings.padding_idx
        batch_noise = content_noise(batch.tokens, padding, zeros.size(-1), zeros.dtype)
        return size * batch_noise

    original_call = freelb.FreeLB.__call__

    def call(self, batch, sum_only):
        zeros = batch.zeros()
        padding = batch.embeddings.padding_idx
        drawn = content_noise(batch.tokens, padding, zeros.size(-1), zeros.dtype)
        patch(
            freelb,
            "freelb_start",
            lambda mask, dim, magnitude, norm, dtype: start_of(drawn, mask, magnitude, norm),
        )
        return original_call(self, batch, sum_only)

    patch(Batch, "noise", noise)
    patch(freelb.FreeLB, "__call__", call)
