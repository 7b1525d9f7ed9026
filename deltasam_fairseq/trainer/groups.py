"""An ascent for every group of M sentences of the global batch (--sam-micro, m-sharpness).

fairseq's train_step gets the groups as micro-batches. Each time it asks for the next group, the
weights move to ``w + eps_k`` of that group; so reduction, scaling, clipping and checks of the
descent are fairseq's own. The global order of sentences is fairseq's: of R ranks, rank r has the
mini-batches r, R + r, 2 R + r, ... of an update.

A group on one rank needs no communication. The gradient of a group that spans ranks is reduced, and
all ranks come to these reductions in the order of the groups.
"""

import contextlib
from typing import Any, Callable, ContextManager, Dict, Iterator, List, NamedTuple, Optional, Union

import torch
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from torch import Tensor

from deltasam_fairseq.algorithms import Part, groups_of
from deltasam_fairseq.core import AscentFigures, RngReplay
from deltasam_fairseq.optim import SharpnessAwareOptimizer
from deltasam_fairseq.trainer.ascent import AscentStep, FairseqPasses, Prepared
from deltasam_fairseq.trainer.gradient_sync import GradientSync
from deltasam_fairseq.trainer.metrics import StepMetrics
from deltasam_fairseq.trainer.perturbed_weights import PerturbedWeights
from deltasam_fairseq.trainer.subsampling import number_of_sentences, take_sentences

_OPTION = "--sam-micro"


class GroupSync(GradientSync):
    """Reduces the gradient of one group, in one piece, if the group spans ranks."""

    spans = False

    @property
    def needed(self) -> bool:
        return self.spans

    @property
    def local_only(self) -> bool:
        return True

    def average_grads(self) -> None:
        trainer = self._trainer
        self._weights.average_grads(
            trainer.data_parallel_world_size, trainer.data_parallel_process_group
        )


class Group(NamedTuple):
    """What this rank has of a group.

    Attributes:
        number: of the group in the global order.
        samples: the rank's sentences, a mini-batch for each that they are from.
        spans: whether other ranks have sentences of the group.
        share: of the group's sentences that are this rank's, 0 to 1.
    """

    number: int
    samples: List[Prepared]
    spans: bool
    share: float


class GroupedAscents(AscentStep):
    """Moves fairseq's model to ``w + eps_k`` of each group, before fairseq's pass over it.

    Raises:
        ValueError: torch's wrapper would communicate where other ranks do not.
    """

    def __init__(
        self, trainer: Trainer, sam: SharpnessAwareOptimizer, weights: PerturbedWeights
    ) -> None:
        super().__init__(trainer, sam, weights)
        cfg = trainer.cfg.distributed_training
        if trainer.data_parallel_world_size == 1 or cfg.ddp_backend == "legacy_ddp":
            return
        criterion = utils.has_parameters(trainer.get_criterion())
        if criterion or cfg.broadcast_buffers or not cfg.find_unused_parameters:
            raise ValueError(
                f"{_OPTION} {sam.micro}: ranks have different groups, but --ddp-backend "
                f"{cfg.ddp_backend} lets them communicate in forwards (--broadcast-buffers, or "
                "without --find-unused-parameters) and in backwards (a criterion with weights); "
                "use --ddp-backend legacy_ddp"
            )

    def run(
        self, samples: List[Prepared], replay: RngReplay, loss_scale: Union[float, Tensor]
    ) -> StepMetrics:
        """Choose the groups; the ascents come later, in `samples_of_descent`.

        Raises:
            ValueError: if mini-batches cannot be cut, see `take_sentences`.
        """
        trainer = self._trainer
        trainer.criterion.train()
        trainer.zero_grad()
        self._replay, self._scale = replay, loss_scale
        self._groups = self._choose(samples)
        self._realised: List[Tensor] = []
        sums = trainer.task.logging_outputs_can_be_summed(trainer.get_criterion())
        self._log = StepMetrics(per_rank=True, sums=sums)
        self._log.figures = AscentFigures()
        self._log.figures.gnorm = torch.zeros((), dtype=torch.float64)
        self._compare_draws(self._log)
        return self._log

    def samples_of_descent(
        self, ready: List[Any], errors: Callable[[], ContextManager[None]]
    ) -> Any:
        return GroupedSamples(ready, self._groups, self._ascend, errors)

    def _choose(self, samples: List[Prepared]) -> List[Group]:
        """Return the groups of which this rank has sentences, and those that span ranks."""
        trainer = self._trainer
        ranks, rank = trainer.data_parallel_world_size, trainer.data_parallel_rank
        own = [0 if dummy else number_of_sentences(s, _OPTION) for s, dummy in samples]
        groups = []
        for number, parts in enumerate(groups_of(self._sizes(own), self._sam.micro or 1)):
            spans = len({part.batch % ranks for part in parts}) > 1
            mine = [part for part in parts if part.batch % ranks == rank]
            if mine or spans:
                taken = [(self._take(samples[p.batch // ranks][0], p), False) for p in mine]
                count, of = (sum(p.end - p.begin for p in some) for some in (mine, parts))
                groups.append(Group(number, taken, spans, count / of))
        if not any(own):  # fairseq's pass over a dummy, without which reductions would wait
            groups.append(Group(0, samples[:1], False, 0.0))
        return groups

    def _sizes(self, own: List[int]) -> List[int]:
        """Return the number of sentences of every mini-batch of all ranks, in the global order."""
        trainer = self._trainer
        if trainer.data_parallel_world_size == 1:
            return own
        counts = torch.zeros(
            len(own), trainer.data_parallel_world_size, dtype=torch.long, device=trainer.device
        )
        counts[:, trainer.data_parallel_rank] = torch.tensor(own, device=trainer.device)
        distributed_utils.all_reduce(counts, group=trainer.data_parallel_process_group)
        return counts.flatten().tolist()

    def _take(self, sample: Dict[str, Any], part: Part) -> Dict[str, Any]:
        n = number_of_sentences(sample, _OPTION)
        if (part.begin, part.end) == (0, n):
            return sample
        trainer = self._trainer
        multiple = trainer.cfg.dataset.required_seq_len_multiple
        kept = torch.arange(part.begin, part.end)
        return take_sentences(sample, kept, trainer.get_criterion().padding_idx, multiple, _OPTION)

    def _ascend(self, group: Group) -> None:
        """``w -> w + eps_k``; a rank without sentences of the group takes part in its reduction."""
        trainer, sam = self._trainer, self._sam
        sync = GroupSync(trainer, sam, self._weights)
        sync.spans = group.spans
        with self._gradients_aside():
            if not group.samples:
                sync.average_grads()
                return
            sam.core.weights.restore()
            here = self._replay.from_here()
            passes = FairseqPasses(
                trainer, sam, self._weights, sync, group.samples, here, self._scale, self._log
            )
            # Every group rounds by random numbers of its own, the first by SAM's.
            seed = trainer.cfg.common.seed + (group.number << 32)
            found = self._ascent.run(passes, seed, trainer.get_num_updates())
            here()
        figures = self._log.figures
        figures.gnorm = figures.gnorm + group.share * found.gnorm
        figures.rho = found.rho
        if found.realised is not None:
            self._realised.append(found.realised)
            figures.realised = torch.stack(self._realised).mean()

    @contextlib.contextmanager
    def _gradients_aside(self) -> Iterator[None]:
        """Keep the gradients of the groups before, of the descent, out of an ascent."""
        params = self._weights.trained
        found = [p.grad for p in params]
        for p in params:
            p.grad = None
        try:
            yield
        finally:
            for p, grad in zip(params, found):
                p.grad = grad


class GroupedSamples:
    """This rank's groups as fairseq's list of micro-batches; the weights move as it is read.

    Args:
        whole: the micro-batches.
        groups: of `GroupedAscents`.
        ascend: moves the weights.
        errors: the context of an ascent.
    """

    def __init__(
        self,
        whole: List[Any],
        groups: List[Group],
        ascend: Callable[[Group], None],
        errors: Callable[[], ContextManager[None]],
    ) -> None:
        self.whole = whole
        self._groups: Optional[List[Group]] = groups
        self._count = sum(len(group.samples) for group in groups)
        self._ascend, self._errors = ascend, errors

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        """Once with the ascents; then the micro-batches, in which fairseq looks for a NaN."""
        groups, self._groups = self._groups, None
        return iter(self.whole) if groups is None else self._walk(groups)

    def _walk(self, groups: List[Group]) -> Iterator[Any]:
        last = max(i for i, group in enumerate(groups) if group.samples)
        for i, group in enumerate(groups[: last + 1]):
            with self._errors():
                self._ascend(group)
                # fairseq reduces in the pass over the last one, after all groups' reductions.
                for other in groups[last + 1 :] if i == last else ():
                    self._ascend(other)
            for sample, is_dummy in group.samples:
                yield None if is_dummy else sample
