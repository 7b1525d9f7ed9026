"""A user's own criterion with per-sentence losses, in the precision of the model throughout."""

import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import (
    SentencePredictionConfig,
    SentencePredictionCriterion,
)


@register_criterion("float64_sentence_prediction", dataclass=SentencePredictionConfig)
class Float64SentencePrediction(SentencePredictionCriterion):
    loss_of_output = True

    def per_sentence_losses(self, model, sample):
        logits, _ = model(
            **sample["net_input"],
            features_only=True,
            classification_head_name=self.classification_head_name,
        )
        targets = model.get_targets(sample, [logits]).view(-1)
        losses = F.cross_entropy(logits, targets, reduction="none")
        n = len(targets)
        log = {"loss": losses.detach().sum(), "nsentences": n, "sample_size": n}
        log["ntokens"] = sample["ntokens"]
        return losses, n, log

    def forward(self, model, sample, reduce=True):
        losses, sample_size, log = self.per_sentence_losses(model, sample)
        return losses.sum(), sample_size, log
