"""Where the time of an update goes: by the names that fairseq and this package give the profiler.

Both mark what they do with ``torch.autograd.profiler.record_function``. `PhaseClock` stands in for
it and adds up time, with the device's work awaited at each mark; a phase inside another counts for
itself alone.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from typing import Any, Callable, Dict, Iterator, List

import torch

REST = "rest: preparation, checks, log"
NAMES = {  # mark -> what the table calls it; in this order
    "sam-forward": "forward",
    "forward": "forward",
    "sam-forward-nograd": "forward without graph",
    "backward": "backward",
    "sam-backward": "backward",
    "sam-draw": "probe: draw",
    "sam-perturb": "perturb, norms",
    "sam-restore": "restore",
    "sam-reweight": "weights of the sentences",
    "sam-log": "log of the ascent",
    "sam-ascent": "rest of the ascent",
    "sam-reduce": "reduce",
    "reduce-grads": "reduce",
    "multiply-grads": "scale the gradient",
    "clip-grads": "norm of the gradient",
    "optimizer": "base step",
}
# What SAM and delta-SAM add beside forwards and backwards.
ADDED = (
    "probe: draw",
    "perturb, norms",
    "restore",
    "weights of the sentences",
    "log of the ascent",
    "rest of the ascent",
)


class PhaseClock:
    """Adds up the time of every mark.

    Args:
        wait: returns when the device has done its work.
        clock: of the time, in seconds.
    """

    def __init__(self, wait: Callable[[], None], clock: Callable[[], float]) -> None:
        self.seconds: Dict[str, float] = defaultdict(float)
        self._wait, self._clock = wait, clock
        self._open: List[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        self._wait()
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside for ``name``."""
        self._turn()
        self._open.append(NAMES.get(name, name))
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Listen to the marks while inside."""
        own = torch.autograd.profiler.record_function
        torch.autograd.profiler.record_function = self._mark  # type: ignore[assignment,misc]
        try:
            with self.phase(REST):
                yield
        finally:
            torch.autograd.profiler.record_function = own  # type: ignore[misc]

    def _mark(self, name: str, args: Any = None) -> Any:
        return self.phase(name) if name in NAMES else contextlib.nullcontext()


def phases(
    update: Callable[[], None],
    rounds: int,
    wait: Callable[[], None],
    clock: Any = time.perf_counter,
) -> Dict[str, float]:
    """Return the mean seconds of each phase of an update."""
    listener = PhaseClock(wait, clock)
    for _ in range(rounds):
        with listener.running():
            update()
    order = list(dict.fromkeys(NAMES.values())) + [REST]
    return {name: listener.seconds[name] / rounds for name in order if name in listener.seconds}
