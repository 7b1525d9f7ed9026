"""Sentence-level tasks: classification and regression, with GLUE's metrics."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, Sequence, Tuple

from fairseq.criterions import FairseqCriterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import nn

from deltasam_fairseq.checkpoints.data_record import label_names
from deltasam_fairseq.criterions.base import RegularisedCriterion, RegularisedLosses
from deltasam_fairseq.criterions.batch import Batch
from deltasam_fairseq.criterions.glue_metrics import REPORTS, class_ranks, log_reports
from deltasam_fairseq.criterions.task_losses import Classification, Regression
from deltasam_fairseq.options import require


@dataclass
class SentenceConfig(FairseqDataclass):
    """Options of fairseq's sentence_prediction."""

    classification_head_name: str = field(
        default="sentence_classification_head",
        metadata={"help": "name of the classification head to use"},
    )
    regression_target: bool = field(
        default=False,
        metadata={"help": "the target is a number (STS-B): squared error, and --num-classes 1"},
    )
    report_mcc: bool = field(
        default=False, metadata={"help": "log Matthews correlation in validation, as mcc (CoLA)"}
    )
    report_acc_and_f1: bool = field(
        default=False,
        metadata={"help": "log F1 and its mean with accuracy, as f1 and acc_and_f1 (MRPC, QQP)"},
    )
    report_pearson_and_spearman: bool = field(
        default=False,
        metadata={"help": "log pearson, spearman and their mean pearson_and_spearman (STS-B)"},
    )


def check_number_of_classes(labels: Any, classes: int) -> None:
    """Check --num-classes against fairseq's dictionary of labels.

    Raises:
        UsageError: naming both numbers, the labels, and the remedy.
    """
    known = label_names(labels)
    require(
        classes >= len(known),
        "num-classes",
        classes,
        f"the data has {len(known)} labels ({', '.join(known[:9])}); give --num-classes "
        f"{len(known)}, or --regression-target if they are numbers",
    )


def _check_task(task: Any, regression: bool) -> None:
    """Refuse what would fail in the first forward only, after the data is loaded.

    Raises:
        ValueError: naming the option and the remedy.
    """
    labels = getattr(task, "label_dictionary", None)
    if labels is None:
        raise ValueError(
            f"{type(task).__name__}: this criterion needs sentences with one label each; use "
            "--task sentence_prediction"
        )
    if not regression:
        check_number_of_classes(labels, task.cfg.num_classes)


class SentenceCriterion(RegularisedCriterion, FairseqCriterion):
    """A regulariser on fairseq's sentence_prediction task.

    The log has what fairseq's sentence_prediction has: loss (with the regulariser in training,
    without it in validation), accuracy in percent, weighted by sentences, and the metrics of
    --report-*; and the regulariser's own terms.
    """

    def __init__(self, cfg: SentenceConfig, task: Any) -> None:
        super().__init__(task)
        self._set_up(cfg)
        _check_task(task, cfg.regression_target)
        self.classification_head_name = cfg.classification_head_name
        self.regression_target = cfg.regression_target
        self.reports = [option for option in REPORTS if getattr(cfg, option)]
        if self.reports and not self.regression_target:
            self.ranks = class_ranks(task.label_dictionary, task.cfg.num_classes)

    @classmethod
    def check(cls, cfg: Any) -> None:
        super().check(cfg)
        for option in ("report_mcc", "report_acc_and_f1"):
            if getattr(cfg, option) and cfg.regression_target:
                raise ValueError(
                    f"--{option.replace('_', '-')} with --regression-target: classes are needed; "
                    "use --report-pearson-and-spearman"
                )
        if cfg.report_pearson_and_spearman and not cfg.regression_target:
            raise ValueError(
                "--report-pearson-and-spearman without --regression-target: numbers are needed; "
                "use --report-mcc or --report-acc-and-f1"
            )

    def batch(self, model: Any, sample: Dict[str, Any], loss_scale: float) -> Batch:
        heads = getattr(model, "classification_heads", {})
        if self.classification_head_name not in heads:
            raise ValueError(
                f"--classification-head-name {self.classification_head_name}: the model has no "
                f"such head (it has {', '.join(heads) or 'none'}); use --task sentence_prediction "
                "and a model with classification heads, such as RoBERTa and BART"
            )
        targets = model.get_targets(sample, None).view(-1)
        objective = Regression(targets) if self.regression_target else Classification(targets)
        model_kwargs = {
            "features_only": True,
            "classification_head_name": self.classification_head_name,
        }
        return Batch(model, sample, objective, model_kwargs, loss_scale)

    def logging_output(
        self, model: nn.Module, sample: Dict[str, Any], batch: Batch, result: RegularisedLosses
    ) -> Tuple[int, Dict[str, Any]]:
        targets = batch.objective.targets
        sample_size = targets.numel()
        log: Dict[str, Any] = {
            "ntokens": sample["ntokens"],
            "nsentences": len(result.losses),
            "sample_size": sample_size,
        }
        scores = result.scores.detach()
        predicted = scores.view(-1) if self.regression_target else scores.argmax(dim=1)
        if not self.regression_target:
            log["ncorrect"] = (predicted == targets).sum()
        if self.reports and not model.training:
            log.update(dict.fromkeys(self.reports, True))
            log["classes"] = 2 if self.regression_target else len(self.ranks)
            for key, values in (("pred", predicted.tolist()), ("targ", targets.tolist())):
                log[key] = values if self.regression_target else [self.ranks[i] for i in values]
        return sample_size, log

    @classmethod
    def reduce_metrics(cls, logging_outputs: Sequence[Dict[str, Any]]) -> None:
        """Aggregate the logging outputs of all micro-batches and ranks."""
        present = {key for log in logging_outputs for key in log}
        sums = {
            key: sum(log.get(key, 0) for log in logging_outputs)
            for key in ("loss", "ntokens", "nsentences", "sample_size", "ncorrect")
            + cls.regulariser_class.TERMS
        }
        n, ntokens = sums["sample_size"], sums["ntokens"]
        metrics.log_scalar("loss", sums["loss"] / n / math.log(2), n, round=3)
        if n != ntokens:
            metrics.log_scalar("nll_loss", sums["loss"] / ntokens / math.log(2), ntokens, round=3)
        if "ncorrect" in present:
            percent = 100.0 * sums["ncorrect"] / sums["nsentences"]
            metrics.log_scalar("accuracy", percent, sums["nsentences"], round=1)
        for term in cls.regulariser_class.TERMS:
            if term in present:
                metrics.log_scalar(term, sums[term] / sums["nsentences"], n, round=6)
        log_reports(logging_outputs)

    def logging_outputs_can_be_summed(self) -> bool:
        """Whether they are numbers only: not where predictions are gathered for a metric."""
        return self.training or not self.reports
