"""The ascent of an update: move the weights along the gradient at w.

    SAM         gradient of the batch loss
    delta-SAM   clean losses, losses at the probe, weights of the sentences (Eq. 3 to 6), gradient
                of the weighted loss
    both        reduced over ranks; w -> w + eps*
    cheaper     the gradient from a fraction of the sentences, or of some weights only

This module orders the steps of an ascent; ``sharpness_aware`` orders those of the update.
"""

import contextlib
from typing import Any, ContextManager, Dict, List, Optional, Tuple, Union

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from torch import Tensor

from deltasam_fairseq.algorithms import (
    SENTENCES,
    guardedness,
    guardedness_sums,
    reweight,
    update_generator,
)
from deltasam_fairseq.criterions import (
    PerSentence,
    per_sentence_losses,
    require_replay,
    require_same_sum,
)
from deltasam_fairseq.optim import SharpnessAwareOptimizer
from deltasam_fairseq.trainer.gradient_sync import GradientSync
from deltasam_fairseq.trainer.metrics import StepMetrics
from deltasam_fairseq.trainer.perturbed_weights import PerturbedWeights
from deltasam_fairseq.trainer.rng_replay import RngReplay
from deltasam_fairseq.trainer.subsampling import (
    draw_sentences,
    most_unguarded,
    number_of_sentences,
    take_sentences,
)

# A micro-batch on the device, and whether it is a dummy for one that this rank does not have.
Prepared = Tuple[Dict[str, Any], bool]


def autocast(cfg: Any) -> ContextManager[None]:
    """Autocast as in fairseq's task: CUDA's under --amp (which does nothing on a CPU)."""
    return torch.autocast("cuda") if cfg.common.amp else contextlib.nullcontext()


class AscentStep:
    """Moves a model to ``w + eps*`` of a batch; all forwards see the same dropout masks.

    Args:
        trainer: fairseq's, of the model, the criterion and the processes.
        sam: its optimizer, without precision wrappers.
        weights: to perturb.
    """

    def __init__(
        self, trainer: Trainer, sam: SharpnessAwareOptimizer, weights: PerturbedWeights
    ) -> None:
        self._trainer = trainer
        self._sam = sam
        self._weights = weights
        self._sync = GradientSync(trainer, sam, weights)
        self._losses_checked = False
        self._draws_compared = False

    def run(
        self, samples: List[Prepared], replay: RngReplay, loss_scale: Union[float, Tensor]
    ) -> StepMetrics:
        """``w -> w + eps*``, along the reduced gradient of the (reweighted) batch loss at w.

        Args:
            samples: this rank's micro-batches.
            replay: called before every pass over them.
            loss_scale: that ``optimizer.backward`` multiplies the loss by.
        """
        trainer, sam = self._trainer, self._sam
        trainer.criterion.train()  # the model's mode is set with its number of updates
        trainer.zero_grad()
        scale = loss_scale
        backward = self._delta_sam_backward if sam.beta else self._sam_backward
        with self._weights.freeze_others():
            log = backward(samples, replay)
        if self._sync.needed:
            with torch.autograd.profiler.record_function("reduce-grads"):
                self._sync.average_grads()
            scale = scale / trainer.data_parallel_world_size  # the reduction averages gradients
        ascent = sam.ascend(self._weights.parameters(), *self._draw())
        if self._sync.needed and sam.draws and not self._draws_compared:
            log.drawn = sam.drawn(self._weights.parameters(), *self._draw())
            self._draws_compared = True
        log.ascent_gnorm = ascent.norm * log.weights_divisor / scale
        log.realised = ascent.realised if sam.half_dtype is not None else None
        return log

    def _sam_backward(self, samples: List[Prepared], replay: RngReplay) -> StepMetrics:
        """Gradient of the batch loss, accumulated as fairseq's train_step does it."""
        trainer, sam = self._trainer, self._sam
        # The criterion's data-parallel wrapper would average gradients that belong to one rank.
        criterion = trainer.get_criterion() if self._sync.local_only else trainer.criterion
        sums = trainer.task.logging_outputs_can_be_summed(trainer.get_criterion())
        log = StepMetrics(sam.per_rank, estimated=sam.ascent_fraction < 1, sums=sums)
        rank = trainer.data_parallel_rank
        generator = update_generator(*self._draw(), SENTENCES, torch.device("cpu"), rank)
        replay()
        for i, (sample, is_dummy) in enumerate(samples):
            sample, share = self._draw_part(sample, generator)
            with self._sync.no_sync_unless_last(last=i == len(samples) - 1):
                _, sample_size, logging_output = trainer.task.train_step(
                    sample=sample,
                    model=trainer.model,
                    criterion=criterion,
                    optimizer=trainer.optimizer,
                    update_num=trainer.get_num_updates(),
                    ignore_grad=is_dummy,
                    **self._task_kwargs(),
                )
            log.add(logging_output, sample_size, is_dummy, share)
        return log

    def _draw_part(
        self, sample: Dict[str, Any], generator: torch.Generator
    ) -> Tuple[Dict[str, Any], float]:
        """Draw sentences of a mini-batch; return them and their share of it."""
        if self._sam.ascent_fraction == 1:
            return sample, 1.0
        n = number_of_sentences(sample)
        kept = draw_sentences(n, self._sam.ascent_fraction, generator)
        return self._take(sample, kept), len(kept) / n

    def _take(self, sample: Dict[str, Any], kept: Tensor) -> Dict[str, Any]:
        trainer = self._trainer
        multiple = trainer.cfg.dataset.required_seq_len_multiple
        return take_sentences(sample, kept, trainer.get_criterion().padding_idx, multiple)

    def _delta_sam_backward(self, samples: List[Prepared], replay: RngReplay) -> StepMetrics:
        """Gradient of ``sum_j g'_j l_j``."""
        sam = self._sam
        if not self._losses_checked:
            self._check_per_sentence_losses(samples[0][0], replay)
            self._losses_checked = True
        clean_first = len(samples) == 1 or sam.ascent_fraction < 1 or not sam.probes_centrally
        if clean_first:  # otherwise the probe would wait for the one thread that draws
            sam.draw_ahead(self._weights.parameters(), *self._draw())
        log = StepMetrics(per_rank=sam.per_rank)
        if sam.ascent_fraction < 1:
            self._backward_of_most_unguarded(samples, replay, log)
        elif len(samples) == 1:
            self._backward_through_clean_forward(samples, replay, log)
        else:
            self._backward_after_reweighting(samples, replay, log)
        return log

    def _backward_through_clean_forward(
        self, samples: List[Prepared], replay: RngReplay, log: StepMetrics
    ) -> None:
        """One micro-batch: the clean forward of Eq. 3 keeps its graph, for the backward."""
        ((sample, is_dummy),) = samples
        replay()
        with self._sync.no_sync_unless_last(last=True):
            clean = self._forward_with_graph(sample)
            (weights,) = self._reweight(samples, [clean], replay, log)
            self._backward((weights.to(clean.losses) * clean.losses).sum())
        log.add(clean.logging_output, clean.sample_size, is_dummy)

    def _backward_after_reweighting(
        self, samples: List[Prepared], replay: RngReplay, log: StepMetrics
    ) -> None:
        """Several: the weights of the first depend on the last, and are known before any graph."""
        clean = None if self._sam.probes_centrally else self._forwards(samples, replay)
        weights_of = self._reweight(samples, clean, replay, log)
        replay()
        for i, ((sample, is_dummy), weights) in enumerate(zip(samples, weights_of)):
            with self._sync.no_sync_unless_last(last=i == len(samples) - 1):
                found = self._forward_with_graph(sample)
                self._backward((weights.to(found.losses) * found.losses).sum())
            log.add(found.logging_output, found.sample_size, is_dummy)

    def _backward_of_most_unguarded(
        self, samples: List[Prepared], replay: RngReplay, log: StepMetrics
    ) -> None:
        """The same over the j of largest ``|a_j|`` of every micro-batch, known after the probe.

        The weights are those among all sentences, and so are the figures for the log.
        """
        clean = self._forwards(samples, replay)
        weights_of = self._reweight(samples, clean, replay, log)
        replay()
        for i, ((sample, is_dummy), weights) in enumerate(zip(samples, weights_of)):
            kept = most_unguarded(weights, self._sam.ascent_fraction)
            with self._sync.no_sync_unless_last(last=i == len(samples) - 1):
                losses = self._forward_with_graph(self._take(sample, kept)).losses
                self._backward((weights[kept].to(losses) * losses).sum())
            log.add(clean[i].logging_output, clean[i].sample_size, is_dummy)

    def _reweight(
        self,
        samples: List[Prepared],
        clean: Optional[List[PerSentence]],
        replay: RngReplay,
        log: StepMetrics,
    ) -> List[Tensor]:
        """Probe (Eq. 3), then weigh this rank's sentences in the global batch (Eq. 4 to 6).

        Args:
            clean: found at w, one a micro-batch; a central difference does not need it.
            log: receives the `Reweighting` and the radius of the probe.

        Returns:
            ``N g'_j / log.weights_divisor``, one tensor a micro-batch; 0 for a dummy.
        """
        rises, radius = self._probe(samples, clean, replay)
        with torch.autograd.profiler.record_function("sam-reweight"):
            real = [rise[: 0 if is_dummy else None] for rise, (_, is_dummy) in zip(rises, samples)]
            a = torch.cat(real) * (self._sam.rho / radius)
            sums = guardedness_sums(a)
            if self._sync.needed:
                with torch.autograd.profiler.record_function("sam-reduce"):
                    group = self._trainer.data_parallel_process_group
                    distributed_utils.all_reduce(sums, group=group)
            log.reweighting, log.probe_radius = reweight(a, sums, self._sam.beta), radius
            if self._sam.half_dtype is not None:
                # eps* does not depend on the size of the weights; fp16 gradients overflow by it.
                log.weights_divisor = log.reweighting.r.clamp(min=1)
            weights = (log.reweighting.weights / log.weights_divisor).split([len(x) for x in real])
            return [w if len(w) else torch.zeros_like(rise) for w, rise in zip(weights, rises)]

    def _probe(
        self, samples: List[Prepared], clean: Optional[List[PerSentence]], replay: RngReplay
    ) -> Tuple[List[Tensor], Tensor]:
        """Guardedness ``a_j`` at the probe's radius, one tensor a micro-batch; the radius."""
        sam, probed = self._sam, []
        for sign in sam.probe_signs:
            radius = sam.probe(self._weights.parameters(), *self._draw(), sign)
            try:
                probed.append(self._forwards(samples, replay))
            finally:
                sam.weights.restore()
        if sam.probes_centrally:
            ahead, behind = probed
            rises = [guardedness(b.losses, a.losses) / 2 for a, b in zip(ahead, behind)]
        else:
            assert clean is not None
            rises = [guardedness(c.losses, p.losses) for c, p in zip(clean, probed[0])]
        return rises, radius

    def _forwards(self, samples: List[Prepared], replay: RngReplay) -> List[PerSentence]:
        """Losses of all sentences, one `PerSentence` a micro-batch, without graph."""
        replay()
        with torch.no_grad(), autocast(self._trainer.cfg):
            model = self._trainer.get_model()
            return [self._forward(model, sample) for sample, _ in samples]

    def _forward_with_graph(self, sample: Dict[str, Any]) -> PerSentence:
        with autocast(self._trainer.cfg):
            return self._forward(self._trainer.model, sample)

    def _forward(self, model: torch.nn.Module, sample: Dict[str, Any]) -> PerSentence:
        name = "sam-forward" if torch.is_grad_enabled() else "sam-forward-nograd"
        with torch.autograd.profiler.record_function(name):
            return per_sentence_losses(self._trainer.get_criterion(), model, sample)

    def _backward(self, loss: Tensor) -> None:
        with torch.autograd.profiler.record_function("sam-backward"):
            self._trainer.optimizer.backward(loss)

    def _check_per_sentence_losses(self, sample: Dict[str, Any], replay: RngReplay) -> None:
        """Require once a run that forwards replay, and losses add up to the criterion's own."""
        criterion, model = self._trainer.get_criterion(), self._trainer.get_model()
        first, second = (self._forwards([(sample, False)], replay)[0].losses for _ in range(2))
        require_replay(criterion, first, second, self._sam.probe_dtype or first.dtype)
        replay()
        with torch.no_grad(), autocast(self._trainer.cfg):
            stock = torch.as_tensor(criterion(model, sample)[0])
        require_same_sum(criterion, first, stock)

    def _draw(self) -> Tuple[int, int]:
        """Seed and update, on which the random numbers of an update depend."""
        return self._trainer.cfg.common.seed, self._trainer.get_num_updates()

    def _task_kwargs(self) -> Dict[str, Any]:
        trainer = self._trainer
        if trainer.cfg.ema.store_ema and getattr(trainer.task, "uses_ema", False):
            return {"ema_model": trainer.ema.get_model()}
        return {}
