"""Contrastive learning of sentence embeddings (Mirror-BERT), plain and with R3F."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, Sequence, Tuple

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from fairseq.logging.meters import safe_round
from torch import nn

from deltasam_fairseq.criterions.base import RegularisedCriterion, RegularisedLosses
from deltasam_fairseq.criterions.batch import Batch
from deltasam_fairseq.criterions.glue_metrics import Predictions, spearman
from deltasam_fairseq.criterions.meters import gather
from deltasam_fairseq.criterions.plain import NoRegulariser
from deltasam_fairseq.criterions.r3f import R3F, R3FOptions
from deltasam_fairseq.options import option
from deltasam_fairseq.sts.nt_xent import NTXent, Similarity

_METER = "_pairs"  # fairseq does not show meters whose name begins with an underscore


@dataclass
class NTXentConfig(FairseqDataclass):
    """The loss of two views of each sentence."""

    temperature: float = option(
        0.04, "temperature tau of NT-Xent. Mirror-BERT, sentences: 0.04", above=0
    )
    local_negatives: bool = field(
        default=False,
        metadata={
            "help": "the negatives of a sentence are those of its own rank's batch. Default: "
            "those of all ranks' batches, gathered with gradients"
        },
    )


@dataclass
class NTXentR3FConfig(NTXentConfig, R3FOptions):
    """R3F on NT-Xent: the noise is on the token embeddings of both views."""


class ContrastiveCriterion(RegularisedCriterion, FairseqCriterion):
    """NT-Xent in training; in validation Spearman's correlation of cosines and scores, in percent.

    The loss of a sentence depends on the other sentences of its batch, its negatives. With
    --update-freq each micro-batch has negatives of its own.
    """

    sentences_are_independent = False
    task_name = "sentence_embedding"

    def __init__(self, cfg: Any, task: Any) -> None:
        super().__init__(task)
        self._set_up(cfg)
        self.temperature: float = cfg.temperature
        self.local_negatives: bool = cfg.local_negatives

    def batch(self, model: Any, sample: Dict[str, Any], loss_scale: float) -> Batch:
        mask = sample["net_input"]["src_tokens"].ne(self.padding_idx)
        pooling = self.task.cfg.pooling
        # In validation a rank without a batch gets one of training: the others would not gather.
        local = self.local_negatives or not model.training
        objective = (
            Similarity(sample["target"], mask, pooling)
            if "target" in sample
            else NTXent(mask, pooling, self.temperature, local)
        )
        return Batch(model, sample, objective, {"features_only": True}, loss_scale)

    def logging_output(
        self, model: nn.Module, sample: Dict[str, Any], batch: Batch, result: RegularisedLosses
    ) -> Tuple[int, Dict[str, Any]]:
        n = len(result.losses)
        log: Dict[str, Any] = {"ntokens": sample["ntokens"], "nsentences": n, "sample_size": n}
        if "target" in sample:
            log["cosines"] = result.scores.detach().view(-1).tolist()
            log["gold"] = sample["gold"]
        return n, log

    @classmethod
    def reduce_metrics(cls, logging_outputs: Sequence[Dict[str, Any]]) -> None:
        """Aggregate the logging outputs of all micro-batches and ranks."""
        n = sum(log.get("sample_size", 0) for log in logging_outputs)
        cosines, gold = (
            [x for log in logging_outputs for x in log.get(key, ())] for key in ("cosines", "gold")
        )
        for key in ("loss", *cls.regulariser_class.TERMS):
            if any(key in log for log in logging_outputs):
                mean = sum(log.get(key, 0) for log in logging_outputs) / n
                bits = key == "loss" and not cosines  # as fairseq's losses; that of pairs is none
                digits = 3 if key == "loss" else 6
                metrics.log_scalar(key, mean / math.log(2) if bits else mean, n, round=digits)
        if cosines:
            gather(Predictions, _METER, cosines, gold)
            metrics.log_derived("spearman", _spearman)

    def logging_outputs_can_be_summed(self) -> bool:
        """Whether they are numbers only: not in validation, where cosines are gathered."""
        return self.training


def _spearman(meters: Any) -> Any:
    pairs = meters[_METER]
    return safe_round(100 * spearman(pairs.predicted, pairs.target), 2)


@register_criterion("nt_xent", dataclass=NTXentConfig)
class NTXentCriterion(ContrastiveCriterion):
    """NT-Xent alone: Mirror-BERT."""

    regulariser_class = NoRegulariser
    config_class = NTXentConfig


@register_criterion("nt_xent_r3f", dataclass=NTXentR3FConfig)
class NTXentR3FCriterion(ContrastiveCriterion):
    """NT-Xent and R3F: ``l_j + lambda (KL(P || Q) + KL(Q || P))``, Q from noised embeddings."""

    regulariser_class = R3F
    config_class = NTXentR3FConfig
