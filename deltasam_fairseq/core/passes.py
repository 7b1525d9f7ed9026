"""Interface to a training loop: forwards and backwards over its micro-batches."""

import contextlib
from typing import Any, ContextManager, Generic, Optional, TypeVar, Union

from torch import Tensor

# What a loop's forward returns beside the losses is its own; see `Passes.losses`.
Forward = TypeVar("Forward")


class Passes(Generic[Forward]):
    """This process's micro-batches of one update, and the passes over them.

    fairseq's trainer and the plain PyTorch loop each implement it.

    Attributes:
        count: number of micro-batches, the same on every process.
        partial: whether `chosen` takes some of the sentences only.
        per_sentence: whether `forward` has a loss of every sentence.
        scale: ``p.grad`` after `average_grads` is the gradient of the loss summed over all
            sentences of all processes, times this: the loss scale, over the number of processes
            where gradients are averaged.
    """

    count: int
    partial = False
    per_sentence = False
    scale: Union[float, Tensor] = 1.0

    def replay(self) -> None:
        """Put random generators and buffers where the update began; before every pass."""
        raise NotImplementedError

    def is_dummy(self, i: int) -> bool:
        """Whether micro-batch ``i`` stands for one that this process does not have."""
        return False

    def forward(self, i: int, kept: Optional[Tensor] = None) -> Forward:
        """Compute the losses of micro-batch ``i``, with a graph where gradients are enabled.

        Args:
            kept: indices of the sentences, sorted, shape (kept,); default: all.
        """
        raise NotImplementedError

    def losses(self, forward: Forward) -> Tensor:
        """Return the losses of the sentences of a `forward`, shape (B,)."""
        raise NotImplementedError

    def divergence(self, i: int, sigma: Optional[float] = None) -> Tensor:
        """Return how far the outputs of micro-batch ``i`` are from those at w.

        The latter are those of the last `forward` or `backward_batch_loss`.

        Args:
            sigma: standard deviation of noise on the inputs, under other dropout masks. None: no
                noise; the weights are not w, the masks are those of the generators as they are.

        Returns:
            sum over predictions and their number, shape (2,); see `trust_region_sums`.
        """
        raise NotImplementedError

    def chosen(self, weights: Tensor) -> Tensor:
        """Return which sentences of a micro-batch the gradient is computed from; for `partial`.

        Args:
            weights: of its sentences, shape (B,).
        """
        raise NotImplementedError

    def log(self, i: int, forward: Forward) -> None:
        """Take the figures of micro-batch ``i`` at w from this forward; once an ascent."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss``, times the loss scale."""
        raise NotImplementedError

    def backward_batch_loss(self, i: int) -> None:
        """Forward, log and backward of the loop's own loss of micro-batch ``i`` (SAM)."""
        raise NotImplementedError

    def freeze_others(self) -> ContextManager[Any]:
        """Return a context in which backward computes gradients of the perturbed weights only."""
        return contextlib.nullcontext()

    def no_sync_unless_last(self, last: bool) -> ContextManager[Any]:
        """Return a context whose forward and backward reduce gradients only if ``last``."""
        return contextlib.nullcontext()

    def reduce(self, figures: Tensor, op: str = "sum") -> None:
        """Add ``figures`` up over the processes of the ascent, in place.

        Args:
            op: ``sum``, or ``max`` for the maximum.
        """

    def average_grads(self) -> None:
        """Average over processes the gradients that the backward did not average."""
