"""The numbers of the GLUE report: over seeds, paired by seed, and relative in time."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Dict, List, NamedTuple, Optional, Sequence

from scipy import integrate, optimize, stats

from examples.glue.report.runs import PACES, Run, Runs

AVERAGE = "average"  # stands where the name of a task does
ALPHA = 0.05


class Row(NamedTuple):
    """A method on a task, over its complete seeds; None where too few are there.

    Attributes:
        n, of: complete runs; seeds that the task was run with.
        best, median, mean, std: of the runs' best epochs; std with n - 1.
        last: mean of the runs' last epochs.
        parts: means of the metric's parts at the best epochs.
        pace: updates a second: n over the sum of seconds an update.
        pace_by: how that was found, the same for all methods of the task.
        time: seconds an update relative to the method that counts as 1.
        rho, sharpness, sharpness_std: radius, and the rise of the loss there.
    """

    task: str
    method: str
    n: int
    of: int
    best: Optional[float] = None
    median: Optional[float] = None
    mean: Optional[float] = None
    std: Optional[float] = None
    last: Optional[float] = None
    parts: Dict[str, float] = {}
    pace: Optional[float] = None
    pace_by: str = ""
    time: Optional[float] = None
    rho: Optional[float] = None
    sharpness: Optional[float] = None
    sharpness_std: Optional[float] = None


class Comparison(NamedTuple):
    """A method against the baseline, by the seeds that both completed.

    Attributes:
        differences: method - baseline, by seed.
        mean, std: of the differences; std with n - 1.
        low, high: 95 % confidence interval of the mean, by Student's t.
        p: two-sided paired t-test; None for fewer than two seeds or equal differences.
        p_holm: p with Holm's correction over the methods of the task.
        p_sign: two-sided exact sign-flip test of the same differences.
    """

    task: str
    method: str
    baseline: str
    differences: Dict[int, float]
    mean: Optional[float] = None
    std: Optional[float] = None
    low: Optional[float] = None
    high: Optional[float] = None
    p: Optional[float] = None
    p_holm: Optional[float] = None
    p_sign: Optional[float] = None


# --- over seeds -------------------------------------------------------------------------------
def deviation(values: Sequence[float]) -> Optional[float]:
    """Return the standard deviation with n - 1; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def _average(values: Sequence[Optional[float]]) -> Optional[float]:
    """Return the mean; None where a value is missing or there is none."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def common_rho(runs: Sequence[Run]) -> Optional[float]:
    """Return the largest radius that every measured run was measured at; None without one."""
    radii = [set(run.rises) for run in runs if run.rises]
    shared = set.intersection(*radii) if radii else set()
    return max(shared) if shared else None


def summary(runs: Runs, one: Optional[str]) -> List[Row]:
    """Return a row for every task and method; times relative to the method ``one``."""
    rows = []
    for task in runs.tasks:
        groups = {method: runs.of(task, method) for method in runs.methods}
        complete = [run for group in groups.values() for run in group]
        way = next((p for p in PACES if all(p in r.log.paces for r in complete)), "")
        rho = common_rho(complete)
        seconds = {
            method: statistics.mean(1 / run.log.paces[way] for run in group)
            for method, group in groups.items()
            if group and way
        }
        for method, group in groups.items():
            row = Row(task, method, len(group), len(runs.seeds[task]))
            if group:
                scores = [run.best for run in group]
                last = [run.last for run in group]
                names = [n for n in group[0].parts if all(n in run.parts for run in group)]
                measured = [run.rises[rho] for run in group if rho in run.rises] if rho else []
                row = row._replace(
                    best=max(scores),
                    median=statistics.median(scores),
                    mean=statistics.mean(scores),
                    std=deviation(scores),
                    last=statistics.mean(last),
                    parts={n: statistics.mean(run.parts[n] for run in group) for n in names},
                    rho=rho if measured else None,
                    sharpness=statistics.mean(measured) if measured else None,
                    sharpness_std=deviation(measured),
                )
            if method in seconds:
                row = row._replace(pace=1 / seconds[method], pace_by=way)
                if one in seconds:
                    row = row._replace(time=seconds[method] / seconds[one])
            rows.append(row)
    return rows


def seed_averages(runs: Runs, method: str) -> Dict[int, float]:
    """Return a method's average over all tasks, for the seeds that are complete on every task."""
    by_task = [{run.seed: run.best for run in runs.of(task, method)} for task in runs.tasks]
    seeds = set.intersection(*(set(scores) for scores in by_task))
    return {seed: statistics.mean(scores[seed] for scores in by_task) for seed in sorted(seeds)}


def average_row(runs: Runs, rows: Sequence[Row], method: str) -> Row:
    """Return a method's averages over tasks; a figure that a task lacks is None.

    best, median and mean: of the tasks' figures, as papers have them.  std: of the seeds' averages.
    time: the geometric mean.
    """
    mine = [row for row in rows if row.method == method]
    by_seed = seed_averages(runs, method)
    all_seeds = {seed for seeds in runs.seeds.values() for seed in seeds}
    logs = _average([None if row.time is None else math.log(row.time) for row in mine])
    return Row(
        AVERAGE,
        method,
        len(by_seed),
        len(all_seeds),
        best=_average([row.best for row in mine]),
        median=_average([row.median for row in mine]),
        mean=_average([row.mean for row in mine]),
        std=deviation(list(by_seed.values())),
        last=_average([row.last for row in mine]),
        time=None if logs is None else math.exp(logs),
    )


# --- paired by seed ---------------------------------------------------------------------------
def sign_flip(differences: Sequence[float]) -> Optional[float]:
    """Return the two-sided exact p of "each difference is as likely with the other sign".

    The share of the 2^n sign patterns whose sum is at least as far from 0; so never below
    2 / 2^n.  None for fewer than two differences, and for more than 16.
    """
    if not 2 <= len(differences) <= 16:
        return None
    sizes = [abs(d) for d in differences]
    seen = abs(sum(differences)) - 1e-9
    patterns = itertools.product((-1, 1), repeat=len(sizes))
    hits = sum(abs(sum(s * d for s, d in zip(signs, sizes))) >= seen for signs in patterns)
    return float(hits / 2 ** len(sizes))


def holm(ps: Sequence[Optional[float]]) -> List[Optional[float]]:
    """Return Holm's adjusted p values: max over j <= i of min(1, (m - j + 1) p_(j)).

    None stays None and is not counted in m.
    """
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: List[Optional[float]] = [None] * len(ps)
    highest = 0.0
    for j, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - j) * p))
        adjusted[i] = highest
    return adjusted


def compare(
    task: str, method: str, baseline: str, scores: Dict[int, float], base: Dict[int, float]
) -> Comparison:
    """Compare two methods by the seeds that both have; p_holm is left to the caller."""
    # Logs are rounded; without the rounding here, equal differences would differ in the last bit.
    differences = {s: round(scores[s] - base[s], 9) for s in sorted(scores) if s in base}
    found = Comparison(task, method, baseline, differences)
    values = list(differences.values())
    if not values:
        return found
    mean, std = statistics.mean(values), deviation(values)
    found = found._replace(mean=mean, std=std, p_sign=sign_flip(values))
    if std is None:
        return found
    half = float(stats.t.ppf(1 - ALPHA / 2, len(values) - 1)) * std / math.sqrt(len(values))
    found = found._replace(low=mean - half, high=mean + half)
    if std == 0:  # t is 0 / 0 or infinite: no difference at all, or no test
        return found._replace(p=1.0 if mean == 0 else None)
    return found._replace(p=float(stats.ttest_1samp(values, 0.0).pvalue))


def comparisons(runs: Runs, baseline: str) -> List[Comparison]:
    """Return every method against the baseline, on every task and, with several, on average."""
    others = [method for method in runs.methods if method != baseline]
    found: List[Comparison] = []
    for task in [*runs.tasks, *([AVERAGE] if len(runs.tasks) > 1 else [])]:
        scores = {
            method: seed_averages(runs, method)
            if task == AVERAGE
            else {run.seed: run.best for run in runs.of(task, method)}
            for method in runs.methods
        }
        group = [compare(task, m, baseline, scores[m], scores[baseline]) for m in others]
        adjusted = holm([c.p for c in group])
        found += [c._replace(p_holm=p) for c, p in zip(group, adjusted)]
    return found


def least_difference(n: int) -> float:
    """Return |mean| / std of n differences at which the paired t-test reaches 0.05."""
    return float(stats.t.ppf(1 - ALPHA / 2, n - 1)) / math.sqrt(n)


def detectable_difference(n: int, power: float = 0.8) -> float:
    """Return the true difference, in standard deviations, that the paired t-test finds so often."""
    edge, df = float(stats.t.ppf(1 - ALPHA / 2, n - 1)), n - 1

    def missing(size: float) -> float:
        shift = size * math.sqrt(n)

        def found_at(s: float) -> float:  # s: the standard deviation that is seen, true one 1
            density = stats.chi.pdf(s * math.sqrt(df), df) * math.sqrt(df)
            return density * (stats.norm.sf(edge * s - shift) + stats.norm.cdf(-edge * s - shift))

        # scipy's noncentral t is not a number for few differences
        return float(integrate.quad(found_at, 0, 10, limit=200)[0]) - power

    high = 0.5
    while missing(high) < 0:
        high *= 1.5
    return float(optimize.brentq(missing, 1e-3, high))
