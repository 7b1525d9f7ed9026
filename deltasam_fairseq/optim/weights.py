"""Moving a model's weights away and back, bit for bit."""

import contextlib
from typing import Iterator, List, Optional, Sequence

from torch import Tensor
from torch.nn import Parameter


class MovedWeights:
    """Gives parameters other values for a while, by changing the storage that they point at.

    The weights themselves are never written: perturbed values live in a second set of buffers
    (one copy of the trainable weights, kept between updates), and ``Parameter.data`` points
    there while they are in force. So to restore is to point back: exact, without arithmetic or
    allocation, possible at any moment, harmless to repeat. A live autograd graph and whatever
    else holds the original storage (a checkpoint being written, an EMA) see the original
    weights.
    """

    def __init__(self) -> None:
        self._buffers: List[Tensor] = []
        self._originals: List[Tensor] = []
        self._parameters: List[Parameter] = []

    @property
    def moved(self) -> bool:
        """Whether the parameters stand elsewhere now."""
        return bool(self._parameters)

    def buffers(self, parameters: Sequence[Parameter]) -> List[Tensor]:
        """Buffers to write the other values to, one a parameter, same shapes and dtypes."""
        if len(self._buffers) != len(parameters) or any(
            b.shape != p.shape or b.dtype != p.dtype or b.device != p.device
            for b, p in zip(self._buffers, parameters)
        ):
            self._buffers = [p.data.clone() for p in parameters]
        return self._buffers

    def move(self, parameters: Sequence[Parameter], values: Sequence[Tensor]) -> None:
        """Let ``parameters`` have ``values`` until `restore`.

        Raises:
            RuntimeError: if they are moved already.
        """
        if self.moved:
            raise RuntimeError("the weights are perturbed already; restore them first")
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
        parameters: Optional[List[Parameter]] = self._parameters or None
        values = [p.data for p in self._parameters]
        self.restore()
        try:
            yield
        finally:
            if parameters is not None:
                self.move(parameters, values)
