"""The ascent of an update: the gradient at w that the weights climb along.

    SAM         gradient of the batch loss
    delta-SAM   clean losses, losses at the probe, weights of the sentences (Eq. 3 to 6), gradient
                of the weighted loss
    both        reduced over ranks; w -> w + eps*
    cheaper     the gradient from a fraction of the sentences, or of some weights only

This module sequences what an ascent consists of, as ``trainer`` does for the update around it.
"""

import contextlib
from typing import Any, ContextManager, Dict, List, Optional, Tuple, Union

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from torch import Tensor

from deltasam_fairseq.algorithms import (
    SENTENCES,
    Reweighting,
    guardedness,
    guardedness_sums,
    reweight,
    update_generator,
)
from deltasam_fairseq.criterions import PerSentence, per_sentence_losses, require_same_sum
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
    """What fairseq's task runs a forward in: under --amp, CUDA's autocast (none on a CPU)."""
    return torch.autocast("cuda") if cfg.common.amp else contextlib.nullcontext()


class AscentStep:
    """Moves a model to ``w + eps*`` of a batch; all forwards see the same dropout masks.

    Args:
        trainer: fairseq's, of the model, the criterion and the processes.
        sam: its optimizer, out of its precision wrappers.
        weights: those that are perturbed.
    """

    def __init__(
        self, trainer: Trainer, sam: SharpnessAwareOptimizer, weights: PerturbedWeights
    ) -> None:
        self._trainer = trainer
        self._sam = sam
        self._weights = weights
        self._sync = GradientSync(trainer, sam, weights)
        self._losses_checked = False

    def run(
        self, samples: List[Prepared], replay: RngReplay, loss_scale: Union[float, Tensor]
    ) -> StepMetrics:
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
        with self._weights.freeze_others():
            log = backward(samples, replay)
        if self._sync.needed:
            with torch.autograd.profiler.record_function("reduce-grads"):
                self._sync.average_grads()
            scale = scale / trainer.data_parallel_world_size  # what reduces gradients averages them
        ascent = sam.ascend(self._weights.parameters(), *self._draw())
        log.ascent_gnorm = ascent.norm * log.weights_divisor / scale
        log.realised = ascent.realised if sam.half_dtype is not None else None
        return log

    def _sam_backward(self, samples: List[Prepared], replay: RngReplay) -> StepMetrics:
        """Gradient of the batch loss, accumulated as fairseq's train_step does it."""
        trainer, sam = self._trainer, self._sam
        # The criterion's data-parallel wrapper would reduce what is to stay with the rank.
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
        """Some sentences at random, and what share of the mini-batch's they are."""
        if self._sam.ascent_fraction == 1:
            return sample, 1.0
        n = number_of_sentences(sample)
        kept = draw_sentences(n, self._sam.ascent_fraction, generator)
        return self._take(sample, kept), len(kept) / n

    def _take(self, sample: Dict[str, Any], kept: Tensor) -> Dict[str, Any]:
        return take_sentences(sample, kept, self._trainer.get_criterion().padding_idx)

    def _delta_sam_backward(self, samples: List[Prepared], replay: RngReplay) -> StepMetrics:
        """Gradient of ``sum_j g'_j l_j``.

        With one micro-batch the clean forward of Eq. 3 and the forward of the ascent are the
        same: it runs once, with its graph. With several, the weights of the first depend on the
        last, so the clean losses come from forwards of their own. So they do where only the most
        unguarded sentences climb, which are known after the probe. A central difference needs none.
        """
        trainer, sam = self._trainer, self._sam
        trainer.model.set_num_updates(trainer.get_num_updates())
        if not self._losses_checked:
            self._check_per_sentence_losses(samples[0][0], replay)
            self._losses_checked = True

        sam.draw_ahead(self._weights.parameters(), *self._draw())
        log = StepMetrics(per_rank=sam.per_rank)
        if sam.ascent_fraction < 1:
            self._backward_of_most_unguarded(samples, replay, log)
            return log
        done, central = 0, sam.probes_centrally
        if len(samples) > 1:
            clean = None
            if not central:
                clean = [found.losses for found in self._forwards(samples, replay)]
            reweighting = self._reweight(samples, clean, replay, log)
        replay()
        for i, (sample, is_dummy) in enumerate(samples):
            with self._sync.no_sync_unless_last(last=i == len(samples) - 1):
                with autocast(self._trainer.cfg):
                    losses, sample_size, logging_output = self._forward(trainer.model, sample)
                if len(samples) == 1:
                    clean = None if central else [losses]
                    reweighting = self._reweight(samples, clean, replay, log)
                if is_dummy:
                    weights = torch.zeros_like(losses)
                else:
                    weights = reweighting.weights[done : done + len(losses)]
                    weights = (weights / log.weights_divisor).to(losses)
                    done += len(losses)
                self._backward((weights * losses).sum())
            log.add(logging_output, sample_size, is_dummy)
        return log

    def _backward_of_most_unguarded(
        self, samples: List[Prepared], replay: RngReplay, log: StepMetrics
    ) -> None:
        """Gradient of ``sum_j g'_j l_j`` over the j of largest ``|a_j|`` of every micro-batch.

        The weights are those among all sentences, and so are the figures for the log.
        """
        clean = self._forwards(samples, replay)
        at_w = None if self._sam.probes_centrally else [found.losses for found in clean]
        reweighting = self._reweight(samples, at_w, replay, log)
        of_sentences, done = reweighting.weights / log.weights_divisor, 0
        replay()
        for i, ((sample, is_dummy), found) in enumerate(zip(samples, clean)):
            n = len(found.losses)
            if is_dummy:
                weights = torch.zeros_like(found.losses)
            else:
                weights = of_sentences[done : done + n]
                done += n
            kept = most_unguarded(weights, self._sam.ascent_fraction)
            with self._sync.no_sync_unless_last(last=i == len(samples) - 1):
                with autocast(self._trainer.cfg):
                    losses = self._forward(self._trainer.model, self._take(sample, kept)).losses
                self._backward((weights[kept].to(losses) * losses).sum())
            log.add(found.logging_output, found.sample_size, is_dummy)

    def _reweight(
        self,
        samples: List[Prepared],
        clean: Optional[List[Tensor]],
        replay: RngReplay,
        log: StepMetrics,
    ) -> Reweighting:
        """Probe (Eq. 3), then the weights of this rank's sentences in the global batch.

        Args:
            clean: losses at w, of each micro-batch; None for a central difference.
        """
        sam, probed = self._sam, []
        for sign in sam.probe_signs:
            radius = sam.probe(self._weights.parameters(), *self._draw(), sign)
            try:
                probed.append([found.losses for found in self._forwards(samples, replay)])
            finally:
                sam.weights.restore()
        if clean is None:
            rises = [guardedness(behind, ahead) / 2 for ahead, behind in zip(*probed)]
        else:
            rises = [guardedness(at_w, ahead) for ahead, at_w in zip(probed[0], clean)]
        with torch.autograd.profiler.record_function("sam-reweight"):
            real = [rise[: 0 if is_dummy else None] for rise, (_, is_dummy) in zip(rises, samples)]
            a = torch.cat(real) * (sam.rho / radius)
            sums = guardedness_sums(a)
            if self._sync.needed:
                with torch.autograd.profiler.record_function("sam-reduce"):
                    group = self._trainer.data_parallel_process_group
                    distributed_utils.all_reduce(sums, group=group)
            log.reweighting, log.probe_radius = reweight(a, sums, sam.beta), radius
        if sam.half_dtype is not None:
            # eps* does not depend on the size of the weights, but fp16 gradients overflow by it.
            log.weights_divisor = log.reweighting.r.clamp(min=1)
        return log.reweighting

    def _forwards(self, samples: List[Prepared], replay: RngReplay) -> List[PerSentence]:
        """Losses of all sentences, one `PerSentence` a micro-batch, without graph."""
        replay()
        with torch.no_grad(), autocast(self._trainer.cfg):
            model = self._trainer.get_model()
            return [self._forward(model, sample) for sample, _ in samples]

    def _forward(self, model: torch.nn.Module, sample: Dict[str, Any]) -> PerSentence:
        name = "sam-forward" if torch.is_grad_enabled() else "sam-forward-nograd"
        with torch.autograd.profiler.record_function(name):
            return per_sentence_losses(self._trainer.get_criterion(), model, sample)

    def _backward(self, loss: Tensor) -> None:
        with torch.autograd.profiler.record_function("sam-backward"):
            self._trainer.optimizer.backward(loss)

    def _check_per_sentence_losses(self, sample: Dict[str, Any], replay: RngReplay) -> None:
        """Once a run: the per-sentence losses add up to what the criterion itself returns."""
        criterion, model = self._trainer.get_criterion(), self._trainer.get_model()
        total = self._forwards([(sample, False)], replay)[0].losses.double().sum().item()
        replay()
        with torch.no_grad(), autocast(self._trainer.cfg):
            stock = float(criterion(model, sample)[0])
        require_same_sum(criterion, total, stock, next(model.parameters()).dtype)

    def _draw(self) -> Tuple[int, int]:
        """What the random numbers of an update depend on."""
        return self._trainer.cfg.common.seed, self._trainer.get_num_updates()

    def _task_kwargs(self) -> Dict[str, Any]:
        trainer = self._trainer
        if trainer.cfg.ema.store_ema and getattr(trainer.task, "uses_ema", False):
            return {"ema_model": trainer.ema.get_model()}
        return {}
