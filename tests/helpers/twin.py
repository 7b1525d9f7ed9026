"""Plain twins of the papers' updates, in float64 on a flat vector, and trainers to compare with."""

import math

import torch
from torch.nn.utils import parameters_to_vector

from deltasam_fairseq.algorithms import draw_direction_, probe_generator
from deltasam_fairseq.algorithms.reference import (
    asam_reference,
    delta_sam_reference,
    gradient,
    rw_sam_reference,
    sam_reference,
)
from tests.helpers import tiny
from tests.helpers.float64_criterion import Float64SentencePrediction  # noqa: F401

try:
    from torch.func import functional_call
except ImportError:  # torch < 2.0
    from torch.nn.utils.stateless import functional_call

RHO, BETA, ETA, LAMBDA, SEED = 0.05, 3.0, 0.01, 2.0, 3
FLOAT64 = ["--criterion", "float64_sentence_prediction"]
NO_DROPOUT = ["--dropout", "0", "--attention-dropout", "0"]


def trainer_of(data, tmp_path, optimizer, *more):
    argv = tiny.arguments(data, tmp_path, "--optimizer", optimizer, *FLOAT64, *NO_DROPOUT, *more)
    return tiny.build_trainer(argv, dtype=torch.float64)


class Twin:
    """Adam of fairseq and the ascents of the papers, on a flat float64 vector.

    Nothing in it is shared with the package but the drawing of u and the reference equations.
    """

    def __init__(self, trainer, ascent, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.model, self.ascent = trainer.get_model(), ascent
        self.named = list(self.model.named_parameters())
        self.w = parameters_to_vector([p for _, p in self.named]).detach().clone()
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.lr, self.betas, self.eps, self.updates = lr, betas, eps, 0

    def unflatten(self, w):
        pieces = w.split([p.numel() for _, p in self.named])
        return {name: x.view_as(p) for (name, p), x in zip(self.named, pieces)}

    def losses(self, samples):
        def of(w):
            found = []
            for sample in samples:
                kwargs = dict(
                    sample["net_input"],
                    features_only=True,
                    classification_head_name="sentence_classification_head",
                )
                logits = functional_call(self.model, self.unflatten(w), (), kwargs)[0]
                chosen = logits.gather(1, sample["target"].view(-1, 1)).squeeze(1)
                found.append(logits.logsumexp(1) - chosen)
            return torch.cat(found)

        return of

    def direction(self):
        u = [torch.empty_like(p) for _, p in self.named]
        draw_direction_(u, probe_generator(SEED, self.updates, torch.device("cpu")))
        return torch.cat([x.flatten() for x in u])

    def eps_star(self, losses):
        if self.ascent == "sam":
            return sam_reference(losses, self.w, RHO)
        if self.ascent == "asam":
            return asam_reference(losses, self.w, RHO, ETA)
        if self.ascent == "rw_sam":
            return rw_sam_reference(losses, self.w, self.direction().sign(), RHO, LAMBDA)
        return delta_sam_reference(losses, self.w, self.direction(), RHO, BETA).eps

    def gradient(self, samples):
        """That of the step, at w + eps*."""
        losses = self.losses(samples)
        n = len(losses(self.w))
        uniform = torch.full((n,), 1.0 / n, dtype=torch.float64)
        return gradient(losses, self.w + self.eps_star(losses), uniform)

    def step(self, samples):
        g = self.gradient(samples)
        self.updates += 1
        (b1, b2), t = self.betas, self.updates
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        size = self.lr * math.sqrt(1 - b2**t) / (1 - b1**t)
        self.w = self.w - size * self.m / (self.v.sqrt() + self.eps)
