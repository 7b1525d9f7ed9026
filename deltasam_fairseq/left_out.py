"""Sentences that fairseq leaves out without a word."""

import logging
from typing import Any

import numpy as np
from fairseq.data import data_utils

logger = logging.getLogger(__name__)


def leaves_out_sentences(multiple: int) -> bool:
    """Whether this fairseq drops a last batch that is no multiple of ``multiple``.

    fairseq 0.12.2 keeps it; later ones drop it, from training, validation and generation alike.

    Args:
        multiple: --required-batch-size-multiple.
    """
    sentences = np.arange(multiple + 1)
    batches = data_utils.batch_by_size(
        sentences,
        num_tokens_fn=lambda _: 1,
        num_tokens_vec=np.ones_like(sentences),
        max_sentences=multiple,
        required_batch_size_multiple=multiple,
    )
    return sum(len(batch) for batch in batches) < len(sentences)


def warn(cfg: Any) -> None:
    """Say it where a run will lose sentences; fairseq's default loses up to 7 of every data set.

    Args:
        cfg: fairseq's whole configuration.
    """
    multiple = cfg.dataset.required_batch_size_multiple
    task = getattr(cfg.task, "_name", cfg.task)
    if multiple > 1 and task != "span_prediction" and leaves_out_sentences(multiple):
        logger.warning(
            f"--required-batch-size-multiple {multiple}: this fairseq leaves out up to "
            f"{multiple - 1} sentences of every data set, in validation too, without another word; "
            "to keep all, give --required-batch-size-multiple 1"
        )
