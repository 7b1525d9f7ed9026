"""A criterion with a parameter of its own: a learnt temperature."""

import torch
import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import (
    SentencePredictionConfig,
    SentencePredictionCriterion,
)


@register_criterion("parameter_criterion", dataclass=SentencePredictionConfig)
class ParameterCriterion(SentencePredictionCriterion):
    def __init__(self, cfg, task):
        super().__init__(cfg, task)
        self.temperature = torch.nn.Parameter(torch.tensor([1.5]))

    def per_sentence_losses(self, model, sample):
        logits, _ = model(
            **sample["net_input"],
            features_only=True,
            classification_head_name=self.classification_head_name,
        )
        targets = model.get_targets(sample, [logits]).view(-1)
        losses = F.cross_entropy(logits / self.temperature, targets, reduction="none")
        n = len(targets)
        log = {"loss": losses.detach().sum(), "nsentences": n, "sample_size": n}
        log["ntokens"] = sample["ntokens"]
        return losses, n, log

    def forward(self, model, sample, reduce=True):
        losses, sample_size, log = self.per_sentence_losses(model, sample)
        return losses.sum(), sample_size, log
