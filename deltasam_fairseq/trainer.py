"""The seam into fairseq: an ascent before fairseq's own train step.

    ascent, here            gradient of the (reweighted) batch loss at w, over all micro-batches
                            of all ranks; w -> w + eps*
    fairseq's train_step    forward, backward, reduce, clip, checks, all at w + eps*
    optimizer.step          w + eps* -> w, then the base optimizer's step

Loss scaling, clipping, overflow and NaN handling, EMA of the descent are fairseq's own. This
module sequences; the mathematics is in ``algorithms``, the weights move in ``optim``, the losses
come from ``criterions``.
"""

import contextlib
import logging
import math
import os
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.algorithms import Reweighting, guardedness, guardedness_sums, reweight
from deltasam_fairseq.criterions import (
    PerSentence,
    RegularisedCriterion,
    per_sentence_losses,
)
from deltasam_fairseq.optim import SharpnessAwareOptimizer, masters_of, sharpness_aware
from deltasam_fairseq.replay import Replay
from deltasam_fairseq.run_state import load_run_state, run_state
from deltasam_fairseq.update_log import UpdateLog

logger = logging.getLogger(__name__)

# A micro-batch on the device, and whether it is a dummy for one that this rank does not have.
Prepared = Tuple[Dict[str, Any], bool]

# How far the sum of the per-sentence losses may be from the criterion's loss, relative: rounding
# of a sum of many terms in the precision of the model.
_SUM_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


class SharpnessAwareTrainer(Trainer):
    """fairseq's Trainer, which climbs before it steps if the optimizer is sharpness-aware.

    With any other optimizer an update is fairseq's, untouched; the criterion is told of it if it
    is one of this package's. Under data parallelism the ascent adds one gradient reduction,
    delta-SAM one all-reduce of four float64 numbers; every rank computes the same perturbation.
    All forwards of an update see the same dropout masks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._update_log: Optional[UpdateLog] = None
        self._losses_checked = False
        self._ran_out_of_memory = False
        self._last_update = 0
        criterion = self.get_criterion()
        if isinstance(criterion, RegularisedCriterion):
            criterion.before_training()

    def _build_optimizer(self) -> None:
        super()._build_optimizer()
        modules = (self.get_model(), self.get_criterion())
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self._trained = list(dict.fromkeys(parameters))
        sam = sharpness_aware(self._optimizer)
        if sam is not None:
            sam.compute_in(self._compute_dtype(), masters_of(self._optimizer))
            logger.info(sam.describe())

    @metrics.aggregate("train")
    def train_step(self, samples: List[Any], raise_oom: bool = False) -> Any:
        """One update; the arguments and the result are fairseq's."""
        sam, criterion = sharpness_aware(self.optimizer), self.get_criterion()
        if not isinstance(criterion, RegularisedCriterion):
            return self._update(sam, samples, raise_oom)
        self._last_update = self.get_num_updates()
        scale = self._loss_scale() if criterion.regulariser.INNER_BACKWARD else 1.0
        criterion.before_update(self.get_model(), self._float32_weights, self._last_update, scale)
        stats = self._update(sam, samples, raise_oom)
        if self.get_num_updates() > self._last_update:  # once, also where fairseq re-enters here
            self._last_update = self.get_num_updates()
            criterion.after_update(self._float32_weights)
        return stats

    def _update(
        self, sam: Optional[SharpnessAwareOptimizer], samples: List[Any], raise_oom: bool
    ) -> Any:
        """fairseq's train_step, after an ascent if the optimizer is sharpness-aware."""
        if sam is None:
            return self._fairseqs_step(samples, raise_oom)
        sam.restore()  # fairseq re-enters here for an AMP retry, with the weights still perturbed
        if not sam.active(self.get_num_updates()):
            sam.skip_ascent()
            return self._fairseqs_step(samples, raise_oom)

        prepared = [self._prepare_sample(sample) for sample in samples]
        replay = Replay(
            self._set_seed,
            host=not self._loads_data_in_a_thread(),
            buffers=[*self.get_model().buffers(), *self.get_criterion().buffers()],
        )
        try:
            metrics.log_start_time("train_wall", priority=800, round=0)
            climbed = self._try_to_climb(sam, prepared, replay, raise_oom)
            metrics.log_stop_time("train_wall")
            if not climbed:
                return None
            replay()
            # What is on the device already passes through fairseq's preparation as it is; a
            # missing micro-batch has to arrive missing to be recognised as a dummy.
            ready = [raw if dummy else on for raw, (on, dummy) in zip(samples, prepared)]
            return self._descend(ready, raise_oom)
        finally:
            sam.restore()
            self._update_log = None

    def _descend(self, samples: List[Any], raise_oom: bool) -> Any:
        """fairseq's own train_step, counting the updates that it skips for an overflow."""
        updates, log = self.get_num_updates(), self._update_log
        self._ran_out_of_memory = False
        stats = self._fairseqs_step(samples, raise_oom)
        scales = getattr(self.optimizer, "scaler", None) is not None
        skipped = stats is None and self.get_num_updates() == updates
        if skipped and scales and not self._ran_out_of_memory:
            where = "descent" if log is not None and torch.isfinite(log.ascent_gnorm) else "ascent"
            metrics.log_scalar_sum(f"sam_overflows_{where}", 1, priority=701, round=0)
        return stats

    def _fairseqs_step(self, samples: List[Any], raise_oom: bool) -> Any:
        """fairseq's own train_step, which on a CPU too skips an update that overflows."""
        try:
            return super().train_step(samples, raise_oom)
        except (AssertionError, RuntimeError) as e:
            # Handling an overflow, fairseq puts a number on the GPU that a CPU run has not.
            if self.cuda or not isinstance(e.__context__, OverflowError):
                raise
            self.zero_grad()
            metrics.log_scalar("loss_scale", self._loss_scale(), priority=700, round=4, weight=0)
            metrics.log_stop_time("train_wall")
            return None

    def _log_oom(self, exc: Any) -> None:
        self._ran_out_of_memory = True
        super()._log_oom(exc)

    # The ascent

    def _climb(
        self, sam: SharpnessAwareOptimizer, samples: List[Prepared], replay: Replay
    ) -> UpdateLog:
        """``w -> w + eps*``, along the reduced gradient of the (reweighted) batch loss at w."""
        self.model.train()
        self.criterion.train()
        self.zero_grad()
        scale = self._loss_scale()
        if sam.beta:
            log = self._delta_sam_backward(sam, samples, replay)
        else:
            log = self._sam_backward(sam, samples, replay)
        if self._reduces(sam):
            self.optimizer.all_reduce_grads(self.model)
            if utils.has_parameters(self.criterion):
                self._reduce_criterion_grads(sam)
            scale /= self.data_parallel_world_size  # what reduces gradients averages them
        ascent = sam.ascend(self._trainable(), *self._draw())
        log.ascent_gnorm = ascent.norm * log.weights_divisor / scale
        log.realised = ascent.realised if sam.half_dtype is not None else None
        return log

    def _sam_backward(
        self, sam: SharpnessAwareOptimizer, samples: List[Prepared], replay: Replay
    ) -> UpdateLog:
        """Gradient of the batch loss, accumulated as fairseq's train_step does it."""
        # The criterion's data-parallel wrapper would reduce what is to stay with the rank.
        criterion = self.get_criterion() if sam.per_rank else self.criterion
        log = UpdateLog(per_rank=sam.per_rank)
        replay()
        for i, (sample, is_dummy) in enumerate(samples):
            with self._unreduced(sam, last=i == len(samples) - 1):
                _, sample_size, logging_output = self.task.train_step(
                    sample=sample,
                    model=self.model,
                    criterion=criterion,
                    optimizer=self.optimizer,
                    update_num=self.get_num_updates(),
                    ignore_grad=is_dummy,
                    **self._task_kwargs(),
                )
            log.add(logging_output, sample_size, is_dummy)
        return log

    def _delta_sam_backward(
        self, sam: SharpnessAwareOptimizer, samples: List[Prepared], replay: Replay
    ) -> UpdateLog:
        """Gradient of ``sum_j g'_j l_j``.

        With one micro-batch the clean forward of Eq. 3 and the forward of the ascent are the
        same: it runs once, with its graph. With several, the weights of the first depend on the
        last, so the clean losses come from forwards of their own.
        """
        self.model.set_num_updates(self.get_num_updates())
        if not self._losses_checked:
            self._check_per_sentence_losses(samples[0][0], replay)
            self._losses_checked = True

        log, done = UpdateLog(per_rank=sam.per_rank), 0
        if len(samples) > 1:
            clean = self._losses(samples, replay)
            reweighting = self._reweight(sam, samples, clean, replay, log)
        replay()
        for i, (sample, is_dummy) in enumerate(samples):
            with self._unreduced(sam, last=i == len(samples) - 1):
                with self._autocast():
                    losses, sample_size, logging_output = self._forward(self.model, sample)
                if len(samples) == 1:
                    reweighting = self._reweight(sam, samples, [losses], replay, log)
                if is_dummy:
                    weights = torch.zeros_like(losses)
                else:
                    weights = reweighting.weights[done : done + len(losses)]
                    weights = (weights / log.weights_divisor).to(losses)
                    done += len(losses)
                self.optimizer.backward((weights * losses).sum())
            log.add(logging_output, sample_size, is_dummy)
        return log

    def _reweight(
        self,
        sam: SharpnessAwareOptimizer,
        samples: List[Prepared],
        clean: List[Tensor],
        replay: Replay,
        log: UpdateLog,
    ) -> Reweighting:
        """Probe (Eq. 3), then the weights of this rank's sentences in the global batch."""
        rises = [torch.zeros_like(losses, dtype=torch.float64) for losses in clean]
        for sign in sam.probe_signs:
            radius = sam.probe(self._trainable(), *self._draw(), sign)
            try:
                probed = self._losses(samples, replay)
            finally:
                sam.weights.restore()
            for rise, c, p in zip(rises, clean, probed):
                rise += sign * guardedness(c, p) / len(sam.probe_signs)
        real = [rise[: 0 if is_dummy else None] for rise, (_, is_dummy) in zip(rises, samples)]
        a = torch.cat(real) * (sam.rho / radius)
        sums = guardedness_sums(a)
        if self._reduces(sam):
            distributed_utils.all_reduce(sums, group=self.data_parallel_process_group)
        log.reweighting, log.probe_radius = reweight(a, sums, sam.beta), radius
        if sam.half_dtype is not None:
            # eps* does not depend on the size of the weights, but fp16 gradients overflow by it.
            log.weights_divisor = log.reweighting.r.clamp(min=1)
        return log.reweighting

    def _losses(self, samples: List[Prepared], replay: Replay) -> List[Tensor]:
        """Losses of all sentences, a tensor of shape (B,) a micro-batch, without graph."""
        replay()
        with torch.no_grad(), self._autocast():
            return [self._forward(self.get_model(), sample).losses for sample, _ in samples]

    def _forward(self, model: torch.nn.Module, sample: Dict[str, Any]) -> PerSentence:
        return per_sentence_losses(self.get_criterion(), model, sample)

    def _check_per_sentence_losses(self, sample: Dict[str, Any], replay: Replay) -> None:
        """Once a run: the per-sentence losses add up to what the criterion itself returns.

        Raises:
            ValueError: naming the criterion and both figures.
        """
        criterion, model = self.get_criterion(), self.get_model()
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

    # What fairseq's train_step does around forward and backward

    def _try_to_climb(
        self,
        sam: SharpnessAwareOptimizer,
        samples: List[Prepared],
        replay: Replay,
        raise_oom: bool,
    ) -> bool:
        """Climb; on errors do what fairseq's train_step does on errors in forward and backward.

        Returns:
            whether the weights are at ``w + eps*``; False if the batch is to be skipped.
        """
        try:
            with torch.autograd.profiler.record_function("sam-ascent"):
                self._update_log = self._climb(sam, samples, replay)
        except RuntimeError as e:
            if "out of memory" not in str(e):
                raise
            self._log_oom(e)
            if raise_oom or self.data_parallel_world_size > 1:
                raise
            logger.warning("attempting to recover from OOM in the ascent by skipping the batch")
            self.zero_grad()
            if self.cuda:
                torch.cuda.empty_cache()
            return False
        except Exception:
            self.consolidate_optimizer()
            self.save_checkpoint(os.path.join(self.cfg.checkpoint.save_dir, "crash.pt"), {})
            raise
        return True

    def _trainable(self) -> List[Parameter]:
        """The weights that are perturbed: all that the optimizer trains, the criterion's too."""
        return [p for p in self._trained if p.requires_grad]

    def _draw(self) -> Tuple[int, int]:
        """What the random numbers of an update depend on."""
        return self.cfg.common.seed, self.get_num_updates()

    def _loads_data_in_a_thread(self) -> bool:
        dataset = self.cfg.dataset
        return dataset.num_workers == 0 and dataset.data_buffer_size > 0

    def _task_kwargs(self) -> Dict[str, Any]:
        if self.cfg.ema.store_ema and getattr(self.task, "uses_ema", False):
            return {"ema_model": self.ema.get_model()}
        return {}

    def _reduces(self, sam: SharpnessAwareOptimizer) -> bool:
        """Whether the ascent is that of the batch of all ranks."""
        return self.data_parallel_world_size > 1 and not sam.per_rank

    def _unreduced(self, sam: SharpnessAwareOptimizer, last: bool) -> Any:
        """Forward and backward inside leave gradients unreduced, but for those of the last."""
        if (
            self.data_parallel_world_size > 1
            and hasattr(self.model, "no_sync")
            and (sam.per_rank or not last)
        ):
            return self.model.no_sync()
        return contextlib.ExitStack()

    def _reduce_criterion_grads(self, sam: SharpnessAwareOptimizer) -> None:
        """delta-SAM's forward does not go through the criterion's data-parallel wrapper.

        legacy_ddp reduces on demand; what pytorch_ddp does in the backward is done here.
        """
        if hasattr(self.criterion, "all_reduce_grads") or not sam.beta:
            self.optimizer.all_reduce_grads(self.criterion)
            return
        world_size = self.data_parallel_world_size
        for p in self.get_criterion().parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad / world_size
                distributed_utils.all_reduce(p.grad, group=self.data_parallel_process_group)

    def _compute_dtype(self) -> torch.dtype:
        """What the forward multiplies weights in."""
        if self.cfg.common.amp and self.cuda:
            return torch.get_autocast_gpu_dtype()
        return self._trainable()[0].dtype

    def _autocast(self) -> Any:
        return torch.autocast("cuda") if self.cfg.common.amp else contextlib.ExitStack()

    def _loss_scale(self) -> float:
        """What `optimizer.backward` multiplies the loss by."""
        scaler = getattr(self.optimizer, "scaler", None)
        if scaler is None:
            return 1.0
        return scaler.get_scale() if self.cfg.common.amp else scaler.loss_scale

    def _float32_weights(self) -> Dict[str, Tensor]:
        """The model's weights by name, of half-precision ones the float32 masters if there are."""
        masters = masters_of(self._optimizer) or {}
        return {n: masters.get(p, p.data) for n, p in self.get_model().named_parameters()}

    # Checkpoints and logs

    def state_dict(self) -> Dict[str, Any]:
        """fairseq's, of the unperturbed weights at any moment: crash.pt is saved inside a step.

        The step then goes on where it was, so that fairseq's NanDetector meets what broke it;
        unless the ascent itself was not finite, for then the culprit is to be seen at ``w``.
        """
        sam = sharpness_aware(self.optimizer)
        if sam is None:
            state = super().state_dict()
        else:
            log, moved = self._update_log, sam.weights.moved
            if log is not None and not torch.isfinite(log.ascent_gnorm):
                sam.weights.restore()
            with sam.weights.suspended():
                state = super().state_dict()
                if moved:  # what moves on must not move what is being saved
                    state["model"] = {k: v.clone() for k, v in state["model"].items()}
        state["extra_state"].update(run_state(self))
        return state

    def load_checkpoint(
        self, filename: str, reset_optimizer: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """fairseq's, and what else a resumed run needs to go on as it would have."""
        extra_state = super().load_checkpoint(filename, reset_optimizer, *args, **kwargs)
        if not reset_optimizer:
            load_run_state(self, extra_state or {})
        return extra_state

    def _aggregate_logging_outputs(
        self, logging_outputs: List[Dict[str, Any]], *extra_stats_to_sum: Any, ignore: bool = False
    ) -> Any:
        log = self._update_log
        if log is not None:
            # fairseq looks at the last micro-batch alone: with a dummy there it forgets this
            # rank's other ones, and the gradient of all is divided by too few sentences.
            logging_outputs = log.merge(logging_outputs)
            extra_stats_to_sum = (log.sample_size(), *extra_stats_to_sum[1:])
            ignore = log.only_dummies()
        return super()._aggregate_logging_outputs(
            logging_outputs, *extra_stats_to_sum, ignore=ignore
        )

    def _reduce_and_log_stats(
        self, logging_outputs: List[Dict[str, Any]], sample_size: Any, grad_norm: Any = None
    ) -> Any:
        log = self._update_log
        if log is None:
            return super()._reduce_and_log_stats(logging_outputs, sample_size, grad_norm)
        if not self._sync_stats():
            logging_outputs = log.merge(logging_outputs)
        clean, perturbed, sums = log.split(logging_outputs)
        stats = super()._reduce_and_log_stats(clean, sample_size, grad_norm)
        log.report(self.task, self.get_criterion(), clean, perturbed, sums, sample_size)
        if not log.finite() and "delta_sam_finite" not in self._warn_once:
            self._warn_once.add("delta_sam_finite")
            logger.warning(
                "delta-SAM: the loss of a sentence is not finite at the probe; the weights of "
                "such an update are uniform (plain SAM). Counted as delta_sam_uniform, warned once"
            )
        return stats
