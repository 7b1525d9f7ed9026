"""NT-Xent of two views of each sentence, in the terms of `deltasam_fairseq.criterions.task_losses`.

    s_ab = cos(e_a, e_b) / tau
    c_a  = -log exp(s_aa') / (exp(s_aa') + sum over b not in {a, a'} of exp(s_ab))
    l_j  = (c_j + c_{j+N}) / 2

with a' the other view of the sentence of a, over the 2N embeddings of the batch. The denominator is
the sum over all b but a, so that c_a is the cross-entropy of ``P_a = softmax_b(s_ab), b != a``.
Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations".
"""

import torch
import torch.nn.functional as F
from fairseq.distributed import utils as distributed_utils
from torch import Tensor

from deltasam_fairseq.criterions.task_losses import ClassObjective, Regression
from deltasam_fairseq.sts.embeddings import gather, pool, ranks

# Logit of a view itself; finite, so that a divergence of two such is 0 and not NaN.
_IMPOSSIBLE = -1e30


class NTXent(ClassObjective):
    """Which of all other views of the batch is of the same sentence?

    Args:
        mask: True where there is a token, shape (2N, T): first views, then second ones.
        pooling: see `pool`.
        temperature: tau, above 0.
        local: whether the views of other ranks are no negatives; else every rank has to compute.

    Under data parallelism: the views of all R ranks are one batch, each rank has the losses of its
    own sentences. Limiting case: one sentence has a loss of 0.
    """

    def __init__(self, mask: Tensor, pooling: str, temperature: float, local: bool) -> None:
        self._mask = mask
        self._pooling = pooling
        self._temperature = temperature
        views = len(mask)
        self._gathers = not local and ranks() > 1
        rank = distributed_utils.get_data_parallel_rank() if self._gathers else 0
        self._own = rank * views + torch.arange(views, device=mask.device)
        self.targets = self._own.roll(views // 2)

    def scores(self, features: Tensor) -> Tensor:
        """``log P_a(b)``, shape (2N, 2N R), of features of shape (2N, T, C); at least float32."""
        with torch.autocast(features.device.type, enabled=False):  # cosines of --amp too
            embeddings = F.normalize(pool(features, self._mask, self._pooling), dim=-1)
            others = gather(embeddings).flatten(0, 1) if self._gathers else embeddings
            logits = embeddings @ others.t() / self._temperature
        itself = F.one_hot(self._own, len(others)).bool()
        return F.log_softmax(logits.masked_fill(itself, _IMPOSSIBLE), dim=-1)

    def losses(self, scores: Tensor) -> Tensor:
        """l_j, shape (N,), in nats."""
        return self.per_sentence(F.nll_loss(scores, self.targets, reduction="none"))

    def per_sentence(self, values: Tensor) -> Tensor:
        """Mean of both views, shape (N,), of shape (2N,)."""
        return values.view(2, -1).mean(dim=0)

    def num_correct(self, predicted: Tensor, expected: Tensor) -> Tensor:
        """How many of the two views find the same, shape (N,), of two of shape (2N,)."""
        return 2 * self.per_sentence(predicted.eq(expected).float())


class Similarity(Regression):
    """Squared error of a pair's cosine, for validation on scored pairs.

    Args:
        targets: scores on a scale of 0 to 1, shape (N,).
        mask: True where there is a token, shape (2N, T): first sentences, then second ones.
        pooling: see `pool`.
    """

    def __init__(self, targets: Tensor, mask: Tensor, pooling: str) -> None:
        super().__init__(targets)
        self._mask = mask
        self._pooling = pooling

    def scores(self, features: Tensor) -> Tensor:
        """Cosines, shape (N, 1), of features of shape (2N, T, C)."""
        first, second = pool(features, self._mask, self._pooling).chunk(2)
        return F.cosine_similarity(first, second, dim=-1).unsqueeze(1)
