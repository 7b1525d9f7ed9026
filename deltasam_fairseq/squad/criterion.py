"""Extractive question answering: the span of a context that answers a question (SQuAD)."""

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor, nn

from deltasam_fairseq.criterions.base import RegularisedCriterion, RegularisedLosses
from deltasam_fairseq.criterions.batch import Batch
from deltasam_fairseq.criterions.plain import NoRegulariser
from deltasam_fairseq.options import option
from deltasam_fairseq.squad.metrics import score_answer
from deltasam_fairseq.squad.predictions import WindowPrediction, Windows, log_answers
from deltasam_fairseq.squad.span_loss import Span
from deltasam_fairseq.squad.spans import Spans, best_spans, context_mask


@dataclass
class SpanConfig(FairseqDataclass):
    """How answers are read off the scores."""

    max_answer_length: int = option(30, "longest answer, in tokens; BERT takes 30", at_least=1)
    null_threshold: float = option(
        0.0,
        "log-odds of 'no answer' against the best span above which the answer is that there is "
        "none; only for data with such questions (SQuAD 2.0)",
    )


@register_criterion("span_prediction", dataclass=SpanConfig)
class SpanPredictionCriterion(RegularisedCriterion, FairseqCriterion):
    """Cross-entropy of start and end over the tokens of the context and <s>, which is "none".

    A sentence of delta-SAM is a window here. In validation the best spans of all windows of a
    question, on whatever batches and ranks, are compared, and the answers' exact match and F1
    logged, in percent.
    """

    regulariser_class = NoRegulariser
    config_class = SpanConfig
    loss_of_output = True
    task_name = "span_prediction"

    def __init__(self, cfg: SpanConfig, task: Any) -> None:
        super().__init__(task)
        self._set_up(cfg)
        self.max_answer_length: int = cfg.max_answer_length
        self.null_threshold: float = cfg.null_threshold

    def batch(self, model: Any, sample: Dict[str, Any], loss_scale: float) -> Batch:
        targets = sample["target"]
        length = sample["net_input"]["src_tokens"].size(1)
        allowed = context_mask(sample["window"], length)
        allowed[:, 0] = True
        model_kwargs = {"features_only": True, "classification_head_name": self.task.head_name}
        return Batch(model, sample, Span(targets, allowed), model_kwargs, loss_scale)

    def logging_output(
        self, model: nn.Module, sample: Dict[str, Any], batch: Batch, result: RegularisedLosses
    ) -> Tuple[int, Dict[str, Any]]:
        n = len(result.losses)
        log: Dict[str, Any] = {"ntokens": sample["ntokens"], "nsentences": n, "sample_size": n}
        if not model.training:
            log["windows"] = self._score_windows(sample, self.spans(result.scores, sample))
        return n, log

    def spans(self, scores: Tensor, sample: Dict[str, Any]) -> Spans:
        """The best span of every window, of log-probabilities of shape (B, 2, T)."""
        return best_spans(scores.detach(), sample["window"], self.max_answer_length)

    def _score_windows(self, sample: Dict[str, Any], spans: Spans) -> Windows:
        found = Windows()
        for number, text, score, null in self.answers(sample, spans):
            question = self.task.questions[number]
            golds, version_2 = question.answers, question.version_2
            exact, f1 = score_answer(text, golds, version_2)
            nothing = score_answer("", golds, version_2)[0] if version_2 else 0.0
            threshold = self.null_threshold if version_2 else None
            found.append(
                tuple(WindowPrediction(number, score, null, exact, f1, nothing, threshold))
            )
        return found

    def answers(self, sample: Dict[str, Any], spans: Spans) -> List[Tuple[int, str, float, float]]:
        """Number of the question, text of the best span, its score, score of "none", by window."""
        window = sample["window"]
        shift = window["first"] - window["begin"]  # from positions to tokens of the context
        columns = (window["question"], spans.start + shift, spans.end + shift)
        rows = torch.stack(columns, dim=1).tolist()
        scores = zip(spans.score.tolist(), spans.null.tolist())
        return [
            (number, self.task.questions[number].text(first, last), score, null)
            for (number, first, last), (score, null) in zip(rows, scores)
        ]

    @classmethod
    def reduce_metrics(cls, logging_outputs: Sequence[Dict[str, Any]]) -> None:
        """Aggregate the logging outputs of all micro-batches and ranks."""
        loss, n = (
            sum(log.get(key, 0) for log in logging_outputs) for key in ("loss", "sample_size")
        )
        metrics.log_scalar("loss", loss / n / math.log(2), n, round=3)
        log_answers(logging_outputs)

    def logging_outputs_can_be_summed(self) -> bool:
        """Whether they are numbers only: not in validation, where answers are gathered."""
        return self.training
