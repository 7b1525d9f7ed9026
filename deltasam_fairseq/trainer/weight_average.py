"""The average of a run's weights: what it holds, when it is in force, how it is saved."""

import contextlib
from typing import Any, Dict, Iterator, Mapping, Optional

import torch
from torch import Tensor
from torch.nn import Parameter

from deltasam_fairseq.algorithms import exponential_mean_, running_mean_
from deltasam_fairseq.core import SwappedWeights
from deltasam_fairseq.trainer.checkpoint_state import AVERAGES, RAW, N


class WeightAverage:
    """Mean of the weights that a run passes through, in float32.

    ``w_avg <- w_avg + a (w - w_avg)`` with ``a = 1 / (n + 1)``, or with a decay ``a = max(1 /
    (n + 1), 1 - decay)``: the uniform mean until that would forget more slowly than the decay; the
    first weights are copied. One copy of the trained weights, made at once: its memory is in use
    from the start of a run. Frozen weights and buffers are not copied: those of the model hold for
    the average.

    Under data parallelism: every rank has the same weights and computes the same average; nothing
    is sent.

    Args:
        parameters: the trained ones by name, each once, however many modules share it.
        decay: of the exponential average; None for the uniform mean.
        on_cpu: whether it is kept on the CPU.

    Attributes:
        n: number of weights that have entered.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], decay: Optional[float], on_cpu: bool
    ) -> None:
        self.n = 0
        self._parameters = dict(parameters)
        self._decay = decay
        self._on_cpu = on_cpu
        self._averages = {
            name: self._home(name, p, copy=True) for name, p in self._parameters.items()
        }
        self._weights = SwappedWeights()

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Let weights enter.

        Args:
            values: of all parameters by name, float32 where there are masters.
        """
        averages = list(self._averages.values())
        new = [values[name] for name in self._averages]
        decay = self._decay
        if decay is None or 1 / (self.n + 1) > 1 - decay:
            running_mean_(averages, new, self.n)
        else:
            exponential_mean_(averages, new, decay)
        self.n += 1

    def _home(self, name: str, value: Tensor, copy: bool = False) -> Tensor:
        """A tensor in the precision and on the device of the average."""
        device = torch.device("cpu") if self._on_cpu else self._parameters[name].device
        dtype = torch.promote_types(self._parameters[name].dtype, torch.float32)
        return value.detach().to(device=device, dtype=dtype, copy=copy)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """The parameters have the average's values inside the block, their own after it.

        Before the first weights have entered nothing changes. Parameters point at other tensors
        meanwhile: their own values are not written, so they come back bit for bit, however the
        block ends. No copy is made but where dtype or device differ, for the time of the block.
        """
        if self.n == 0 or self._weights.moved:
            yield
            return
        parameters = [self._parameters[name] for name in self._averages]
        values = [a.to(p.device, p.dtype) for a, p in zip(self._averages.values(), parameters)]
        try:
            self._weights.point(parameters, values)
            yield
        finally:
            self._weights.restore()

    @property
    def is_in_force(self) -> bool:
        """Whether the parameters have the average's values now."""
        return self._weights.moved

    def raw(self) -> Any:
        """Context in which the parameters have their own values, also inside of `in_force`."""
        return self._weights.suspended()

    # Checkpoints

    def put_into(
        self, raw: Mapping[str, Tensor], *states: Optional[Dict[str, Any]]
    ) -> Dict[str, Any]:
        """Put the float32 averages into ``state_dict`` of modules that were made while `in_force`.

        Half-precision values of such a state have been rounded. Before the first weights have
        entered, the weights themselves are put there in the same way.

        Args:
            raw: the weights from which training goes on, by name, float32 where there are masters.
            states: of the modules; written to.

        Returns:
            what a resumed run needs, on the CPU as far as it is put into ``states``: what is saved
            twice is one tensor, and stands in a file once.
        """
        values = {name: value.cpu() for name, value in (self.averages or raw).items()}
        by_address = {self._parameters[name].data_ptr(): value for name, value in values.items()}
        for state in states:
            for key, value in (state or {}).items():
                own = by_address.get(value.data_ptr()) if torch.is_tensor(value) else None
                if own is not None and own.shape == value.shape and value.numel():
                    state[key] = own  # type: ignore[index]
        if self.n == 0:
            return {N: 0, AVERAGES: {}, RAW: values}
        return {N: self.n, AVERAGES: values, RAW: dict(raw)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `put_into` returned, but for the raw weights, see `raw_weights`."""
        self.n = state[N]
        for name, value in state[AVERAGES].items():
            self._averages[name].copy_(value)

    @property
    def averages(self) -> Dict[str, Tensor]:
        """The averages by name; empty before the first weights have entered."""
        return self._averages if self.n else {}


def raw_weights(state: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> Dict[str, Tensor]:
    """The weights in what `WeightAverage.put_into` returned from which training goes on.

    Raises:
        ValueError: where they are not those of these parameters.
    """
    raw: Dict[str, Tensor] = state[RAW]
    shapes = {name: value.shape for name, value in raw.items()}
    if shapes != {name: p.shape for name, p in parameters.items()}:
        raise ValueError(
            "the checkpoint holds an average of other weights than those trained now; resume with "
            "the same model and criterion, or start again from it with --reset-optimizer or "
            "--finetune-from-model"
        )
    return raw
