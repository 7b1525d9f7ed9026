"""Sentences taken out of a mini-batch: the mini-batch that fairseq would make of them alone."""

import copy

import pytest
import torch

from deltasam_fairseq.algorithms import SENTENCES, update_generator
from deltasam_fairseq.trainer.subsampling import (
    draw_sentences,
    kept_count,
    most_unguarded,
    number_of_sentences,
    take_sentences,
)
from tests.helpers import tiny

PAD = 1
CRITERIONS = ["sentence_prediction", "masked_lm", "sentence_ranking", "cross_entropy"]


@pytest.mark.parametrize(
    "n, fraction, kept",
    [(8, 0.25, 2), (9, 0.25, 3), (30, 0.1, 3), (8, 1.0, 8), (1, 0.25, 1), (5, 1e-9, 1)],
)
def test_count_is_rounded_up(n, fraction, kept):
    assert kept_count(n, fraction) == kept


def trainer_for(data_of, tmp_path, criterion, *more):
    return tiny.build_trainer(
        tiny.arguments(data_of[criterion], tmp_path, *more, criterion=criterion)
    )


@pytest.mark.parametrize("criterion", CRITERIONS)
@pytest.mark.parametrize("items", [(0, 3), (1, 2, 4, 7), (5,), tuple(range(8))])
def test_is_what_fairseq_makes_of_these_sentences_alone(data_of, tmp_path, criterion, items):
    """All entries, shapes and counts: padding on the right, and of translation's source on the
    left; masks of masked_lm; two inputs in sentence_ranking."""
    trainer = trainer_for(data_of, tmp_path, criterion)
    dataset = trainer.task.dataset("train")
    whole = dataset.collater([dataset[i] for i in range(8)])
    alone = dataset.collater([dataset[i] for i in items])
    kept = torch.tensor([i for i, number in enumerate(whole["id"].tolist()) if number in items])
    before = copy.deepcopy(whole)
    part = take_sentences(whole, kept, PAD)
    torch.testing.assert_close(part, dict(alone), rtol=0, atol=0)
    torch.testing.assert_close(whole, before, rtol=0, atol=0)


def test_padding_goes_from_both_ends_and_only_there():
    """Columns 0 and 4 are padding for both sentences that stay; column 2 is so in the middle."""
    tokens = torch.tensor([[1, 5, 1, 6, 1], [1, 7, 1, 8, 1], [4, 4, 4, 4, 4]])
    sample = {"nsentences": 3, "ntokens": 9, "net_input": {"src_tokens": tokens}}
    part = take_sentences(sample, torch.tensor([0, 1]), PAD)
    assert part["net_input"]["src_tokens"].tolist() == [[5, 1, 6], [7, 1, 8]]
    assert (part["nsentences"], part["ntokens"]) == (2, 4)


@pytest.mark.parametrize(
    "beside",
    [torch.tensor([[3, 3, 0], [3, 3, 0], [3, 3, 3]]), torch.ones(3, 3), torch.ones(3, 3, 2)],
    ids=["other numbers", "numbers with a point", "three dimensions"],
)
def test_padding_stays_where_something_else_has_these_columns(beside):
    """Otherwise columns would no longer belong together."""
    tokens = torch.tensor([[5, 6, 1], [7, 8, 1], [4, 4, 4]])
    sample = {"nsentences": 3, "net_input": {"src_tokens": tokens, "beside": beside}}
    part = take_sentences(sample, torch.tensor([0, 1]), PAD)
    assert part["net_input"]["src_tokens"].tolist() == [[5, 6, 1], [7, 8, 1]]
    assert torch.equal(part["net_input"]["beside"], beside[:2])


def test_labels_that_look_like_padding_stay():
    sample = {
        "target": torch.tensor([[1], [1], [0]]),
        "net_input": {"src_tokens": torch.tensor([[5, 6], [7, 1], [8, 8]])},
    }
    part = take_sentences(sample, torch.tensor([0, 1]), PAD)
    assert part["target"].tolist() == [[1], [1]]


def test_lists_arrays_and_what_has_no_sentences():
    sample = {
        "nsentences": 3,
        "names": ["a", "b", "c"],
        "two": [torch.arange(3), torch.arange(3) + 10],
        "rows": torch.arange(3).numpy(),
        "scale": torch.tensor(2.0),
        "nothing": None,
        "ntokens": 9,
    }
    part = take_sentences(sample, torch.tensor([0, 2]), PAD)
    assert part["names"] == ["a", "c"] and part["rows"].tolist() == [0, 2]
    assert [t.tolist() for t in part["two"]] == [[0, 2], [10, 12]]
    assert part["scale"] == 2 and part["nothing"] is None
    assert part["ntokens"] == 6  # not to be counted: the share of the sentences


def test_a_list_of_tensors_that_is_as_long_as_the_batch():
    """Two layers of a teacher for two sentences: cut inside, as for any other number of them."""
    sample = {"nsentences": 2, "layers": [torch.tensor([1, 2]), torch.tensor([3, 4])]}
    part = take_sentences(sample, torch.tensor([1]), PAD)
    assert [layer.tolist() for layer in part["layers"]] == [[2], [4]]
    sample["layers"] = [torch.tensor([1, 2, 3]), torch.tensor([4])]  # a tensor a sentence
    part = take_sentences(sample, torch.tensor([1]), PAD)
    assert [layer.tolist() for layer in part["layers"]] == [[4]]


@pytest.mark.parametrize(
    "rows, multiple, expected",
    [
        ([[5, 6, 7, 1, 1, 1, 1, 1], [4] * 8], 4, [5, 6, 7, 1]),
        ([[1, 1, 1, 1, 1, 5, 6, 7], [4] * 8], 4, [1, 5, 6, 7]),  # padded on the left
        ([[5, 6, 7, 8, 9, 1, 1, 1], [4] * 8], 4, [5, 6, 7, 8, 9, 1, 1, 1]),
        ([[5, 6, 7, 1, 1], [4] * 5], 4, [5, 6, 7, 1]),
    ],
)
def test_lengths_stay_a_multiple(rows, multiple, expected):
    sample = {"nsentences": 2, "net_input": {"src_tokens": torch.tensor(rows)}}
    part = take_sentences(sample, torch.tensor([0]), PAD, multiple)
    assert part["net_input"]["src_tokens"].tolist() == [expected]


def test_rows_that_belong_to_no_sentence_are_refused():
    sample = {"nsentences": 3, "net_input": {"alignments": torch.zeros(7, 2)}}
    message = r"--sam-ascent-fraction: sample.net_input.alignments has shape \(7, 2\).*fraction 1"
    with pytest.raises(ValueError, match=message):
        take_sentences(sample, torch.tensor([0]), PAD)


def test_mini_batch_of_unknown_size_is_refused():
    assert number_of_sentences({"target": torch.zeros(4, 1)}) == 4
    with pytest.raises(ValueError, match="--sam-ascent-fraction.*do not give their number"):
        number_of_sentences({"aa-bb": {"nsentences": 3}})


def test_draw_is_that_of_seed_update_and_rank():
    def draw(seed, update, rank=0):
        generator = update_generator(seed, update, SENTENCES, torch.device("cpu"), rank)
        return draw_sentences(100, 0.2, generator).tolist()

    found = draw(3, 5)
    assert found == draw(3, 5) == sorted(set(found)) and len(found) == 20
    others = [draw(4, 5), draw(3, 6), draw(3, 5, 1), draw(3, 5, 2)]
    assert all(other != found for other in others)


def test_every_sentence_is_drawn_as_often():
    """2 of 8, 4000 times: 1000 each, standard deviation sqrt(4000 / 4 * 3 / 4) = 27."""
    generator = update_generator(0, 0, SENTENCES, torch.device("cpu"))
    counts = torch.zeros(8)
    for _ in range(4000):
        counts[draw_sentences(8, 0.25, generator)] += 1
    assert counts.sum() == 8000 and (counts - 1000).abs().max() < 5 * 27


def test_most_unguarded_are_those_of_the_largest_weight():
    weights = torch.tensor([0.1, 2.0, -1.0, 3.0, 0.5])
    assert most_unguarded(weights, 0.4).tolist() == [1, 3]
    assert most_unguarded(weights, 0.5).tolist() == [1, 3, 4]
    assert most_unguarded(torch.ones(5), 0.4).tolist() == [0, 1]  # uniform: the first
