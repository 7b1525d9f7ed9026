"""Exact match and F1 over all questions of a validation, of predictions of their windows.

Apart from metrics.py, which is SQuAD's arithmetic alone: this needs fairseq's meters.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from fairseq.logging import metrics
from fairseq.logging.meters import safe_round

from deltasam_fairseq.criterions.meters import GatheringMeter, gather
from deltasam_fairseq.squad.spans import Candidate

_METER = "_questions"  # fairseq does not show meters whose name begins with an underscore


class WindowPrediction(NamedTuple):
    """What one window says of its question, and what that is worth; plain numbers.

    Attributes:
        question: its number.
        score, null: log-probabilities of the best span and of "no answer".
        exact, f1: of the best span, 0 to 1.
        no_answer: exact match, and F1, of "no answer".
        threshold: of the odds of "no answer"; None where every question has an answer.
    """

    question: int
    score: float
    null: float
    exact: float
    f1: float
    no_answer: float
    threshold: Optional[float]


class Windows(List[Tuple[Any, ...]]):
    """`WindowPrediction`s of a batch, of which fairseq-validate shows in its log how many."""

    def __str__(self) -> str:
        return str(len(self))


class Questions(GatheringMeter):
    """Gathers windows by question until the metric is asked for."""

    def reset(self) -> None:
        self.candidates: Dict[int, Candidate] = {}

    def update(self, windows: Sequence[WindowPrediction]) -> None:
        for window in windows:
            new = Candidate(window.score, window.null, window)
            old = self.candidates.get(window.question)
            self.candidates[window.question] = new if old is None else old.joined(new)

    def __len__(self) -> int:
        return len(self.candidates)

    def mean(self, metric: str) -> float:
        """Mean over questions, 0 to 1.

        Args:
            metric: ``exact`` or ``f1``.
        """
        values: List[float] = []
        for candidate in self.candidates.values():
            window: WindowPrediction = candidate.answer
            empty = window.threshold is not None and candidate.null_odds > window.threshold
            values.append(window.no_answer if empty else getattr(window, metric))
        return sum(values) / len(values)


def log_answers(logging_outputs: Sequence[Dict[str, Any]]) -> None:
    """Log exact_match and f1, in percent.

    Args:
        logging_outputs: with ``windows``, lists of `WindowPrediction`.
    """
    windows = [WindowPrediction(*w) for log in logging_outputs for w in log.get("windows", ())]
    if not windows:
        return
    gather(Questions, _METER, windows)
    for name, metric in (("exact_match", "exact"), ("f1", "f1")):
        metrics.log_derived(
            name, lambda meters, m=metric: safe_round(100 * meters[_METER].mean(m), 2)
        )
