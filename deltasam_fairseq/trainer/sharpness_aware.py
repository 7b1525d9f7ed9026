"""The trainer: an ascent before fairseq's own train step.

    ascent, here            gradient of the (reweighted) batch loss at w, over all micro-batches
                            of all ranks; w -> w + eps*
    fairseq's train_step    forward, backward, reduce, clip, checks, all at w + eps*
    optimizer.step          w + eps* -> w, then the base optimizer's step

Loss scaling, clipping, overflow and NaN handling and EMA of the descent are fairseq's own. This
module orders the steps; ``core`` has the ascent and moves the weights, ``ascent`` gives it
fairseq's passes, ``algorithms`` has the mathematics, ``criterions`` computes the losses.
"""

import contextlib
import functools
import logging
import os
from typing import Any, Dict, Iterator, List, Optional, Union

import torch
from fairseq.logging import metrics
from fairseq.optim.amp_optimizer import AMPOptimizer
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.algorithms import multiplied_in, multiplies_in_tf32
from deltasam_fairseq.checkpoints import DataRecord
from deltasam_fairseq.checkpoints.data_record import KEY as DATA
from deltasam_fairseq.core import RngReplay
from deltasam_fairseq.criterions import RegularisedCriterion, has_per_sentence_losses
from deltasam_fairseq.fairseq_patches.patching import replaced
from deltasam_fairseq.optim import (
    SharpnessAwareOptimizer,
    gradients_of_masters,
    gradients_to_step_along,
    masters_of,
    sharpness_aware,
)
from deltasam_fairseq.trainer.ascent import AscentStep, autocast
from deltasam_fairseq.trainer.averaging import AveragingTrainer
from deltasam_fairseq.trainer.checkpoint_state import (
    accept_same_base_optimizer,
    extra_checkpoint_state,
    fitting_to_data,
    load_extra_checkpoint_state,
)
from deltasam_fairseq.trainer.groups import GroupedAscents, GroupedSamples
from deltasam_fairseq.trainer.metrics import (
    StepMetrics,
    drop_meters_of_ascent,
    keys_without,
    on_host,
    without_ascent,
)
from deltasam_fairseq.trainer.perturbed_weights import PerturbedWeights

logger = logging.getLogger(__name__)

_AMP = (
    "--amp: fairseq divides gradients by the loss scale twice before any optimizer steps. Adam is "
    "indifferent to it, but for --adam-eps, which acts like eps times the scale; the steps of sgd "
    "and the like are smaller by the scale. --fp16 has no such fault (docs/half_precision.md)"
)
_AMP_ON_A_CPU = "--amp: fairseq casts on GPUs only; without one this run computes in float32"


class _SkipBatch(Exception):
    """The ascent ran out of memory, and the update is skipped."""


class SharpnessAwareTrainer(AveragingTrainer):
    """fairseq's Trainer, which perturbs the weights first if the optimizer is sharpness-aware.

    With any other optimizer an update is fairseq's; this package's criterions still get
    before_update() and after_update(). Under data parallelism the ascent adds one gradient
    reduction, delta-SAM one all-reduce of four float64 numbers; every rank computes the same
    perturbation. All forwards of an update see the same dropout masks.
    """

    _ascent_step: AscentStep

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._data_record = DataRecord.of_task(self.task)  # now, while the data is there
        # Of the update in progress; None outside of updates and before the ascent is complete.
        self._step_metrics: Optional[StepMetrics] = None
        # --amp: fairseq repeats an update that overflowed by a call of train_step from within.
        self._descent_in_progress = False
        self._replaced_in_descent = contextlib.ExitStack()
        self._amp_repeats = 0
        self._ran_out_of_memory = False
        self._last_update = 0
        self._finite_probes: Optional[Tensor] = None
        criterion = self.get_criterion()
        if isinstance(criterion, RegularisedCriterion):
            criterion.before_training()

    def _build_optimizer(self) -> None:
        super()._build_optimizer()
        # While a checkpoint is loaded fairseq comes here, and compares class names next.
        accept_same_base_optimizer(self._optim_history, self._optimizer)
        modules = (self.get_model(), self.get_criterion())
        sam = sharpness_aware(self._optimizer)
        recomputes = getattr(self.cfg.model, "checkpoint_activations", False)
        weights = PerturbedWeights(modules, None if sam is None else sam.only, recomputes)
        self._trained = weights.trained
        if sam is not None:
            tf32 = multiplies_in_tf32(self.device)
            copies = masters_of(self._optimizer), tf32, gradients_of_masters(self._optimizer)
            sam.core.compute_in(self._compute_dtype(), *copies)
            sam.core.trained = weights.trained
            ascents = AscentStep if sam.micro is None else GroupedAscents
            self._ascent_step = ascents(self, sam, weights)
            logger.info(sam.describe())
            if isinstance(self._optimizer, AMPOptimizer):
                logger.warning(_AMP if self._optimizer.scaler.is_enabled() else _AMP_ON_A_CPU)
            if weights.partial:
                logger.info(weights.describe())
            if sam.core.parts.mask.describe():
                single = has_per_sentence_losses(type(self.get_criterion()))
                of = "single sentences" if single else "the batch, for the criterion has no others"
                logger.info(f"--sam-mask: the squared gradients are those of {of}")

    @metrics.aggregate("train")
    def train_step(self, samples: List[Any], raise_oom: bool = False) -> Any:
        """One update; the arguments and the result are fairseq's."""
        if isinstance(samples, GroupedSamples):  # --amp repeats an update by what it was given
            samples = samples.whole
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
        if self._descent_in_progress:
            self._amp_repeats += 1
            self._count_overflow(self._step_metrics)
            self._replaced_in_descent.close()  # the ascent to come calls the originals
        sam.restore()
        if not sam.active(self.get_num_updates()):
            sam.skip_ascent()
            without_ascent()
            return self._fairseqs_step(samples, raise_oom)

        with self._updates_counted_once():
            return self._perturbed_update(sam, samples, raise_oom)

    @contextlib.contextmanager
    def _updates_counted_once(self) -> Iterator[None]:
        """Call the model's set_num_updates now, at w, and not again inside.

        fairseq calls it in every forward and backward. A model that steps a teacher in it
        (data2vec_text) would average perturbed weights, and several times an update.
        """
        model = self.get_model()
        self.model.train()
        model.set_num_updates(self.get_num_updates())
        with replaced(model, "set_num_updates", lambda num_updates: None):
            yield

    def _perturbed_update(
        self, sam: SharpnessAwareOptimizer, samples: List[Any], raise_oom: bool
    ) -> Any:
        prepared = [self._prepare_sample(sample) for sample in samples]
        replay = RngReplay(
            self._set_seed,
            host=not self._loads_data_in_a_thread(),
            buffers=[*self.get_model().buffers(), *self.get_criterion().buffers()],
        )
        try:
            metrics.log_start_time("train_wall", priority=800, round=0)
            errors = functools.partial(self._errors_of_ascent, raise_oom)
            with errors():
                self._step_metrics = self._ascent_step.run(
                    prepared, replay, self._unread_loss_scale()
                )
            metrics.log_stop_time("train_wall")
            replay()
            # fairseq's preparation leaves a sample on the device as it is; a missing micro-batch
            # must stay missing, so that fairseq sees a dummy.
            ready = [raw if dummy else on for raw, (on, dummy) in zip(samples, prepared)]
            return self._descend(self._ascent_step.samples_of_descent(ready, errors), raise_oom)
        except _SkipBatch:
            metrics.log_stop_time("train_wall")
            self.zero_grad()
            if self.cuda:
                torch.cuda.empty_cache()
            return None
        finally:
            sam.restore()
            self._step_metrics = None

    def _descend(self, samples: Any, raise_oom: bool) -> Any:
        """fairseq's own train_step; count the updates that it skips for an overflow."""
        updates, repeats = self.get_num_updates(), self._amp_repeats
        outputs = None if self._step_metrics is None else self._step_metrics.outputs
        self._ran_out_of_memory = False
        try:
            self._descent_in_progress = True
            with contextlib.ExitStack() as self._replaced_in_descent:
                self._replaced_in_descent.enter_context(self._gradients_corrected())
                if outputs is not None and outputs.gradients:
                    self._replaced_in_descent.enter_context(outputs.descent())
                stats = self._fairseqs_step(samples, raise_oom)
        finally:
            self._descent_in_progress = False
        scales = getattr(self.optimizer, "scaler", None) is not None
        skipped = stats is None and self.get_num_updates() == updates
        repeated = self._amp_repeats > repeats  # and counted then
        if skipped and scales and not self._ran_out_of_memory and not repeated:
            self._count_overflow(self._step_metrics)
        return stats

    @contextlib.contextmanager
    def _gradients_corrected(self) -> Iterator[None]:
        """Let the method correct the descent's gradients after fairseq has reduced them.

        fairseq multiplies them by a constant next. Until then they have the loss scale and the
        number of ranks in them, as the ascent's have.
        """
        optimizer: Any = self.optimizer
        sam = sharpness_aware(optimizer)
        assert sam is not None
        descent = sam.core.parts.descent
        if not descent.corrects:
            yield
            return
        multiply = optimizer.multiply_grads

        def correct_and_multiply(c: Any) -> None:
            descent.correct_(gradients_to_step_along(optimizer, self._trainable()))
            multiply(c)

        with replaced(optimizer, "multiply_grads", correct_and_multiply):
            yield

    def _count_overflow(self, log: Optional[StepMetrics]) -> None:
        where = "descent" if log is not None and torch.isfinite(log.figures.gnorm) else "ascent"
        metrics.log_scalar_sum(f"sam_overflows_{where}", 1, priority=701, round=0)

    def _fairseqs_step(self, samples: Any, raise_oom: bool) -> Any:
        """fairseq's own train_step; on a CPU too skip an update that overflows."""
        try:
            return super().train_step(samples, raise_oom)
        except (AssertionError, RuntimeError) as e:
            # fairseq's overflow handling calls .cuda(), which fails on a CPU.
            if self.cuda or not isinstance(e.__context__, OverflowError):
                raise
            self.zero_grad()
            metrics.log_scalar("loss_scale", self._loss_scale(), priority=700, round=4, weight=0)
            metrics.log_stop_time("train_wall")
            return None

    def _log_oom(self, exc: Any) -> None:
        self._ran_out_of_memory = True
        super()._log_oom(exc)

    # What fairseq's train_step does around forward and backward

    @contextlib.contextmanager
    def _errors_of_ascent(self, raise_oom: bool) -> Iterator[None]:
        """Treat errors of an ascent as fairseq's train_step treats those of its passes.

        Raises:
            _SkipBatch: out of memory, where fairseq would skip the batch.
        """
        try:
            with torch.autograd.profiler.record_function("sam-ascent"):
                yield
        except RuntimeError as e:
            if "out of memory" not in str(e):
                raise
            self._log_oom(e)
            if raise_oom or self.data_parallel_world_size > 1:
                raise
            logger.warning("attempting to recover from OOM in the ascent by skipping the batch")
            raise _SkipBatch from e
        except Exception:
            self.consolidate_optimizer()
            self.save_checkpoint(os.path.join(self.cfg.checkpoint.save_dir, "crash.pt"), {})
            raise

    def _trainable(self) -> List[Parameter]:
        """All weights that the optimizer trains, the criterion's too."""
        return [p for p in self._trained if p.requires_grad]

    def _loads_data_in_a_thread(self) -> bool:
        dataset = self.cfg.dataset
        return dataset.num_workers == 0 and dataset.data_buffer_size > 0

    def _compute_dtype(self) -> torch.dtype:
        """What the forward multiplies weights in."""
        with autocast(self.cfg):
            return multiplied_in(self._trainable()[0])

    def _loss_scale(self) -> float:
        """What `optimizer.backward` multiplies the loss by."""
        scaler = getattr(self.optimizer, "scaler", None)
        if scaler is None:
            return 1.0
        return scaler.get_scale() if self.cfg.common.amp else scaler.loss_scale

    def _unread_loss_scale(self) -> Union[float, Tensor]:
        """The same without a device synchronisation: --amp keeps it on the device."""
        if self.cfg.common.amp:
            return self.optimizer.scaler.scale(torch.ones((), device=self.device))
        return self._loss_scale()

    def _float32_weights(self) -> Dict[str, Tensor]:
        """The model's weights by name, of half-precision ones the float32 masters if there are."""
        masters = masters_of(self._optimizer) or {}
        return {n: masters.get(p, p.data) for n, p in self.get_model().named_parameters()}

    # Checkpoints and logs

    def state_dict(self) -> Dict[str, Any]:
        """fairseq's, of the unperturbed weights at any moment: crash.pt is saved inside a step.

        The step then continues at the perturbed weights, where fairseq's NanDetector finds what
        broke it; but at ``w`` if the ascent itself was not finite, as the fault is there.
        """
        sam = sharpness_aware(self.optimizer)
        if sam is None:
            state = super().state_dict()
        else:
            log, moved = self._step_metrics, sam.core.weights.moved
            if log is not None and not torch.isfinite(log.figures.gnorm):
                sam.core.weights.restore()
            with sam.core.weights.suspended():
                state = super().state_dict()
                if moved:  # the weights move again while the state is being saved
                    state["model"] = {k: v.clone() for k, v in state["model"].items()}
        state["extra_state"].update(extra_checkpoint_state(self))
        state["extra_state"][DATA] = self._data_record.plain()
        return state

    def load_checkpoint(
        self, filename: str, reset_optimizer: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """fairseq's, and the rest of the state that an exact continuation needs."""
        store_ema = self.cfg.ema.store_ema
        with fitting_to_data(self._data_record, not reset_optimizer, store_ema):
            extra_state = super().load_checkpoint(filename, reset_optimizer, *args, **kwargs)
        sam = sharpness_aware(self.optimizer)
        unused = [] if sam is None else keys_without(sam.core.parts)
        drop_meters_of_ascent(sam is not None, sam is not None and sam.reweights, unused)
        if not reset_optimizer:
            load_extra_checkpoint_state(self, extra_state or {})
        return extra_state

    def _aggregate_logging_outputs(
        self, logging_outputs: List[Dict[str, Any]], *extra_stats_to_sum: Any, ignore: bool = False
    ) -> Any:
        log = self._step_metrics
        if log is not None:
            # fairseq looks at the last micro-batch only: if that is a dummy, it drops this rank's
            # other ones and divides the gradient of all by too few sentences.
            counted, *others = extra_stats_to_sum
            extra_stats_to_sum = (log.sample_size(logging_outputs, counted), *others)
            logging_outputs = log.merge(logging_outputs)
            ignore = log.only_dummies()
        found = super()._aggregate_logging_outputs(
            logging_outputs, *extra_stats_to_sum, ignore=ignore
        )
        if log is not None:
            log.require_same_draws(found[0])
        return found

    def _reduce_and_log_stats(
        self, logging_outputs: List[Dict[str, Any]], sample_size: Any, grad_norm: Any = None
    ) -> Any:
        log = self._step_metrics
        if log is None:
            return super()._reduce_and_log_stats(logging_outputs, sample_size, grad_norm)
        if not self._sync_stats():
            logging_outputs = log.merge(logging_outputs)
        # Logging reads some of them many times.
        logging_outputs, sample_size = on_host([logging_outputs, sample_size])
        clean, perturbed, sums = log.split(logging_outputs)
        stats = super()._reduce_and_log_stats(clean, sample_size, grad_norm)
        with torch.autograd.profiler.record_function("sam-log"):
            log.report(self.task, self.get_criterion(), clean, perturbed, sums, sample_size)
        self._warn_of_infinite_probes(log)
        return stats

    def _warn_of_infinite_probes(self, log: StepMetrics) -> None:
        """Warn once if a probe loss is not finite.

        Reading it waits for the device; so read it when fairseq logs, not every update.
        """
        finite = log.finite()
        if finite is None or "delta_sam_finite" in self._warn_once:
            return
        self._finite_probes = (
            finite if self._finite_probes is None else self._finite_probes & finite
        )
        if self.get_num_updates() % self.cfg.common.log_interval:
            return
        if not self._finite_probes:
            self._warn_once.add("delta_sam_finite")
            logger.warning(
                "delta-SAM: the loss of a sentence is not finite at the probe; the weights of "
                "such an update are uniform (plain SAM). Counted as delta_sam_uniform, warned once"
            )
