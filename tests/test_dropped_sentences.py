"""Sentences that fairseq leaves out are spoken of."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from fairseq.data import data_utils

from deltasam_fairseq import left_out


def config(multiple, task="sentence_prediction"):
    return SimpleNamespace(
        dataset=SimpleNamespace(required_batch_size_multiple=multiple),
        task=SimpleNamespace(_name=task),
    )


@pytest.mark.parametrize("drops", [True, False])
def test_it_is_said_where_a_batch_is_dropped(drops, monkeypatch, caplog):
    def batch_by_size(indices, max_sentences, required_batch_size_multiple, **_):
        batches = np.split(indices, range(max_sentences, len(indices), max_sentences))
        short = len(batches[-1]) % required_batch_size_multiple
        return batches[:-1] if drops and short else batches

    monkeypatch.setattr(data_utils, "batch_by_size", batch_by_size)
    with caplog.at_level(logging.WARNING):
        left_out.warn(config(1))
        left_out.warn(config(8, task="span_prediction"))  # it batches its windows itself
        assert not caplog.records
        left_out.warn(config(8))
    assert ["up to 7 sentences" in record.message for record in caplog.records] == [True] * drops


def test_of_this_fairseq():
    """What is said of it is what it does: 17 sentences in batches of 8."""
    batches = data_utils.batch_by_size(
        np.arange(17),
        num_tokens_fn=lambda _: 1,
        num_tokens_vec=np.ones(17, dtype=np.int64),
        max_sentences=8,
        required_batch_size_multiple=8,
    )
    assert left_out.leaves_out_sentences(8) == (sum(map(len, batches)) == 16)
