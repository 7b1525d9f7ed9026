"""The ascent of an update: the gradient at w that the weights climb along.

    SAM         gradient of the batch loss
    delta-SAM   clean losses, losses at the probe, weights of the sentences (Eq. 3 to 6), gradient
                of the weighted loss
    both        reduced over ranks; w -> w + eps*

This module sequences what an ascent consists of, as ``trainer`` does for the update around it.
"""

import contextlib
import math
from typing import Any, Dict, List, Tuple

import torch
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from torch import Tensor

from deltasam_fairseq.algorithms import Reweighting, guardedness, guardedness_sums, reweight
from deltasam_fairseq.criterions import PerSentence, per_sentence_losses
from deltasam_fairseq.optim import SharpnessAwareOptimizer
from deltasam_fairseq.replay import Replay
from deltasam_fairseq.update_log import UpdateLog

# A micro-batch on the device, and whether it is a dummy for one that this rank does not have.
Prepared = Tuple[Dict[str, Any], bool]

# How far the sum of the per-sentence losses may be from the criterion's loss, relative: rounding
# of a sum of many terms in the precision of the model.
_SUM_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Climber:
    """Moves a model to ``w + eps*`` of a batch; all forwards see the same dropout masks.

    Args:
        trainer: fairseq's, of the model, the criterion and the processes.
        sam: its optimizer, out of its precision wrappers.
    """

    def __init__(self, trainer: Trainer, sam: SharpnessAwareOptimizer) -> None:
        self._trainer = trainer
        self._sam = sam
        self._losses_checked = False

    def climb(self, samples: List[Prepared], replay: Replay, loss_scale: float) -> UpdateLog:
        """``w -> w + eps*``, along the reduced gradient of the (reweighted) batch loss at w.

        Args:
            samples: this rank's micro-batches.
            replay: called before every pass over them.
            loss_scale: what ``optimizer.backward`` multiplies the loss by.
        """
        trainer, sam = self._trainer, self._sam
        trainer.model.train()
        trainer.criterion.train()
        trainer.zero_grad()
        scale = loss_scale
        backward = self._delta_sam_backward if sam.beta else self._sam_backward
        log = backward(samples, replay)
        if self._reduces():
            trainer.optimizer.all_reduce_grads(trainer.model)
            if utils.has_parameters(trainer.criterion):
                self._reduce_criterion_grads()
            scale /= trainer.data_parallel_world_size  # what reduces gradients averages them
        ascent = sam.ascend(trainer._trainable(), *self._draw())
        log.ascent_gnorm = ascent.norm * log.weights_divisor / scale
        log.realised = ascent.realised if sam.half_dtype is not None else None
        return log

    def _sam_backward(self, samples: List[Prepared], replay: Replay) -> UpdateLog:
        """Gradient of the batch loss, accumulated as fairseq's train_step does it."""
        trainer, sam = self._trainer, self._sam
        # The criterion's data-parallel wrapper would reduce what is to stay with the rank.
        criterion = trainer.get_criterion() if sam.per_rank else trainer.criterion
        log = UpdateLog(per_rank=sam.per_rank)
        replay()
        for i, (sample, is_dummy) in enumerate(samples):
            with self._unreduced(last=i == len(samples) - 1):
                _, sample_size, logging_output = trainer.task.train_step(
                    sample=sample,
                    model=trainer.model,
                    criterion=criterion,
                    optimizer=trainer.optimizer,
                    update_num=trainer.get_num_updates(),
                    ignore_grad=is_dummy,
                    **self._task_kwargs(),
                )
            log.add(logging_output, sample_size, is_dummy)
        return log

    def _delta_sam_backward(self, samples: List[Prepared], replay: Replay) -> UpdateLog:
        """Gradient of ``sum_j g'_j l_j``.

        With one micro-batch the clean forward of Eq. 3 and the forward of the ascent are the
        same: it runs once, with its graph. With several, the weights of the first depend on the
        last, so the clean losses come from forwards of their own.
        """
        trainer, sam = self._trainer, self._sam
        trainer.model.set_num_updates(trainer.get_num_updates())
        if not self._losses_checked:
            self._check_per_sentence_losses(samples[0][0], replay)
            self._losses_checked = True

        log, done = UpdateLog(per_rank=sam.per_rank), 0
        if len(samples) > 1:
            clean = self._losses(samples, replay)
            reweighting = self._reweight(samples, clean, replay, log)
        replay()
        for i, (sample, is_dummy) in enumerate(samples):
            with self._unreduced(last=i == len(samples) - 1):
                with self._autocast():
                    losses, sample_size, logging_output = self._forward(trainer.model, sample)
                if len(samples) == 1:
                    reweighting = self._reweight(samples, [losses], replay, log)
                if is_dummy:
                    weights = torch.zeros_like(losses)
                else:
                    weights = reweighting.weights[done : done + len(losses)]
                    weights = (weights / log.weights_divisor).to(losses)
                    done += len(losses)
                trainer.optimizer.backward((weights * losses).sum())
            log.add(logging_output, sample_size, is_dummy)
        return log

    def _reweight(
        self, samples: List[Prepared], clean: List[Tensor], replay: Replay, log: UpdateLog
    ) -> Reweighting:
        """Probe (Eq. 3), then the weights of this rank's sentences in the global batch."""
        sam = self._sam
        rises = [torch.zeros_like(losses, dtype=torch.float64) for losses in clean]
        for sign in sam.probe_signs:
            radius = sam.probe(self._trainer._trainable(), *self._draw(), sign)
            try:
                probed = self._losses(samples, replay)
            finally:
                sam.weights.restore()
            for rise, c, p in zip(rises, clean, probed):
                rise += sign * guardedness(c, p) / len(sam.probe_signs)
        real = [rise[: 0 if is_dummy else None] for rise, (_, is_dummy) in zip(rises, samples)]
        a = torch.cat(real) * (sam.rho / radius)
        sums = guardedness_sums(a)
        if self._reduces():
            distributed_utils.all_reduce(sums, group=self._trainer.data_parallel_process_group)
        log.reweighting, log.probe_radius = reweight(a, sums, sam.beta), radius
        if sam.half_dtype is not None:
            # eps* does not depend on the size of the weights, but fp16 gradients overflow by it.
            log.weights_divisor = log.reweighting.r.clamp(min=1)
        return log.reweighting

    def _losses(self, samples: List[Prepared], replay: Replay) -> List[Tensor]:
        """Losses of all sentences, a tensor of shape (B,) a micro-batch, without graph."""
        replay()
        with torch.no_grad(), self._autocast():
            model = self._trainer.get_model()
            return [self._forward(model, sample).losses for sample, _ in samples]

    def _forward(self, model: torch.nn.Module, sample: Dict[str, Any]) -> PerSentence:
        return per_sentence_losses(self._trainer.get_criterion(), model, sample)

    def _check_per_sentence_losses(self, sample: Dict[str, Any], replay: Replay) -> None:
        """Once a run: the per-sentence losses add up to what the criterion itself returns.

        Raises:
            ValueError: naming the criterion and both figures.
        """
        criterion, model = self._trainer.get_criterion(), self._trainer.get_model()
        total = self._losses([(sample, False)], replay)[0].double().sum().item()
        replay()
        with torch.no_grad(), self._autocast():
            stock = float(criterion(model, sample)[0])
        tolerance = _SUM_TOLERANCE.get(next(model.parameters()).dtype, 1e-4)
        if math.isfinite(stock) and abs(total - stock) > tolerance * max(abs(stock), 1.0):
            raise ValueError(
                f"the per-sentence losses of criterion {type(criterion).__name__} add up to "
                f"{total:g}, but its loss is {stock:g}: it has terms that belong to no sentence; "
                "use SAM (--optimizer sam_*), or share them out in per_sentence_losses"
            )

    def _draw(self) -> Tuple[int, int]:
        """What the random numbers of an update depend on."""
        return self._trainer.cfg.common.seed, self._trainer.get_num_updates()

    def _task_kwargs(self) -> Dict[str, Any]:
        trainer = self._trainer
        if trainer.cfg.ema.store_ema and getattr(trainer.task, "uses_ema", False):
            return {"ema_model": trainer.ema.get_model()}
        return {}

    def _autocast(self) -> Any:
        amp = self._trainer.cfg.common.amp
        return torch.autocast("cuda") if amp else contextlib.ExitStack()

    # Data parallelism

    def _reduces(self) -> bool:
        """Whether the ascent is that of the batch of all ranks."""
        return self._trainer.data_parallel_world_size > 1 and not self._sam.per_rank

    def _unreduced(self, last: bool) -> Any:
        """Forward and backward inside leave gradients unreduced, but for those of the last."""
        trainer = self._trainer
        if (
            trainer.data_parallel_world_size > 1
            and hasattr(trainer.model, "no_sync")
            and (self._sam.per_rank or not last)
        ):
            return trainer.model.no_sync()
        return contextlib.ExitStack()

    def _reduce_criterion_grads(self) -> None:
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
