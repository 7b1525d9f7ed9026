"""The numbers of the GLUE report: over seeds, paired by seed, and relative in time."""

from __future__ import annotations

import math
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from examples.glue.report.runs import Runs

AVERAGE = "average"  # the name of the average in a list of tasks
ALPHA = 0.05
SCORES = ("best", "median", "mean")


# --- over seeds -------------------------------------------------------------------------------
def summarise(runs: Runs, time_baseline: Optional[str]) -> pd.DataFrame:
    """Return a row for every task and method, over its complete runs; NaN where none are there.

    Columns:
        n, of: complete runs; seeds that the task was run with.
        best, median, mean, std: of the runs' scores (of their best epochs, or the last ones); std
            with n - 1.
        last: mean of the runs' last epochs.
        updates_per_second, timed_by: n over the sum of seconds an update; how it was measured.
        time: seconds an update relative to the method ``time_baseline``.
        rho, sharpness, sharpness_std: radius, and the rise of the loss there.
        ...: means of what was logged with the metric, at the same epochs.

    With several tasks, rows of the task AVERAGE follow: best, median, mean and last are means of
    the tasks' figures, as papers have them; std is of the seeds' averages; time is the geometric
    mean.  A figure that a task lacks is NaN in the average.
    """
    frame = runs.frame()
    complete = frame[frame.state == "complete"].assign(seconds=1 / frame.updates_per_second)
    groups = complete.groupby(["task", "method"], sort=False)
    rows = groups.agg(
        n=("best", "size"),
        best=("best", "max"),
        median=("best", "median"),
        mean=("best", "mean"),
        std=("best", "std"),
        last=("last", "mean"),
        updates_per_second=("seconds", lambda seconds: 1 / seconds.mean()),
        timed_by=("timed_by", "first"),
        rho=("rho", "first"),
        sharpness=("sharpness", "mean"),
        sharpness_std=("sharpness", "std"),
    )
    names = {name for metric in runs.tasks.values() for _, name in metric.beside}
    parts = [name for name in complete.columns if name in names]
    if parts:  # where every run has it
        rows = rows.join(groups[parts].agg(lambda part: part.mean(skipna=False)))
    every = pd.MultiIndex.from_product([runs.tasks, runs.methods], names=["task", "method"])
    rows = rows.reindex(every)
    rows["n"] = rows["n"].fillna(0).astype(int)
    rows.insert(1, "of", [len(runs.seeds[task]) for task, _ in every])
    rows["rho"] = rows["rho"].where(rows["sharpness"].notna())
    rows["timed_by"] = rows["timed_by"].fillna("")
    speed = rows["updates_per_second"].unstack("method")
    rows["time"] = math.nan
    if time_baseline is not None:
        base = speed[time_baseline].reindex(every, level="task")
        rows["time"] = base / rows["updates_per_second"]
    if len(runs.tasks) > 1:
        rows = pd.concat([rows, _averages(runs, rows)])
    return rows.reset_index()


def _averages(runs: Runs, rows: pd.DataFrame) -> pd.DataFrame:
    averages = {}
    by_seed = scores_by_seed(runs)[AVERAGE]
    for method in runs.methods:
        mine, seeds = rows.xs(method, level="method"), by_seed[method]
        means = mine[[*SCORES, "last"]].mean(skipna=False)
        averages[AVERAGE, method] = {
            "n": len(seeds),
            "of": len(set().union(*runs.seeds.values())),
            **means,
            "std": pd.Series(seeds, dtype=float).std(),
            "time": np.exp(np.log(mine["time"]).mean(skipna=False)),
            "timed_by": "",
        }
    found = pd.DataFrame.from_dict(averages, orient="index")
    return found.rename_axis(["task", "method"])


def scores_by_seed(runs: Runs) -> Dict[str, Dict[str, Dict[int, float]]]:
    """Return task -> method -> seed -> score of the complete runs.

    With several tasks, AVERAGE has the means over the tasks of the seeds that are complete on all.
    """
    scores = {
        task: {m: {run.seed: run.best for run in runs.of(task, m)} for m in runs.methods}
        for task in runs.tasks
    }
    if len(scores) > 1:
        tables = {m: pd.DataFrame([found[m] for found in scores.values()]) for m in runs.methods}
        means = {m: table.mean(skipna=False).dropna() for m, table in tables.items()}
        scores[AVERAGE] = {m: mean.sort_index().to_dict() for m, mean in means.items()}
    return scores


# --- paired by seed ---------------------------------------------------------------------------
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


def sign_flip(differences: Sequence[float]) -> Optional[float]:
    """Return the two-sided exact p of "each difference is as likely with the other sign".

    The share of the 2^n sign patterns whose sum is at least as far from 0; so never below
    2 / 2^n.  None for fewer than two differences, and for more than 16.
    """
    if not 2 <= len(differences) <= 16:
        return None

    def total(values: np.ndarray, axis: int) -> np.ndarray:
        return np.round(values.sum(axis=axis), 9)  # patterns with equal sums are equal

    return float(
        stats.permutation_test(
            (np.asarray(differences),),
            total,
            permutation_type="samples",
            vectorized=True,
            n_resamples=2**17,  # more than there are patterns: all of them
        ).pvalue
    )


def holm(ps: Sequence[Optional[float]]) -> List[Optional[float]]:
    """Return Holm's adjusted p values: max over j <= i of min(1, (m - j + 1) p_(j)).

    None stays None and is not counted in m.  By hand: scipy has no step-down correction.
    """
    known = pd.Series(ps, dtype=float).dropna().sort_values()
    adjusted = (known * np.arange(len(known), 0, -1)).clip(upper=1.0).cummax()
    return [adjusted.get(i) for i in range(len(ps))]


def compare(
    task: str, method: str, baseline: str, scores: Dict[int, float], base: Dict[int, float]
) -> Comparison:
    """Compare two methods by the seeds that both have; p_holm is left to the caller."""
    # Logs are rounded; without the rounding here, equal differences would differ in the last bit.
    differences = {s: round(scores[s] - base[s], 9) for s in sorted(scores) if s in base}
    found = Comparison(task, method, baseline, differences)
    values = np.array(list(differences.values()))
    if not values.size:
        return found
    found = found._replace(mean=float(values.mean()), p_sign=sign_flip(list(values)))
    if len(values) < 2:
        return found
    if np.ptp(values) == 0:  # t is 0 / 0 or infinite: no difference at all, or no test
        return found._replace(
            std=0.0, low=found.mean, high=found.mean, p=None if values.any() else 1.0
        )
    test = stats.ttest_1samp(values, 0.0)
    low, high = map(float, test.confidence_interval(1 - ALPHA))
    return found._replace(std=float(values.std(ddof=1)), low=low, high=high, p=float(test.pvalue))


def comparisons(runs: Runs, baseline: str) -> List[Comparison]:
    """Return every method against the baseline, on every task and, with several, on average."""
    found: List[Comparison] = []
    for task, scores in scores_by_seed(runs).items():
        others = [method for method in runs.methods if method != baseline]
        group = [compare(task, m, baseline, scores[m], scores[baseline]) for m in others]
        adjusted = holm([c.p for c in group])
        found += [c._replace(p_holm=p) for c, p in zip(group, adjusted)]
    return found


def least_difference(n: int) -> float:
    """Return |mean| / std of n differences at which the paired t-test reaches 0.05."""
    return float(stats.t.ppf(1 - ALPHA / 2, n - 1)) / math.sqrt(n)


def detectable_difference(n: int, power: float = 0.8) -> float:
    """Return the true difference, in standard deviations, that the paired t-test finds so often.

    t^2 is noncentral F with n size^2; scipy's noncentral t is not a number for few differences.
    """
    edge = n * least_difference(n) ** 2
    nc = optimize.brentq(lambda nc: special.ncfdtr(1, n - 1, nc, edge) - (1 - power), 1e-6, 1e4)
    return math.sqrt(nc / n)
