"""Make the GLUE report's tables and sentences of its numbers, for report.md.jinja."""

from __future__ import annotations

import html
import platform
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import pandas as pd

from deltasam_fairseq.data.splits import read_record
from deltasam_fairseq.markdown import markdown_table
from examples.glue.report.numbers import (
    ALPHA,
    AVERAGE,
    SCORES,
    Comparison,
    comparisons,
    detectable_difference,
    least_difference,
    summarise,
)
from examples.glue.report.runs import EARLY, Run, Runs


class Report(NamedTuple):
    """All that the report is made of.

    Attributes:
        time_baseline: the method whose running time counts as 1; None without one.
        rows: of every task and method, then the averages over tasks of every method.
        paper: paper.json.
    """

    runs: Runs
    baseline: Optional[str]
    time_baseline: Optional[str]
    rows: pd.DataFrame
    compared: List[Comparison]
    paper: Dict[str, Any]

    def row(self, task: str, method: str) -> pd.Series:
        """Return one row."""
        return self.rows[(self.rows.task == task) & (self.rows.method == method)].iloc[0]

    def columns(self) -> List[str]:
        """Return the tasks, and the average where there are several."""
        return list(dict.fromkeys(self.rows.task))


def make(
    runs: Runs, baseline: Optional[str], time_baseline: Optional[str], paper: Dict[str, Any]
) -> Report:
    """Return the report's numbers."""
    compared = comparisons(runs, baseline) if baseline else []
    rows = summarise(runs, time_baseline)
    return Report(runs, baseline, time_baseline, rows, compared, paper)


# --- cells ------------------------------------------------------------------------------------
def number(value: Optional[float], digits: int = 1, sign: str = "") -> str:
    """Return a figure for a table; a dash for none."""
    if value is None or pd.isna(value):
        return "–"
    text = f"{value:{sign}.{digits}f}"
    return text.lstrip("+-") if not float(text) else text.replace("-", "−")


def spread(mean: Optional[float], std: Optional[float], digits: int = 1) -> str:
    """Return mean ± standard deviation."""
    return number(mean, digits) + ("" if pd.isna(std) else f" ± {number(std, digits)}")


def probability(p: Optional[float]) -> str:
    """Return a p value, so that it can be seen on which side of 0.05 it is."""
    if p is None or p < 0.001:
        return "–" if p is None else "< 0.001"
    return f"{p:.4f}" if f"{p:.3f}" == f"{ALPHA:.3f}" else f"{p:.3f}"


def emphasised(column: Sequence[float], cells: Sequence[str]) -> List[str]:
    """Return the cells with the highest figure of the column in bold, as papers print it."""
    rounded = pd.Series(column, dtype=float).round(1)
    known, best = rounded.notna().sum(), rounded.max()
    return [f"**{c}**" if known > 1 and v == best else c for v, c in zip(rounded, cells)]


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with its caption, nothing without rows; names may hold any signs."""
    if not rows:
        return ""
    cells = [[html.escape(cell, quote=False) for cell in row] for row in (head, *rows)]
    return f"**{html.escape(caption, quote=False)}**\n\n{markdown_table(cells[0], cells[1:])}"


def quoted(names: Sequence[str]) -> str:
    """Return names as code, with commas between."""
    return ", ".join(f"`{name}`" for name in names)


# --- scores and times -------------------------------------------------------------------------
def _paper_rows(report: Report, statistic: str) -> List[List[str]]:
    rows = []
    for entry in report.paper.get("entries", ()):
        if entry["statistic"] == statistic and set(entry["scores"]) & set(report.columns()):
            digits = {"time": 2, "minutes": 0}.get(statistic, 1)
            scores = [number(entry["scores"].get(task), digits) for task in report.columns()]
            rows.append([f"*{entry['method']} (paper, {entry['where']})*", *scores])
    return rows


def _complete_of_all(report: Report, row: pd.Series) -> Tuple[int, int]:
    """Return complete and all runs of a row; for an average, of all tasks."""
    tasks = report.runs.tasks if row.task == AVERAGE else [row.task]
    mine = report.rows[(report.rows.method == row.method) & report.rows.task.isin(tasks)]
    return int(mine.n.sum()), int(mine.of.sum())


def overview(report: Report, statistic: str) -> str:
    """Return the table of methods by tasks, for best, median or mean."""
    lines = [[method] for method in report.runs.methods]
    for task in report.columns():
        rows = report.rows[report.rows.task == task]
        stds = rows["std"] if statistic == "mean" else [None] * len(rows)
        cells = [spread(value, std) for value, std in zip(rows[statistic], stds)]
        cells = emphasised(rows[statistic], cells)
        for line, cell, (_, row) in zip(lines, cells, rows.iterrows()):
            n, of = _complete_of_all(report, row)
            line.append(f"{cell} ({n}/{of})" if n < of else cell)
    counts = {len(seeds) for seeds in report.runs.seeds.values()}
    count = counts.pop() if len(counts) == 1 else None
    of_seeds = "the seeds" if count is None else f"{count} seed{'s' * (count != 1)}"
    name = {"mean": "Mean ± standard deviation"}.get(statistic, statistic.capitalize())
    head = ["method", *report.columns()]
    return table(f"{name} of {of_seeds}", head, lines + _paper_rows(report, statistic))


def times(report: Report) -> str:
    """Return the table of seconds an update."""
    rows = [
        [m, *(number(report.row(task, m).time, 2) for task in report.columns())]
        for m in report.runs.methods
    ]
    caption = f"Seconds an update, {report.time_baseline} = 1.00"
    return table(caption, ["method", *report.columns()], rows + _paper_rows(report, "time"))


def paper_minutes(report: Report) -> str:
    """Return the paper's table of minutes a training; of ours only the ratios are comparable."""
    head = ["method", *report.columns()]
    return table("Minutes of a training in the paper", head, _paper_rows(report, "minutes"))


def timings(report: Report) -> str:
    """Return how the times of the tasks were measured."""
    ways = {task: report.runs.timed_by(task) for task in report.runs.tasks}
    return "; ".join(
        f"{way} ({', '.join(task for task in ways if ways[task] == way)})"
        for way in sorted({way for way in ways.values() if way})
    )


# --- differences ------------------------------------------------------------------------------
def difference_table(found: Sequence[Comparison], caption: str) -> str:
    """Return the table of comparisons, and which methods lack a seed for one."""
    rows = [
        [
            c.method,
            str(len(c.differences)),
            number(c.mean, 2, "+"),
            number(c.std, 2),
            "–" if c.low is None else f"{number(c.low, 2, '+')} to {number(c.high, 2, '+')}",
            probability(c.p),
            probability(c.p_holm),
            "–" if c.p_sign is None else f"{c.p_sign:.3g}",
        ]
        for c in found
        if c.differences
    ]
    head = ["method", "n", "mean", "std", "95 % interval", "p", "p, Holm", "p, sign flips"]
    lacking = [c.method for c in found if not c.differences]
    missing = f"{caption}: no seed that both completed for {quoted(lacking)}." if lacking else ""
    return "\n\n".join(filter(None, (table(caption, head, rows), missing)))


def mean_differences(report: Report) -> str:
    """Return the table of mean differences by task, marked where the test finds them."""
    found = {(c.task, c.method): c for c in report.compared}
    rows = []
    for method in report.runs.methods:
        if method != report.baseline:
            mine = [found[task, method] for task in report.columns()]
            marks = [" †" if (c.p_holm or 1.0) < ALPHA else "" for c in mine]
            rows.append([method, *(number(c.mean, 2, "+") + m for c, m in zip(mine, marks))])
    head = ["method", *report.columns()]
    return table(f"Mean difference to {report.baseline}", head, rows)


def what_n_can_show(found: Sequence[Comparison]) -> List[str]:
    """Return a sentence for each number of paired seeds."""
    points = []
    for n in sorted({len(c.differences) for c in found if c.differences}, reverse=True):
        if n == 1:
            points.append("With **n = 1** there is a difference and no test: noise is unknown.")
            continue
        points.append(
            f"With **n = {n}** the t-test gives p < {ALPHA:g} only if the mean difference is more "
            f"than {least_difference(n):.2f} standard deviations of the differences, before any "
            "correction, and a true difference is found in 80 % of repetitions only if it is "
            f"{detectable_difference(n):.2f} standard deviations. The sign-flip test cannot give "
            f"less than {2 / 2**n:.3g}" + (f", so never {ALPHA:g}." if 2 / 2**n >= ALPHA else ".")
        )
    return points


def in_short(report: Report) -> List[str]:
    """Return the findings as sentences."""
    points = []
    task = report.columns()[-1]
    rows = report.rows[report.rows.task == task]
    known = rows.dropna(subset=["mean"]).sort_values("mean", ascending=False, kind="stable")
    where = "on average over the tasks" if task == AVERAGE else f"on {task}"
    if len(known) > 1:
        order = ", ".join(f"`{m}` {number(v)}" for m, v in zip(known.method, known["mean"]))
        points.append(f"Mean of the seeds {where}, highest first: {order}.")
    found = [c for c in report.compared if c.p_holm is not None and c.p_holm < ALPHA]
    tests = sum(c.p is not None for c in report.compared)
    if found:
        by_method = {c.method: [o for o in found if o.method == c.method] for c in found}
        text = "; ".join(
            f"`{method}` " + ", ".join(f"{c.task} {number(c.mean, 2, '+')}" for c in mine)
            for method, mine in by_method.items()
        )
        points.append(
            f"Differences to `{report.baseline}` that the paired t-test finds (p < {ALPHA:g} after "
            f"Holm's correction, {len(found)} of {tests}): {text}."
        )
    elif tests:
        points.append(
            f"No difference to `{report.baseline}` is found by the paired t-test after Holm's "
            f"correction ({tests} tested). That is not evidence of equality."
        )
    else:
        points.append("Nothing could be tested: that takes two seeds of two methods.")
    timed = rows.dropna(subset=["time"])
    text = ", ".join(f"`{m}` {number(t, 2)}" for m, t in zip(timed.method, timed.time))
    if text and len(rows) > 1:
        points.append(f"Time an update, `{report.time_baseline}` = 1: {text}.")
    return points


def data_facts(runs: Sequence[Run]) -> str:
    """Return how many rows the runs' data has and which labels are wrong, as its task.json says;
    empty where it is not there any more.
    """
    folders = sorted({run.settings["data"] for run in runs if "data" in run.settings})
    record = read_record(Path(folders[0])) if len(folders) == 1 else {}
    splits = record.get("splits", {})
    if not splits:
        return ""
    rows = [f"{name} {entry['rows']}" for name, entry in splits.items()]
    text = f"Rows: {', '.join(rows)}."
    if "hold_out" in record:
        text += f" `valid` is {record['hold_out']:.0%} of train.tsv, held out."
    if "train_rows" in record:
        text += " The training rows were drawn from train.tsv (seed {seed}).".format(
            **record["train_rows"]
        )
    if "label_noise" in record:
        text += " **{share:.0%} of the training labels are wrong** (seed {seed}).".format(
            **record["label_noise"]
        )
    return text


# --- a task -----------------------------------------------------------------------------------
def task_section(report: Report, task: str) -> Dict[str, Any]:
    """Return what the report says of a task."""
    metric = report.runs.tasks[task]
    everyone = report.rows[report.rows.task == task]
    rows = everyone[everyone.n > 0]
    parts = [name for _, name in metric.beside if name in rows and rows[name].notna().any()]
    rho = rows.rho.max()
    by_name = {
        "method": rows.method,
        "seeds": [f"{n} of {of}" for n, of in zip(rows.n, rows.of)],
        "best": emphasised(rows.best, [number(v) for v in rows.best]),
        "median": emphasised(rows["median"], [number(v) for v in rows["median"]]),
        "mean ± std": emphasised(
            rows["mean"], [spread(*pair) for pair in zip(rows["mean"], rows["std"])]
        ),
        **{name: [number(v) for v in rows[name]] for name in parts},
        "last epoch": [number(v) for v in rows["last"]],
    }
    if rho == rho:
        pairs = zip(rows.sharpness, rows.sharpness_std)
        by_name[f"sharpness (rho {rho:g})"] = [spread(*pair, 4) for pair in pairs]
    by_name["updates/s"] = [number(v, 2) for v in rows.updates_per_second]
    by_name["time"] = [number(v, 2) for v in rows.time]
    counted = set(rows.method)
    found = [c for c in report.compared if c.task == task and c.method in counted]
    return {
        "name": task,
        "metric": metric,
        "rows": data_facts(report.runs.complete(task)),
        "scores": table(f"{task}, {metric.name}", list(by_name), list(zip(*by_name.values()))),
        "lacking": quoted(everyone.method[everyone.n == 0]),
        "differences": difference_table(found, f"{task}: difference to {report.baseline}"),
        "png": "task-" + "".join(c if c.isalnum() or c in "-_" else "-" for c in task) + ".png",
    }


def uncounted(report: Report) -> str:
    """Return the table of the runs that are in no other table; empty if there are none."""
    rows: List[List[str]] = []
    for run in report.runs.runs:
        if run.state == "complete":
            continue
        others = report.runs.of(run.task, run.method, None)
        row = [run.task, run.method, str(run.seed), run.state, run.why]
        if all(other.state == "missing" for other in others):
            row[2:] = ["all", "missing", "the method was not run on this task"]
        if row not in rows:
            rows.append(row)
    rows.sort(key=lambda row: row[2] != "all")
    return table("Not counted", ["task", "method", "seed", "state", "why"], rows)


# --- how the runs were made -------------------------------------------------------------------
_OF_THE_RUN = {"seed", "log_file", "save_dir", "tensorboard_logdir", "distributed_init_method"}
_OF_THE_RUN |= {"distributed_port", "wandb_project", "results_path", "plasma_path"}
_SHOWN = (
    "data model parameters finetune_from_model restore_file criterion optimizer lr lr_scheduler "
    "warmup_updates total_num_update batch_size max_tokens update_freq max_epoch max_update "
    "weight_decay adam_betas adam_eps clip_norm dropout attention_dropout fp16 bf16 amp "
    "distributed_world_size devices device user_dir"
).split()


def _options(run: Run) -> Dict[str, str]:
    return {**run.settings, **run.log.facts}


def _values(group: Sequence[Run], key: str) -> str:
    """Return an option of a method's runs; all its values where they are not alike."""
    return " / ".join(dict.fromkeys(_options(run).get(key, "–") for run in group))


def _differing(group: Sequence[Run]) -> List[str]:
    """Return the options that runs of known options differ in, but for those of each run."""
    group = [run for run in group if run.settings] or group
    keys: Set[str] = set().union(*map(_options, group)) - _OF_THE_RUN
    return sorted(key for key in keys if len({_values([run], key) for run in group}) > 1)


def mixed(report: Report) -> List[str]:
    """Return which methods' runs of one task were made with different options."""
    points = []
    for task in report.runs.tasks:
        for method in report.runs.methods:
            group = report.runs.of(task, method)
            for key in _differing(group):
                points.append(f"{task} {method}: `{key}` {_values(group, key)}")
    return points


def how_made(report: Report, task: str) -> Dict[str, Any]:
    """Return how the complete runs of a task were made."""
    methods = [method for method in report.runs.methods if not method.endswith(EARLY)]
    groups = {m: report.runs.of(task, m) for m in methods}
    groups = {method: group for method, group in groups.items() if group}
    everyone = [run for group in groups.values() for run in group]
    seeds = ", ".join(map(str, report.runs.seeds[task]))
    differ = _differing(everyone)
    alike = [k for k in _SHOWN if k not in differ and any(k in _options(r) for r in everyone)]
    columns = [[key, *(_values(group, key) for group in groups.values())] for key in differ]
    others = [
        f"`{run.method}` seed {run.seed} (recorded: {run.settings['seed']})"
        for run in everyone
        if run.settings.get("seed", str(run.seed)) != str(run.seed)
    ]
    return {
        "name": task,
        "alike": table(
            f"{task}, seeds {seeds}: the same in all runs",
            ["option", "value"],
            [[k, _values(everyone, k)] for k in alike],
        ),
        "differ": table(f"{task}: options that differ", ["option", *groups], columns),
        "resumed": ", ".join(
            f"`{run.method}` seed {run.seed} ({run.log.starts} starts)"
            for run in everyone
            if run.log.starts > 1
        ),
        "other_seeds": ", ".join(others),
        "unknown": quoted([m for m, g in groups.items() if not all(r.settings for r in g)]),
        "commands": {
            f"Command of {task}, {method}, seed {group[0].seed}": html.escape(
                " ".join(shlex.quote(str(word)) for word in group[0].command), quote=False
            )
            for method, group in groups.items()
            if group[0].command
        },
    }


def versions() -> str:
    """Return the versions of what this environment has."""
    text = [f"Python {platform.python_version()}"]
    for package in ("deltasam_fairseq", "fairseq-fixed", "fairseq", "torch", "scipy", "matplotlib"):
        try:
            text.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(text)


def context(report: Report) -> Dict[str, Any]:
    """Return what report.md.jinja shows."""
    runs = report.runs
    task = report.columns()[-1]
    baseline = report.baseline
    name = "average over all tasks" if task == AVERAGE else task
    here = [c for c in report.compared if c.task == task]
    return {
        "methods": len(runs.methods),
        "tasks": [task_section(report, task) for task in runs.tasks],
        "complete": sum(run.state == "complete" for run in runs.runs),
        "all": len(runs.runs),
        "last": runs.scored == "last",
        "early": any(method.endswith(EARLY) for method in runs.methods),
        "mixed": "; ".join(mixed(report)),
        "in_short": in_short(report),
        "overviews": [overview(report, statistic) for statistic in reversed(SCORES)],
        "baseline": baseline,
        "can_show": what_n_can_show(report.compared),
        "differences": difference_table(here, f"Difference to {baseline}, {name}"),
        "mean_differences": mean_differences(report) if task == AVERAGE else "",
        "alpha": ALPHA,
        "time_baseline": report.time_baseline,
        "times": times(report) if report.time_baseline else "",
        "timings": timings(report),
        "paper": report.paper,
        "paper_minutes": paper_minutes(report),
        "uncounted": uncounted(report),
        "made": [how_made(report, task) for task in runs.tasks],
        "versions": versions(),
    }
