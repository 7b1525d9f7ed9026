"""Read fairseq's JSON log (``--log-format json --log-file train.log``)."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

Figures = Dict[str, float]  # valid_loss, train_ups, ...

# How updates a second were measured, the most exact way first.
LOG_INTERVALS = "log intervals"
TRAIN_WALL = "train_wall"
WHOLE_EPOCHS = "whole epochs, with validation"
TIMINGS = (LOG_INTERVALS, TRAIN_WALL, WHOLE_EPOCHS)

_START = re.compile(r"\{'_name': None, 'common'")  # fairseq prints its configuration at every start
_FACTS = (
    ("parameters", re.compile(r"num\. shared model params: ([\d,]+)")),
    ("devices", re.compile(r"training on (\d+) devices")),
    ("device", re.compile(r"rank +0: capabilities.*name = (.+?) *$")),
)


class Log(NamedTuple):
    """What a train.log says.

    Attributes:
        epochs: figures of each epoch, in order.
        updates_per_second: by the way they were measured, one of ``TIMINGS``.
        facts: number of parameters and devices, name of the device, as fairseq printed them.
        done: fairseq ended the training itself.
        starts: how often training was started; above 1, the run was resumed.
    """

    epochs: List[Figures] = []
    updates_per_second: Dict[str, float] = {}
    facts: Dict[str, str] = {}
    done: bool = False
    starts: int = 0

    @property
    def last_epoch(self) -> int:
        """The number of the last epoch; 0 without one."""
        return int(self.epochs[-1]["epoch"]) if self.epochs else 0


def read_figures(line: str) -> Figures:
    """Return the numbers of a JSON line; none for any other line, or one that was cut off."""
    try:
        stats = json.loads(line[line.index('{"epoch"') :])
    except ValueError:
        return {}
    found = {}
    for key, value in stats.items():
        try:  # numbers come as strings; validation also logs lists of predictions
            found[key] = float(value)
        except (TypeError, ValueError):
            continue
    return found


def read_log(path: Path) -> Log:
    """Read a train.log.

    A resumed run logs some epochs again: the last time counts, and where it went back further, the
    later epochs of the earlier attempt are dropped.  Of several validations in one epoch the last
    counts.

    Updates a second are taken from log intervals in which nothing else happened (no start, no
    validation, no saving); else from the time that fairseq measured inside training steps (whole
    seconds an epoch); else from whole epochs.
    """
    epochs: Dict[int, Figures] = {}
    facts: Dict[str, str] = {}
    done, starts = False, 0
    before: Optional[float] = None  # updates when a clean interval began
    updates = elapsed = 0.0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if _START.search(line):
            done, starts, before = False, starts + 1, None
        elif "done training in" in line:
            done = True
        elif '{"epoch"' not in line:
            for key, pattern in _FACTS:
                match = pattern.search(line)
                if match:
                    facts[key] = match.group(1)
        else:
            figures = read_figures(line)
            if not figures:
                continue
            number = int(figures["epoch"])
            epochs = {n: epoch for n, epoch in epochs.items() if n <= number}
            if "update" not in figures:  # the end of an epoch
                epochs.setdefault(number, {}).update(figures)
                before = None
                continue
            now, ups = figures.get("num_updates", 0.0), figures.get("ups", 0.0)
            if before is not None and now > before and ups > 0:
                updates, elapsed = updates + now - before, elapsed + (now - before) / ups
            before = now
    ordered = [epochs[number] for number in sorted(epochs)]
    timings = _timings_of_epochs(ordered)
    if elapsed > 0:
        timings[LOG_INTERVALS] = updates / elapsed
    return Log(ordered, timings, facts, done, max(starts, 1))


def _timings_of_epochs(epochs: Sequence[Figures]) -> Dict[str, float]:
    trained = [epoch for epoch in epochs if "train_num_updates" in epoch]
    counts = [epoch["train_num_updates"] for epoch in trained]
    made = [after - before for before, after in zip([0.0, *counts], counts)]
    wall = sum(epoch.get("train_train_wall", math.nan) for epoch in trained)
    whole = sum(n / max(epoch.get("train_ups", 0.0), 1e-9) for n, epoch in zip(made, trained))
    seconds = {TRAIN_WALL: wall, WHOLE_EPOCHS: whole}
    return {name: sum(made) / s for name, s in seconds.items() if trained and 0 < s < 1e8}
