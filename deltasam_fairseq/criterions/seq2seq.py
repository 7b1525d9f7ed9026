"""Sequence-to-sequence tasks: label-smoothed cross-entropy."""

from dataclasses import dataclass
from typing import Any, Dict, Sequence, Tuple, cast

from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.logging import metrics
from torch import nn

from deltasam_fairseq.criterions.base import RegularisedCriterion, RegularisedLosses
from deltasam_fairseq.criterions.batch import Batch
from deltasam_fairseq.criterions.task_losses import LabelSmoothedTokens


@dataclass
class Seq2SeqConfig(LabelSmoothedCrossEntropyCriterionConfig):
    """Options of fairseq's label_smoothed_cross_entropy."""


class Seq2SeqCriterion(RegularisedCriterion, LabelSmoothedCrossEntropyCriterion):
    """A regulariser on label-smoothed cross-entropy.

    Task loss and regulariser are sums over target tokens, without padding, and fairseq divides
    both by the number of target tokens (--sentence-avg: of sentences).
    """

    def __init__(self, cfg: Seq2SeqConfig, task: Any) -> None:
        super().__init__(
            task,
            cfg.sentence_avg,
            cfg.label_smoothing,
            ignore_prefix_size=cfg.ignore_prefix_size,
            report_accuracy=cfg.report_accuracy,
        )
        self._set_up(cfg)

    def batch(self, model: Any, sample: Dict[str, Any], loss_scale: float) -> Batch:
        if getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None:
            raise ValueError(
                f"{type(self).__name__}: a model with --adaptive-softmax-cutoff has no logits of "
                "the whole vocabulary; train without it"
            )
        objective = LabelSmoothedTokens(
            model.get_targets(sample, None), self.padding_idx, self.eps, self.ignore_prefix_size
        )
        return Batch(model, sample, objective, {}, loss_scale)

    def logging_output(
        self, model: nn.Module, sample: Dict[str, Any], batch: Batch, result: RegularisedLosses
    ) -> Tuple[Any, Dict[str, Any]]:
        objective, scores = cast(LabelSmoothedTokens, batch.objective), result.scores.detach()
        nsentences = sample["target"].size(0)
        sample_size = nsentences if self.sentence_avg else sample["ntokens"]
        log: Dict[str, Any] = {
            "nll_loss": objective.losses_and_nll(scores)[1].sum(),
            "ntokens": sample["ntokens"],
            "nsentences": nsentences,
            "sample_size": sample_size,
        }
        if self.report_accuracy:
            real = ~objective.padding
            log["n_correct"] = (scores.argmax(dim=-1) == objective.targets)[real].sum()
            log["total"] = real.sum()
        return sample_size, log

    @classmethod
    def reduce_metrics(cls, logging_outputs: Sequence[Dict[str, Any]]) -> None:
        """Aggregate the logging outputs of all micro-batches and ranks."""
        super().reduce_metrics(logging_outputs)
        n = sum(log.get("sample_size", 0) for log in logging_outputs)
        for term in cls.regulariser_class.TERMS:
            if any(term in log for log in logging_outputs):
                total = sum(log.get(term, 0) for log in logging_outputs)
                metrics.log_scalar(term, total / n, n, round=6)
