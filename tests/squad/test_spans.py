"""The best span of a window against all spans; the best window of a question, by hand."""

import random

import pytest
import torch
from fairseq.logging import metrics

from deltasam_fairseq.squad import SpanPredictionCriterion
from deltasam_fairseq.squad.predictions import WindowPrediction
from deltasam_fairseq.squad.span_loss import Span
from deltasam_fairseq.squad.spans import Candidate, best_spans, context_mask


def window(**columns):
    return {name: torch.tensor(values) for name, values in columns.items()}


def test_context_mask():
    mask = context_mask(window(begin=[2, 0], stop=[4, 1]), 5)
    assert mask.int().tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("longest", [1, 2, 3, 100])
def test_best_spans_are_the_best_of_all(longest):
    generator = torch.Generator().manual_seed(longest)
    scores = torch.randn(6, 2, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    where = window(
        begin=[3, 2, 1, 4, 3, 2],
        stop=[9, 7, 8, 5, 9, 9],
        own_begin=[3, 3, 1, 4, 8, 2],
        own_stop=[9, 5, 3, 5, 9, 9],
    )
    spans = best_spans(scores, where, longest)
    for i in range(6):
        starts = range(where["own_begin"][i], where["own_stop"][i])
        score, start, end = max(
            (float(scores[i, 0, s] + scores[i, 1, e]), s, e)
            for s in starts
            for e in range(s, min(s + longest, int(where["stop"][i])))
        )
        assert (int(spans.start[i]), int(spans.end[i])) == (start, end)
        assert float(spans.score[i]) == pytest.approx(score)
        assert float(spans.null[i]) == pytest.approx(float(scores[i, :, 0].sum()))


def test_a_window_without_starts_of_its_own_never_wins():
    where = window(begin=[1], stop=[3], own_begin=[1], own_stop=[1])
    assert best_spans(torch.zeros(1, 2, 4), where, 5).score.item() == float("-inf")


def test_loss_by_hand():
    """Allowed are 0, 2, 3 with logits 0: each ln 3; a raised start of ln 2 has p 1/2: (ln 2 + ln
    3) / 2. What is forbidden has no part, however high."""
    allowed = torch.tensor([[True, False, True, True]])
    logits = torch.zeros(1, 4, 2)
    logits[0, 2, 0] = torch.tensor(2.0).log()
    logits[0, 1] = 50.0
    span = Span(torch.tensor([[2, 3]]), allowed)
    scores = span.scores(logits)
    expected = (torch.tensor(2.0).log() + torch.tensor(3.0).log()) / 2
    torch.testing.assert_close(span.losses(scores), expected.view(1))
    assert span.divergence(scores, scores).tolist() == [0.0]
    other = span.scores(torch.zeros(1, 4, 2))
    assert span.divergence(scores, other).item() > 0
    half = span.mean_divergence(scores, other)
    torch.testing.assert_close(2 * half, span.divergence(scores, other))


def test_candidates_of_windows_in_any_order():
    windows = [Candidate(-3.0, -1.0, "a"), Candidate(-2.0, -0.5, "b"), Candidate(-4.0, -6.0, "c")]
    for seed in range(6):
        random.Random(seed).shuffle(windows)
        joined = windows[0].joined(windows[1]).joined(windows[2])
        assert joined == Candidate(-2.0, -6.0, "b") and joined.null_odds == -4


def logged(logs):
    with metrics.aggregate(new_root=True) as agg:
        for batch in logs:
            SpanPredictionCriterion.reduce_metrics([batch])
        return agg.get_smoothed_values()


def prediction(question, score, null, exact, f1, no_answer=0.0, threshold=None):
    return tuple(WindowPrediction(question, score, null, exact, f1, no_answer, threshold))


def log(*windows):
    return {"loss": 1.0, "sample_size": len(windows), "windows": list(windows)}


def test_metrics_by_hand():
    """Question 1: the window of another batch is better, F1 1/2. Question 2: 1. F1 75 %, EM 50."""
    found = logged(
        [
            log(prediction(1, -5.0, -1.0, 1, 1), prediction(2, -1.0, 0.0, 1, 1)),
            log(prediction(1, -2.0, -1.0, 0, 0.5)),
        ]
    )
    assert found["exact_match"] == 50 and found["f1"] == 75


@pytest.mark.parametrize("threshold, expected", [(0.0, 75), (1.5, 25), (-1.5, 50)])
def test_no_answer_by_hand(threshold, expected):
    """Odds of none, the lowest null of all windows against the best span: -1 for question 1 (has an
    answer, found half), +1 for 2 (has none).  Threshold 0: 1/2 and 1.  1.5: both answered, 1/2 and
    0.  -1.5: none for both, 0 and 1."""
    found = logged(
        [
            log(prediction(1, -2.0, -1.0, 0, 0.5, 0.0, threshold)),
            log(prediction(1, -9.0, -3.0, 1, 1, 0.0, threshold)),
            log(prediction(2, -3.0, -2.0, 0, 0, 1.0, threshold)),
        ]
    )
    assert found["f1"] == expected


def test_training_logs_no_metric_of_answers():
    assert set(logged([{"loss": 2.0, "sample_size": 4}])) == {"loss"}
