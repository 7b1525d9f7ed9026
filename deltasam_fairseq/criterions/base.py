"""Base of the criterions with a regulariser: what they share, whatever the task.

A regulariser is an object that makes the loss of every sentence out of forwards of a `Batch`. A
criterion joins one of them with a kind of task. It takes part in training in two ways:

- fairseq's own step, and SAM's ascent, call `forward` and then ``backward`` on its result;
- delta-SAM's ascent calls `per_sentence_losses` and weighs them.

A regulariser with backward passes of its own (the inner steps of FreeLB, SMART and VAT) takes them
with ``torch.autograd.grad`` inside the forward, on the model out of its data-parallel wrapper:
nothing lands in ``Parameter.grad`` before the one backward that fairseq calls, so accumulation,
gradient reduction, loss scaling and dummy batches are fairseq's own. Gradients of weights that
such an inner pass has already made (FreeLB) are added in that backward, see
`PrecomputedGrads`.
"""

from typing import Any, Callable, ClassVar, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type

import torch
from fairseq.dataclass import FairseqDataclass
from torch import Tensor, nn
from torch.nn import Parameter

from deltasam_fairseq.criterions.batch import Batch
from deltasam_fairseq.criterions.embeddings import unwrapped
from deltasam_fairseq.options import check_options

Weights = Callable[[], Dict[str, Tensor]]


class PrecomputedGrads(NamedTuple):
    """Gradients of a part of the loss whose graph is gone.

    Attributes:
        weights: those that have a part in it. Others must not be named: a data-parallel wrapper
            takes any weight of the graph for one that is used.
        grads: of that part, times ``scale``.
        scale: loss scale of the inner passes.
    """

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    scale: float


class RegularisedLosses(NamedTuple):
    """What a regulariser returns.

    Attributes:
        losses: loss of every sentence, regulariser included, shape (B,).
        scores: of the clean forward, for accuracy and the like.
        terms: figures for the log, one a sentence each, shape (B,).
        precomputed: gradients that belong to the sum of the losses but not to their graph.
    """

    losses: Tensor
    scores: Tensor
    terms: Dict[str, Tensor]
    precomputed: Optional[PrecomputedGrads] = None


def plain_losses(batch: Batch) -> RegularisedLosses:
    """The task's losses, from one forward."""
    scores = batch.scores()
    return RegularisedLosses(batch.objective.losses(scores), scores, {})


class _AddPrecomputedGrads(torch.autograd.Function):
    """The loss, whose backward adds gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, precomputed: PrecomputedGrads, *weights: Tensor) -> Tensor:
        ctx.precomputed = precomputed
        return loss.clone()  # fairseq multiplies the loss of a dummy batch by 0, in place

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tuple[Optional[Tensor], ...]:
        ratio = grad_output / ctx.precomputed.scale
        return (grad_output, None, *(g * ratio.to(g.dtype) for g in ctx.precomputed.grads))


class Regulariser:
    """Makes the loss of every sentence; one subclass a method.

    Args:
        cfg: the criterion's configuration.

    Attributes:
        TERMS: keys of the figures that it adds to the log, means over sentences (over target
            tokens in sequence-to-sequence tasks).
        INNER_BACKWARD: whether it has backward passes of its own.
        SEVERAL_MASKS: whether its forwards draw dropout, and layers to drop, each time.
    """

    TERMS: ClassVar[Tuple[str, ...]] = ()
    INNER_BACKWARD: ClassVar[bool] = False
    SEVERAL_MASKS: ClassVar[bool] = False

    def __init__(self, cfg: Any) -> None:
        """A method without options has nothing to keep."""

    def __call__(self, batch: Batch, sum_only: bool) -> RegularisedLosses:
        """Losses in training.

        Args:
            batch: model and mini-batch.
            sum_only: whether gradients will be asked for of the sum of the losses alone.
        """
        raise NotImplementedError

    @classmethod
    def check_training(cls, cfg: Any) -> None:
        """Check what training needs beside options in their range, such as files.

        Args:
            cfg: the criterion's configuration.

        Raises:
            ValueError, FileNotFoundError: naming the option, its value and what to do.
        """

    def before_training(self, task: Any) -> None:
        """Called once, before the first update.

        Args:
            task: fairseq's, set up.
        """

    def before_update(self, model: nn.Module, weights: Weights, update: int) -> None:
        """Called before every update.

        Args:
            model: out of its wrappers.
            weights: returns its weights by parameter name, float32 where there are masters.
            update: number of updates done.
        """

    def after_update(self, weights: Weights) -> None:
        """Called after every update that was made.

        Args:
            weights: returns the new ones, as in `before_update`.
        """

    def state_dict(self) -> Dict[str, Any]:
        """What a resumed run needs beside the model's weights; tensors and plain values."""
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Put a `state_dict` back."""


class RegularisedCriterion:
    """Mixin of the criterions; a kind of task provides `batch` and `logging_output`.

    Attributes:
        sentences_are_independent: whether the loss of a sentence is the same in every batch; if
            not, options that take a part of a batch are refused.
    """

    sentences_are_independent: ClassVar[bool] = True

    regulariser_class: ClassVar[Type[Regulariser]]
    config_class: ClassVar[Type[FairseqDataclass]]
    task_name: ClassVar[Optional[str]] = None  # of the only task that it is for

    def _set_up(self, cfg: Any) -> None:
        self.check(cfg)
        self.regulariser = self.regulariser_class(cfg)
        self._loss_scale = 1.0

    @classmethod
    def check(cls, cfg: Any) -> None:
        """Check the options before anything is loaded.

        Raises:
            ValueError: naming the option, its value, what is allowed and what to do.
        """
        check_options(cfg, cls.config_class)

    def batch(self, model: nn.Module, sample: Dict[str, Any], loss_scale: float) -> Batch:
        raise NotImplementedError

    def logging_output(
        self, model: nn.Module, sample: Dict[str, Any], batch: Batch, result: RegularisedLosses
    ) -> Tuple[Any, Dict[str, Any]]:
        """Sample size and figures for the log, as fairseq's criterions return them."""
        raise NotImplementedError

    def _compute(
        self, model: nn.Module, sample: Dict[str, Any], sum_only: bool
    ) -> Tuple[RegularisedLosses, Any, Dict[str, Any]]:
        batch = self.batch(model, sample, self._loss_scale)
        if model.training:
            result = self.regulariser(batch, sum_only and torch.is_grad_enabled())
        else:
            result = plain_losses(batch)
        sample_size, logging_output = self.logging_output(model, sample, batch, result)
        logging_output["loss"] = result.losses.detach().sum()
        for key, term in result.terms.items():
            logging_output[key] = term.detach().sum()
        return result, sample_size, logging_output

    def forward(
        self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Sum of the losses, sample size, logging output, as of all of fairseq's criterions."""
        result, sample_size, logging_output = self._compute(model, sample, sum_only=reduce)
        if not reduce:
            return result.losses, sample_size, logging_output
        loss = result.losses.sum()
        if result.precomputed is not None:
            loss = _AddPrecomputedGrads.apply(loss, result.precomputed, *result.precomputed.weights)
        return loss, sample_size, logging_output

    def per_sentence_losses(
        self, model: nn.Module, sample: Dict[str, Any]
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Losses of shape (B,), sample size, logging output, for delta-SAM."""
        result, sample_size, logging_output = self._compute(model, sample, sum_only=False)
        return result.losses, sample_size, logging_output

    # What the trainer says

    def before_training(self) -> None:
        """The trainer is built; evaluation alone never says this."""
        self.regulariser.before_training(self.task)  # type: ignore[attr-defined]

    def before_update(
        self, model: nn.Module, weights: Weights, update: int, loss_scale: float
    ) -> None:
        """The trainer is about to make an update."""
        self._loss_scale = loss_scale
        self.regulariser.before_update(unwrapped(model), weights, update)

    def after_update(self, weights: Weights) -> None:
        """The trainer has made an update."""
        self.regulariser.after_update(weights)


def trainable(model: nn.Module) -> List[Parameter]:
    """The model's weights that are trained."""
    return [p for p in unwrapped(model).parameters() if p.requires_grad]
