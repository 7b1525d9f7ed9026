"""Moving a model's weights away and back, bit for bit."""

import contextlib
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.algorithms import copy_lists_

# Writes the other values to the tensors that it is given, one a parameter.
Writer = Callable[[List[Tensor]], Any]


class SwappedWeights:
    """Gives parameters other values for a while, by changing the storage that they point at.

    The weights themselves are never written: other values live in a second set of buffers (one
    copy of the trainable weights, kept between updates), and ``Parameter.data`` points there
    while they are in force. So to restore is to point back: exact, without arithmetic or
    allocation, possible at any moment, harmless to repeat. A live autograd graph and whatever
    else holds the original storage (a checkpoint being written, an EMA) see the original
    weights.
    """

    def __init__(self) -> None:
        self._buffers: Dict[Parameter, Tensor] = {}
        self._originals: List[Tensor] = []
        self._parameters: List[Parameter] = []

    @property
    def moved(self) -> bool:
        """Whether the parameters stand elsewhere now."""
        return bool(self._parameters)

    def values(self, parameters: Sequence[Parameter]) -> List[Tensor]:
        """The weights in the highest precision that they are kept in."""
        return [p.data for p in parameters]

    def move(self, parameters: Sequence[Parameter], write: Writer) -> Any:
        """Let ``parameters`` have the values that ``write`` writes, until `restore`.

        Returns:
            what ``write`` returns.

        Raises:
            RuntimeError: if they are moved already.
        """
        if self.moved:
            raise RuntimeError("the weights are perturbed already; restore them first")
        buffers = self.buffers(parameters)
        result = write(buffers)
        self.point(parameters, buffers)
        return result

    def buffers(self, parameters: Sequence[Parameter]) -> List[Tensor]:
        """What `move` will give to ``write``; free to be written to while nothing is moved."""
        return [self._buffer(p) for p in parameters]

    def room(self, parameters: Sequence[Parameter]) -> Optional[List[Tensor]]:
        """Tensors of at least float32 for a direction, one a parameter, if they cost no memory.

        They are `buffers`, so that a direction is gone once the weights are moved.
        """
        buffers = self.buffers(parameters)
        return None if any(b.element_size() < 4 for b in buffers) else buffers

    def _buffer(self, p: Parameter) -> Tensor:
        found = self._buffers.get(p)
        if found is None or (found.shape, found.dtype, found.device) != (
            p.shape,
            p.dtype,
            p.device,
        ):
            found = self._buffers[p] = p.data.clone()
        return found

    def point(self, parameters: Sequence[Parameter], values: Sequence[Tensor]) -> None:
        """Let ``parameters`` be these very tensors, of their dtype and device, until `restore`."""
        self._originals = [p.data for p in parameters]
        # From here on `restore` is right at any moment, also from a signal handler.
        self._parameters = list(parameters)
        for p, value in zip(parameters, values):
            p.data = value

    def restore(self) -> None:
        """Let the parameters have their own values again; does nothing when they do."""
        for p, original in zip(self._parameters, self._originals):
            p.data = original
        self._parameters, self._originals = [], []

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """The parameters' own values inside the block, what they had before after it."""
        parameters, values = self._parameters, [p.data for p in self._parameters]
        self.restore()
        try:
            yield
        finally:
            if parameters:
                self.point(parameters, values)


class OverwrittenWeights:
    """The same for half-precision weights that an optimizer keeps a float32 copy of.

    Other values are written over the weights, which are restored by rounding the float32 copy
    again, just as fairseq makes them from it after every step. No memory beside it.

    Args:
        masters: the float32 copy of every parameter, same shapes.
        gradients: of the copies, in float32, if there are. They are `room` for a direction in
            every update until the gradients of the step are copied to them.
    """

    def __init__(
        self,
        masters: Dict[Parameter, Tensor],
        gradients: Optional[Dict[Parameter, Tensor]] = None,
    ) -> None:
        self._masters = masters
        self._gradients = gradients
        self._parameters: List[Parameter] = []

    @property
    def moved(self) -> bool:
        """Whether the parameters stand elsewhere now."""
        return bool(self._parameters)

    def values(self, parameters: Sequence[Parameter]) -> List[Tensor]:
        """The weights in the highest precision that they are kept in."""
        return [self._masters[p].data for p in parameters]

    def room(self, parameters: Sequence[Parameter]) -> Optional[List[Tensor]]:
        """See `SwappedWeights.room`; what is written here stays when the weights are moved."""
        return None if self._gradients is None else [self._gradients[p] for p in parameters]

    def move(self, parameters: Sequence[Parameter], write: Writer) -> Any:
        """See `SwappedWeights.move`."""
        if self.moved:
            raise RuntimeError("the weights are perturbed already; restore them first")
        self._parameters = list(parameters)  # before the first write, for `restore`
        return write([p.data for p in parameters])

    def restore(self) -> None:
        """Let the parameters have their own values again; does nothing when they do."""
        parameters = self._parameters
        copy_lists_([p.data for p in parameters], [self._masters[p].data for p in parameters])
        self._parameters = []

    def sync_masters(self) -> None:
        """Let the float32 copy have the weights' own values where it does not round to them.

        For copies from a checkpoint whose model was changed since, by averaging for example.
        """
        for p, master in self._masters.items():
            agrees = master.data.to(p.dtype) == p.data
            master.data.copy_(torch.where(agrees, master.data, p.data.float()))

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """See `SwappedWeights.suspended`; copies the other values for the time of the block."""
        parameters, values = self._parameters, [p.data.clone() for p in self._parameters]
        self.restore()
        try:
            yield
        finally:
            self._parameters = parameters
            for p, value in zip(parameters, values):
                p.data.copy_(value)
