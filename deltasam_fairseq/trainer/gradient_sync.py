"""Gradients of the ascent under data parallelism: kept back until the last, then averaged.

legacy_ddp reduces on demand, pytorch_ddp in the backward that follows a forward outside of
``no_sync``. Neither serves an ascent from some weights only, whose other gradients do not exist:
pytorch_ddp would wait for them, legacy_ddp send zeros. Those of the few are averaged here.
"""

import contextlib
from typing import Any

import torch
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer

from deltasam_fairseq.optim import SharpnessAwareOptimizer
from deltasam_fairseq.trainer.perturbed_weights import PerturbedWeights


class GradientSync:
    """What is sent between ranks for an ascent.

    Args:
        trainer: fairseq's, of the processes and their wrappers.
        sam: its optimizer; --sam-scope rank sends nothing.
        weights: those that are perturbed.
    """

    def __init__(
        self, trainer: Trainer, sam: SharpnessAwareOptimizer, weights: PerturbedWeights
    ) -> None:
        self._trainer = trainer
        self._sam = sam
        self._weights = weights

    @property
    def needed(self) -> bool:
        """Whether the ascent is that of the batch of all ranks."""
        return self._trainer.data_parallel_world_size > 1 and not self._sam.per_rank

    @property
    def local_only(self) -> bool:
        """Whether no wrapper may reduce: gradients stay with the rank, or are averaged here."""
        return self._sam.per_rank or self._weights.partial

    def no_sync_unless_last(self, last: bool) -> Any:
        """Forward and backward inside leave gradients unreduced, but for those of the last."""
        trainer = self._trainer
        if (
            trainer.data_parallel_world_size > 1
            and hasattr(trainer.model, "no_sync")
            and (self.local_only or not last)
        ):
            return trainer.model.no_sync()
        return contextlib.ExitStack()

    def average_grads(self) -> None:
        """Average over ranks what the backward has not averaged."""
        trainer = self._trainer
        if self._weights.partial:
            self._weights.average_grads(
                trainer.data_parallel_world_size, trainer.data_parallel_process_group
            )
            return
        trainer.optimizer.all_reduce_grads(trainer.model)
        if utils.has_parameters(trainer.criterion):
            self._average_criterion_grads()

    def _average_criterion_grads(self) -> None:
        """delta-SAM's forward does not go through the criterion's data-parallel wrapper.

        legacy_ddp reduces on demand; what pytorch_ddp does in the backward is done here.
        """
        trainer = self._trainer
        if hasattr(trainer.criterion, "all_reduce_grads") or not self._sam.beta:
            trainer.optimizer.all_reduce_grads(trainer.criterion)
            return
        world_size = trainer.data_parallel_world_size
        for p in trainer.get_criterion().parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad / world_size
                distributed_utils.all_reduce(p.grad, group=trainer.data_parallel_process_group)
