"""The figures that benchmark.py makes of the seconds of all rounds."""

from __future__ import annotations

import statistics
from typing import Dict, List, Sequence

from scripts.benchmark.methods import Setting

Seconds = Dict[str, Dict[str, List[float]]]  # method or pass -> wall and cpu -> of every round

FORWARD, WITHOUT_GRAPH = "forward", "forward without graph"
FORWARD_AND_BACKWARD = "forward and backward"


def spread(ratios: Sequence[float]) -> float:
    """Return half the distance between the quartiles."""
    if len(ratios) < 2:
        return 0.0
    quarters = statistics.quantiles(ratios, n=4)
    return (quarters[2] - quarters[0]) / 2


def summary(found: Seconds, setting: Setting, base: str) -> Dict[str, Dict[str, float]]:
    """Return method -> its figures, ratios to ``base``."""
    sentences = setting.batch_size * setting.update_freq * setting.processes
    out = {}
    for name, seconds in found.items():
        row = {"seconds": statistics.median(seconds["wall"])}
        row["samples_per_second"] = sentences / row["seconds"]
        for key in ("wall", "cpu"):
            ratios = [a / b for a, b in zip(seconds[key], found[base][key])]
            row[f"{key}_ratio"] = statistics.median(ratios)
            row[f"{key}_spread"] = spread(ratios)
        out[name] = row
    return out


def forwards_without_graph(setting: Setting) -> int:
    """Return how many delta-SAM makes: of the probe, in half precision on both sides of w.

    Else, where batches are accumulated, of the clean losses.
    """
    return 2 if setting.precision != "fp32" or setting.update_freq > 1 else 1


def of_passes(rows: Dict[str, Dict[str, float]], key: str) -> Dict[str, float]:
    """Return what a backward and a forward without graph take, in forwards."""
    forward = rows[FORWARD][f"{key}_ratio"]
    return {
        "backward": rows[FORWARD_AND_BACKWARD][f"{key}_ratio"] / forward - 1,
        WITHOUT_GRAPH: rows[WITHOUT_GRAPH][f"{key}_ratio"] / forward,
    }


def floors(
    found: Seconds, rows: Dict[str, Dict[str, float]], setting: Setting, key: str
) -> Dict[str, float]:
    """Return what delta-SAM / SAM is expected to be, by what it is made of, of the same rounds.

    With n forwards without graph F0 more than SAM has:

        floor of the passes     1 + n F0 / (2 (forward + backward))
        SAM + n forwards        1 + n F0 / (SAM's update)

    The first leaves out what both methods have beside passes, as the base step, so that a true
    ratio may lie below it. Passes reduce no gradients: of several processes there is only the
    second.
    """
    extra = forwards_without_graph(setting)
    out = {}
    if setting.processes == 1:
        ratios = (rows[name][f"{key}_ratio"] for name in (WITHOUT_GRAPH, FORWARD_AND_BACKWARD))
        without_graph, both = ratios
        out["floor of the passes"] = 1 + extra * without_graph / (2 * both)
    if "SAM" in found:
        forwards = "one forward" if extra == 1 else f"{extra} forwards"
        seconds = [statistics.median(found[name][key]) for name in (WITHOUT_GRAPH, "SAM")]
        out[f"SAM + {forwards}"] = 1 + extra * seconds[0] / seconds[1]
    return out
