"""Reduce the ascent's gradients under data parallelism: once, after the last micro-batch.

legacy_ddp reduces on demand, pytorch_ddp in the backward of a forward outside ``no_sync``. An
ascent for some weights only (--sam-only) has no other gradients: pytorch_ddp would wait for them,
legacy_ddp send zeros. This module averages the gradients that exist.
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
    """Decide what the ranks reduce in an ascent, and do it.

    Args:
        trainer: fairseq's; it holds the process group and the data-parallel wrappers.
        sam: its optimizer; --sam-scope rank sends nothing.
        weights: the perturbed weights.
    """

    def __init__(
        self, trainer: Trainer, sam: SharpnessAwareOptimizer, weights: PerturbedWeights
    ) -> None:
        self._trainer = trainer
        self._sam = sam
        self._weights = weights

    @property
    def needed(self) -> bool:
        """Whether the ascent uses the batch of all ranks."""
        return self._trainer.data_parallel_world_size > 1 and not self._sam.per_rank

    @property
    def local_only(self) -> bool:
        """Whether wrappers must not reduce: gradients stay local, or `average_grads` does."""
        return self._sam.per_rank or self._weights.partial

    def no_sync_unless_last(self, last: bool) -> Any:
        """Return a context whose forward and backward reduce gradients only if ``last``."""
        trainer = self._trainer
        if (
            trainer.data_parallel_world_size > 1
            and hasattr(trainer.model, "no_sync")
            and (self.local_only or not last)
        ):
            return trainer.model.no_sync()
        return contextlib.ExitStack()

    def average_grads(self) -> None:
        """Average over ranks the gradients that the backward did not average."""
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
        """Average the criterion's gradients.

        delta-SAM's forward bypasses the criterion's data-parallel wrapper: legacy_ddp still reduces
        on demand, but pytorch_ddp's reduction in the backward is replaced here.
        """
        trainer = self._trainer
        if hasattr(trainer.criterion, "all_reduce_grads") or not self._sam.reweights:
            trainer.optimizer.all_reduce_grads(trainer.criterion)
            return
        world_size = trainer.data_parallel_world_size
        for p in trainer.get_criterion().parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad / world_size
                distributed_utils.all_reduce(p.grad, group=trainer.data_parallel_process_group)
