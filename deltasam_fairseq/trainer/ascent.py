"""fairseq's side of an ascent: its forwards, backwards, reductions and loss scale.

``core.ascent`` orders the steps of an ascent, ``sharpness_aware`` those of the update.
"""

import contextlib
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence, Tuple, Union

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from torch import Tensor

from deltasam_fairseq.algorithms import SENTENCES, TRUST_REGION, update_generator
from deltasam_fairseq.core import Ascent, Passes, RngReplay
from deltasam_fairseq.criterions import (
    OutputsAtW,
    PerSentence,
    has_per_sentence_losses,
    per_sentence_losses,
    require_replay,
    require_same_sum,
)
from deltasam_fairseq.optim import SharpnessAwareOptimizer
from deltasam_fairseq.trainer.gradient_sync import GradientSync
from deltasam_fairseq.trainer.metrics import StepMetrics
from deltasam_fairseq.trainer.perturbed_weights import PerturbedWeights
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
    """Moves fairseq's model to ``w + eps*`` of a batch.

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
        self._ascent = Ascent(sam.core, weights.parameters)
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
        draw = trainer.cfg.common.seed, trainer.get_num_updates()
        passes = FairseqPasses(trainer, sam, self._weights, self._sync, samples, replay, loss_scale)
        kept = sam.core.parts.descent.along_outputs, sam.core.parts.radius.needs_outputs
        if any(kept):
            passes.metrics.outputs = OutputsAtW(trainer.get_criterion(), *kept)
        if sam.core.parts.weighting.probes and not self._losses_checked:
            passes.check_per_sentence_losses()
            self._losses_checked = True
        passes.metrics.figures = self._ascent.run(passes, *draw)
        self._compare_draws(passes.metrics)
        return passes.metrics

    def samples_of_descent(
        self, ready: List[Any], errors: Callable[[], ContextManager[None]]
    ) -> Sequence[Any]:
        """Return the micro-batches of fairseq's own step, at ``w + eps*``.

        Args:
            ready: those of the update.
            errors: the context of an ascent, where one is made while fairseq reads them.
        """
        return ready

    def _compare_draws(self, log: StepMetrics) -> None:
        """Let the ranks compare their random numbers, once a run."""
        trainer, core = self._trainer, self._sam.core
        if self._sync.needed and core.draws and not self._draws_compared:
            draw = trainer.cfg.common.seed, trainer.get_num_updates()
            log.drawn = core.drawn(self._weights.parameters(), *draw)
            self._draws_compared = True


class FairseqPasses(Passes[PerSentence]):
    """The passes over one update's micro-batches, by fairseq's task, model and criterion.

    Args:
        sync: decides what is reduced over ranks.
        metrics: to collect into; default: new ones.
        others: see `AscentStep` and `AscentStep.run`.

    Attributes:
        metrics: collects the clean forwards' logging outputs.
    """

    def __init__(
        self,
        trainer: Trainer,
        sam: SharpnessAwareOptimizer,
        weights: PerturbedWeights,
        sync: GradientSync,
        samples: List[Prepared],
        replay: RngReplay,
        loss_scale: Union[float, Tensor],
        metrics: Optional[StepMetrics] = None,
    ) -> None:
        self.count = len(samples)
        self.partial = sam.ascent_fraction < 1
        self.per_sentence = has_per_sentence_losses(type(trainer.get_criterion()))
        # The reduction averages gradients.
        self.scale = loss_scale / (trainer.data_parallel_world_size if sync.needed else 1)
        self._trainer, self._sam, self._weights, self._sync = trainer, sam, weights, sync
        self._samples, self._replay = samples, replay
        draw = trainer.cfg.common.seed, trainer.get_num_updates(), SENTENCES
        self._generator = update_generator(*draw, torch.device("cpu"), trainer.data_parallel_rank)
        sums = trainer.task.logging_outputs_can_be_summed(trainer.get_criterion())
        estimated = self.partial and not sam.core.parts.weighting.probes
        self.metrics = metrics or StepMetrics(sam.per_rank, estimated, sums)

    def replay(self) -> None:
        self._replay()

    def is_dummy(self, i: int) -> bool:
        return self._samples[i][1]

    def forward(self, i: int, kept: Optional[Tensor] = None) -> PerSentence:
        sample = self._samples[i][0]
        if kept is not None:
            sample = self._take(sample, kept)
        graph, trainer = torch.is_grad_enabled(), self._trainer
        model = trainer.model if graph else trainer.get_model()
        with autocast(trainer.cfg), torch.autograd.profiler.record_function(
            "sam-forward" if graph else "sam-forward-nograd"
        ):
            if graph and self.metrics.outputs is not None:
                return self.metrics.outputs.per_sentence_losses(i, model, sample)
            return per_sentence_losses(trainer.get_criterion(), model, sample)

    def losses(self, forward: PerSentence) -> Tensor:
        return forward.losses

    def divergence(self, i: int, sigma: Optional[float] = None) -> Tensor:
        """See `Passes`; noise, and dropout masks as R3F has them, of this forward's own."""
        trainer, outputs = self._trainer, self.metrics.outputs
        assert outputs is not None
        sample, is_dummy = self._samples[i]
        if i == 0 and sigma is not None:
            seed = trainer.cfg.common.seed, trainer.get_num_updates(), TRUST_REGION
            rank = trainer.data_parallel_rank
            own = update_generator(*seed, torch.device("cpu"), rank).initial_seed()
            torch.manual_seed(own)
        with autocast(trainer.cfg), torch.autograd.profiler.record_function("sam-forward-nograd"):
            return outputs.divergence(i, trainer.get_model(), sample, sigma) * (not is_dummy)

    def chosen(self, weights: Tensor) -> Tensor:
        return most_unguarded(weights, self._sam.ascent_fraction)

    def log(self, i: int, forward: PerSentence) -> None:
        self.metrics.add(forward.logging_output, forward.sample_size, self.is_dummy(i))

    def backward(self, loss: Tensor) -> None:
        with torch.autograd.profiler.record_function("sam-backward"):
            self._trainer.optimizer.backward(loss)

    def backward_batch_loss(self, i: int) -> None:
        """Forward and backward as in fairseq's train_step."""
        trainer = self._trainer
        # The criterion's data-parallel wrapper would average gradients that belong to one rank.
        criterion = trainer.get_criterion() if self._sync.local_only else trainer.criterion
        sample, share = self._draw_part(self._samples[i][0])
        outputs = self.metrics.outputs
        with contextlib.nullcontext() if outputs is None else outputs.found_in(i):
            _, sample_size, logging_output = trainer.task.train_step(
                sample=sample,
                model=trainer.model,
                criterion=criterion,
                optimizer=trainer.optimizer,
                update_num=trainer.get_num_updates(),
                ignore_grad=self.is_dummy(i),
                **self._task_kwargs(),
            )
        self.metrics.add(logging_output, sample_size, self.is_dummy(i), share)

    def freeze_others(self) -> ContextManager[Any]:
        return self._weights.freeze_others()

    def no_sync_unless_last(self, last: bool) -> ContextManager[Any]:
        return self._sync.no_sync_unless_last(last)

    def reduce(self, figures: Tensor, op: str = "sum") -> None:
        if self._sync.needed:
            with torch.autograd.profiler.record_function("sam-reduce"):
                group = self._trainer.data_parallel_process_group
                distributed_utils.all_reduce(figures, group=group, op=op)

    def average_grads(self) -> None:
        if self._sync.needed:
            with torch.autograd.profiler.record_function("reduce-grads"):
                self._sync.average_grads()

    def check_per_sentence_losses(self) -> None:
        """Require that forwards replay, and that losses add up to the criterion's own."""
        criterion, model = self._trainer.get_criterion(), self._trainer.get_model()
        sample = self._samples[0][0]
        with torch.no_grad():
            found = []
            for _ in range(2):
                self.replay()
                found.append(self.forward(0).losses)
            first, second = found
            require_replay(criterion, first, second, self._sam.core.probe_dtype or first.dtype)
            self.replay()
            with autocast(self._trainer.cfg):
                stock = torch.as_tensor(criterion(model, sample)[0])
        require_same_sum(criterion, first, stock)

    def _draw_part(self, sample: Dict[str, Any]) -> Tuple[Dict[str, Any], float]:
        """Draw sentences of a mini-batch; return them and their share of it."""
        if not self.partial:
            return sample, 1.0
        n = number_of_sentences(sample)
        kept = draw_sentences(n, self._sam.ascent_fraction, self._generator)
        return self._take(sample, kept), len(kept) / n

    def _take(self, sample: Dict[str, Any], kept: Tensor) -> Dict[str, Any]:
        trainer = self._trainer
        multiple = trainer.cfg.dataset.required_seq_len_multiple
        return take_sentences(sample, kept, trainer.get_criterion().padding_idx, multiple)

    def _task_kwargs(self) -> Dict[str, Any]:
        trainer = self._trainer
        if trainer.cfg.ema.store_ema and getattr(trainer.task, "uses_ema", False):
            return {"ema_model": trainer.ema.get_model()}
        return {}
