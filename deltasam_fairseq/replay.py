"""The same dropout masks in every forward of an update."""

import random
from typing import Callable

import numpy as np


class Replay:
    """Puts all random generators back to where they are when an update begins.

    fairseq seeds torch's generators, on all devices, from seed and update number; Python's and
    numpy's, which a model or criterion may use as well, are recorded here. Calling the object
    before every pass over the micro-batches makes the passes draw the same numbers, and leaves
    the generators after the update where they are without SAM.

    Args:
        set_seed: seeds torch's generators for this update, fairseq's ``Trainer._set_seed``.
    """

    def __init__(self, set_seed: Callable[[], None]) -> None:
        self._set_seed = set_seed
        self._python = random.getstate()
        self._numpy = np.random.get_state()

    def __call__(self) -> None:
        self._set_seed()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
