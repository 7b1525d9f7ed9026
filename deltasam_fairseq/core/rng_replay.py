"""The same dropout masks and buffers in every forward of an update."""

import math
import random
from typing import Callable, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from deltasam_fairseq.algorithms import unit_roundoff

# How far losses that should be equal may be apart in float32, relative. Another order of summation
# moves them by 1e-6, a probe by 3e-5, other dropout masks by 1e-2 (docs/algorithm.md).
_REPLAYED = 1e-5


class RngReplay:
    """Puts the random generators back to where they are when an update begins.

    Calling the object before every pass over the micro-batches makes the passes draw the same
    numbers, and leaves the generators after the update where they are without SAM. fairseq
    seeds torch's generators, on all devices, from seed and update number. Python's and numpy's,
    which a few models draw from (wav2vec's layer drop), are recorded here and put back.

    Args:
        set_seed: seeds torch's generators for this update, fairseq's ``Trainer._set_seed``.
        host: whether Python's and numpy's generators take part. They must not where fairseq
            loads data in a thread of this process: the thread draws from the same generators,
            and putting them back under its hands would change the data.
        buffers: what the forwards of an update write to beside gradients (power iteration of
            spectral norm, running statistics): every pass begins with them as the first did.
    """

    def __init__(
        self, set_seed: Callable[[], None], host: bool, buffers: Sequence[Tensor] = ()
    ) -> None:
        self._set_seed = set_seed
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]
        self._host: Optional[Tuple] = (random.getstate(), np.random.get_state()) if host else None

    def from_here(self) -> "RngReplay":
        """Return another one, of where the generators and the buffers are now."""
        cpu = torch.get_rng_state()
        device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

        def restore() -> None:
            torch.set_rng_state(cpu)
            if device is not None:
                torch.cuda.set_rng_state(device)

        return RngReplay(restore, self._host is not None, [buffer for buffer, _ in self._buffers])

    def __call__(self) -> None:
        self._set_seed()
        for buffer, value in self._buffers:
            buffer.data.copy_(value)
        if self._host is not None:
            python, numpy = self._host
            random.setstate(python)
            np.random.set_state(numpy)


def furthest_off(first: Tensor, second: Tensor, dtype: torch.dtype) -> Optional[int]:
    """Return the sentence whose losses differ most between two forwards that should be alike.

    Args:
        first, second: losses of the same sentences from the same random state, shape (B,).
        dtype: that the model computes in. Kernels that are not deterministic may move every logit
            by a unit in the last place, ``2u`` of it, and two of them a loss by ``4u``.

    Returns:
        its index; None if no two losses differ by more than rounding does.
    """
    if not len(first):
        return None
    excess = (first - second).abs() / first.abs().clamp(min=1.0)
    j = int(excess.nan_to_num(0.0, 0.0).argmax())
    off = math.isfinite(excess[j]) and excess[j] > max(_REPLAYED, 4 * unit_roundoff(dtype))
    return j if off else None
