"""Knowledge distillation: a student learns what a trained teacher gives (Hinton et al. 2015).

    L = (1 - lambda) l(f(x), y) + lambda T^2 KL(softmax(t(x) / T) || softmax(f(x) / T))

with l the task's loss, f the student's logits, t those of the teacher, in eval mode and a constant.
In regression the second term is ``lambda (t(x) - f(x))^2``; in sequence-to-sequence tasks it is
summed over the target tokens, teacher and student seeing the same prefix (word-level distillation,
Kim and Rush 2016).
"""

from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Sequence

from fairseq.criterions import register_criterion
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from torch import Tensor, nn

from deltasam_fairseq.criterions.base import RegularisedLosses, Regulariser, Weights, plain_losses
from deltasam_fairseq.criterions.batch import Batch
from deltasam_fairseq.criterions.sentence import SentenceConfig, SentenceCriterion
from deltasam_fairseq.criterions.seq2seq import Seq2SeqConfig, Seq2SeqCriterion
from deltasam_fairseq.criterions.task_losses import ClassObjective, Objective
from deltasam_fairseq.criterions.teacher import Teacher, load_teacher
from deltasam_fairseq.options import option

_PREDICTIONS = "distill_predictions"  # number of them, sentences or tokens
_AGREEMENT = ("distill_teacher_accuracy", "distill_agreement")


@dataclass
class DistillOptions:
    """The options of knowledge distillation."""

    distill_teacher: Optional[str] = field(
        default=None,
        metadata={
            "help": "checkpoint of the teacher, of any architecture and size, with the dictionary "
            "and classes of the data"
        },
    )
    distill_lambda: float = option(
        0.5,
        "share of the soft loss, the teacher's, in the loss; the rest is the task's. 0: the plain "
        "criterion, without a teacher; 1: the teacher alone",
        at_least=0,
        at_most=1,
    )
    distill_temperature: float = option(
        2.0,
        "temperature T that both outputs are softened by, mostly from 1 to 10; without effect in "
        "regression",
        above=0,
        at_most=1000,  # the limit of large T is reached long before
    )


class Distill(Regulariser):
    """``(1 - lambda) l_j + lambda T^2 KL_j``: one forward of the teacher more, without graph."""

    TERMS = ("distill_hard", "distill_soft", "distill_teacher_loss")

    def __init__(self, cfg: Any) -> None:
        self.path: Optional[str] = cfg.distill_teacher
        self.weight: float = cfg.distill_lambda
        self.temperature: float = cfg.distill_temperature
        # None where the model has one output only.
        own_head = getattr(cfg, "classification_head_name", None)
        self.head: Optional[str] = getattr(cfg, "distill_teacher_head", None) or own_head
        self.teacher: Optional[Teacher] = None

    @classmethod
    def check_training(cls, cfg: Any) -> None:
        path = cfg.distill_teacher
        if path is None and cfg.distill_lambda:
            raise ValueError(
                f"--distill-lambda {cfg.distill_lambda:g} without --distill-teacher: give the "
                "checkpoint of a fine-tuned model, or --distill-lambda 0"
            )
        if path is not None and not PathManager.isfile(path):
            raise FileNotFoundError(
                f"--distill-teacher {path} does not exist or is not a file; give the path of a "
                "checkpoint, a full one under fairseq-hydra-train, as seen from every rank"
            )

    def before_training(self, task: Any) -> None:
        if self.weight and self.path is not None:
            # Scores of all target tokens are too large to keep for many micro-batches.
            keep = 1 if self.head is None else None
            self.teacher = Teacher(load_teacher(self.path, task, self.head), self.head, keep)

    def before_update(self, model: nn.Module, weights: Weights, update: int) -> None:
        if self.teacher is not None:
            self.teacher.begin_update()

    def after_update(self, weights: Weights) -> None:
        if self.teacher is not None:
            self.teacher.end_update()

    def __call__(self, batch: Batch, sum_only: bool) -> RegularisedLosses:
        if not self.weight:
            return plain_losses(batch)
        if self.teacher is None:
            raise RuntimeError(
                "--criterion distill: the teacher is loaded by this plugin's trainer, which is not "
                "in place; run fairseq-train with --user-dir deltasam_fairseq"
            )
        objective = batch.objective
        teacher_scores, scores = self.teacher.scores(batch), batch.scores()
        hard = objective.losses(scores)
        soft = objective.distillation_losses(teacher_scores, scores, self.temperature)
        terms = {
            "distill_hard": hard,
            "distill_soft": soft,
            "distill_teacher_loss": objective.losses(teacher_scores),
            **_agreement_counts(objective, teacher_scores, scores),
        }
        return RegularisedLosses((1 - self.weight) * hard + self.weight * soft, scores, terms)


def _agreement_counts(
    objective: Objective, teacher_scores: Tensor, scores: Tensor
) -> Dict[str, Tensor]:
    """Count predictions, those that the teacher has right, and those that both models share."""
    if not isinstance(objective, ClassObjective):
        return {}
    predicted = teacher_scores.argmax(dim=-1)
    return {
        _PREDICTIONS: objective.num_correct(predicted, predicted),
        "distill_teacher_accuracy": objective.num_correct(predicted, objective.targets),
        "distill_agreement": objective.num_correct(predicted, scores.argmax(dim=-1)),
    }


class _AgreementMetrics:
    """Log what `_agreement_counts` counts, in percent of the predictions."""

    @classmethod
    def reduce_metrics(cls, logging_outputs: Sequence[Dict[str, Any]]) -> None:
        """Aggregate the logging outputs of all micro-batches and ranks."""
        super().reduce_metrics(logging_outputs)  # type: ignore[misc]
        if not any(_PREDICTIONS in log for log in logging_outputs):
            return
        n = sum(float(log.get(_PREDICTIONS, 0)) for log in logging_outputs)
        for key in _AGREEMENT:
            equal = sum(float(log.get(key, 0)) for log in logging_outputs)
            metrics.log_scalar(key, 100 * equal / max(n, 1), n, round=1)


@dataclass
class DistillConfig(SentenceConfig, DistillOptions):
    """Knowledge distillation on sentence_prediction."""

    distill_teacher_head: Optional[str] = field(
        default=None,
        metadata={
            "help": "name of the teacher's classification head (default: that of "
            "--classification-head-name)"
        },
    )


@dataclass
class Seq2SeqDistillConfig(Seq2SeqConfig, DistillOptions):
    """Word-level knowledge distillation on label-smoothed cross-entropy."""


@register_criterion("distill", dataclass=DistillConfig)
class DistillCriterion(_AgreementMetrics, SentenceCriterion):
    """Knowledge distillation for classification and regression."""

    regulariser_class = Distill
    config_class = DistillConfig
    loss_of_output = True


@register_criterion("seq2seq_distill", dataclass=Seq2SeqDistillConfig)
class Seq2SeqDistillCriterion(_AgreementMetrics, Seq2SeqCriterion):
    """Knowledge distillation for sequence-to-sequence tasks."""

    regulariser_class = Distill
    config_class = Seq2SeqDistillConfig
    loss_of_output = True
