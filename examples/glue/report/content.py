"""What the GLUE report says: its sections as blocks, from its numbers."""

from __future__ import annotations

import datetime
import platform
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from examples.glue.report.numbers import (
    ALPHA,
    AVERAGE,
    Comparison,
    Row,
    average_row,
    comparisons,
    detectable_difference,
    least_difference,
    summary,
)
from examples.glue.report.page import Block, Bullets, Details, Figures, Heading, Table, Text
from examples.glue.report.plots import as_png, as_svg, looks, panels
from examples.glue.report.runs import Metric, Run, Runs


class Report(NamedTuple):
    """All that the page is made of.

    Attributes:
        one: the method whose running time counts as 1; None without one.
        rows: of every task and method, then the averages over tasks of every method.
        paper: paper.json.
    """

    runs: Runs
    baseline: Optional[str]
    one: Optional[str]
    rows: List[Row]
    compared: List[Comparison]
    paper: Dict[str, Any]

    def row(self, task: str, method: str) -> Row:
        """Return one row."""
        return next(r for r in self.rows if (r.task, r.method) == (task, method))


def make(runs: Runs, baseline: Optional[str], one: Optional[str], paper: Dict[str, Any]) -> Report:
    """Return the report's numbers."""
    rows = summary(runs, one)
    rows += [average_row(runs, rows, method) for method in runs.methods]
    compared = comparisons(runs, baseline) if baseline else []
    return Report(runs, baseline, one, rows, compared, paper)


# --- cells ------------------------------------------------------------------------------------
def number(value: Optional[float], digits: int = 1, sign: str = "") -> str:
    """Return a figure for a table; a dash for none."""
    if value is None:
        return "–"
    text = f"{value:{sign}.{digits}f}"
    return text.lstrip("+-") if not float(text) else text.replace("-", "−")


def spread(mean: Optional[float], std: Optional[float], digits: int = 1) -> str:
    """Return mean ± standard deviation."""
    return number(mean, digits) + ("" if std is None else f" ± {number(std, digits)}")


def probability(p: Optional[float]) -> str:
    """Return a p value, so that it can be seen on which side of 0.05 it is."""
    if p is None or p < 0.001:
        return "–" if p is None else "< 0.001"
    return f"{p:.4f}" if f"{p:.3f}" == f"{ALPHA:.3f}" else f"{p:.3f}"


def emphasised(column: Sequence[Optional[float]], cells: Sequence[str]) -> List[str]:
    """Return the cells with the highest figure of the column in bold, as papers print it."""
    known = [round(v, 1) for v in column if v is not None]
    return [
        f"**{cell}**" if len(known) > 1 and v is not None and round(v, 1) == max(known) else cell
        for v, cell in zip(column, cells)
    ]


# --- sections ---------------------------------------------------------------------------------
def columns(report: Report) -> List[str]:
    """Return the tasks, and the average where there are several."""
    return [*report.runs.tasks, *([AVERAGE] if len(report.runs.tasks) > 1 else [])]


def _paper_rows(report: Report, statistic: str) -> List[List[str]]:
    rows = []
    for entry in report.paper.get("entries", ()):
        if entry["statistic"] == statistic and set(entry["scores"]) & set(columns(report)):
            digits = 2 if statistic == "time" else 1
            scores = [number(entry["scores"].get(task), digits) for task in columns(report)]
            rows.append([f"{entry['method']} (paper, {entry['where']})", *scores])
    return rows


def _runs_in(report: Report, row: Row) -> Tuple[int, int]:
    """Return complete and all runs of a row; for an average, of all tasks."""
    if row.task != AVERAGE:
        return row.n, row.of
    mine = [report.row(task, row.method) for task in report.runs.tasks]
    return sum(r.n for r in mine), sum(r.of for r in mine)


def _overview(report: Report, statistic: str) -> Table:
    """Return methods by tasks, for best, median or mean."""
    table = [[method] for method in report.runs.methods]
    for task in columns(report):
        rows = [report.row(task, method) for method in report.runs.methods]
        values = [getattr(row, statistic) for row in rows]
        cells = [
            spread(v, row.std) if statistic == "mean" and v is not None else number(v)
            for v, row in zip(values, rows)
        ]
        for line, row, cell in zip(table, rows, emphasised(values, cells)):
            n, all_ = _runs_in(report, row)
            line.append(f"{cell} ({n}/{all_})" if n < all_ else cell)
    paper = _paper_rows(report, statistic)
    counts = {len(seeds) for seeds in report.runs.seeds.values()}
    of = " of the seeds"
    if len(counts) == 1:
        count = counts.pop()
        of = f" of {count} seed{'s' * (count != 1)}"
    caption = {
        "best": f"Best{of}",
        "median": f"Median{of}",
        "mean": f"Mean ± standard deviation{of}",
    }[statistic]
    papers = range(len(table), len(table) + len(paper))
    return Table(caption, ["method", *columns(report)], table + paper, papers)


def _times(report: Report) -> List[Block]:
    if report.one is None:
        return [Text("No method's name begins with sam, so there is nothing to be relative to.")]
    table = [
        [m, *(number(report.row(task, m).time, 2) for task in columns(report))]
        for m in report.runs.methods
    ]
    paper = _paper_rows(report, "time")
    caption = f"Seconds an update, {report.one} = 1.00"
    papers = range(len(table), len(table) + len(paper))
    ways = sorted({r.pace_by for r in report.rows if r.pace_by})
    told = "; ".join(
        f"{way} ({', '.join(dict.fromkeys(r.task for r in report.rows if r.pace_by == way))})"
        for way in ways
    )
    return [
        Table(caption, ["method", *columns(report)], table + paper, papers),
        Text(
            "Validation, saving and starting are not counted, unless a task's logs hold nothing "
            f"finer than whole epochs. Taken from {told}. The average is the geometric "
            "mean. The ratios are worth as much as the machine was left to itself.",
            "note",
        ),
    ]


def _comparison_table(found: Sequence[Comparison], caption: str) -> List[Block]:
    rows = []
    for c in found:
        if not c.differences:
            continue
        interval = "–"
        if c.low is not None:
            interval = f"{number(c.low, 2, '+')} to {number(c.high, 2, '+')}"
        rows.append(
            [
                c.method,
                str(len(c.differences)),
                number(c.mean, 2, "+"),
                number(c.std, 2),
                interval,
                probability(c.p),
                probability(c.p_holm),
                "–" if c.p_sign is None else f"{c.p_sign:.3g}",
            ]
        )
    head = ["method", "n", "mean", "std", "95 % interval", "p", "p, Holm", "p, sign flips"]
    lacking = [f"`{c.method}`" for c in found if not c.differences]
    blocks: List[Block] = [Table(caption, head, rows)] if rows else []
    if lacking:
        told = f"{caption}: no seed that both completed for {', '.join(lacking)}."
        blocks.append(Text(told, "note"))
    return blocks


def _what_n_can_show(found: Sequence[Comparison]) -> List[str]:
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


def _comparisons(report: Report) -> List[Block]:
    if not report.baseline:
        return [Text("There is no baseline among the methods: give one with `--baseline`.")]
    task = AVERAGE if len(report.runs.tasks) > 1 else next(iter(report.runs.tasks))
    name = "average over all tasks" if task == AVERAGE else task
    here = [c for c in report.compared if c.task == task]
    blocks: List[Block] = [
        Text(
            f"Differences to `{report.baseline}` in points, seed by seed: the same seed gives both "
            "methods the same order of data and the same new head. **p**: two-sided paired t-test "
            "(Student's t on the n differences). **Holm**: corrected for the methods compared "
            "within the task. **Sign flips**: exact two-sided permutation test of the same "
            "differences, which assumes no normal distribution."
        ),
        Bullets(_what_n_can_show(report.compared)),
        *_comparison_table(here, f"Difference to {report.baseline}, {name}"),
    ]
    if task == AVERAGE:
        table = []
        for method in report.runs.methods:
            if method != report.baseline:
                mine = {c.task: c for c in report.compared if c.method == method}
                table.append([method, *(_mean_and_mark(mine[t]) for t in columns(report))])
        blocks += (
            []
            if not table
            else [
                Text(
                    "The average of a seed is over its scores on all tasks, and needs all.", "note"
                ),
                Table(f"Mean difference to {report.baseline}", ["method", *columns(report)], table),
                Text(f"† p < {ALPHA:g} after Holm's correction within the task.", "note"),
            ]
        )
    return blocks


def _mean_and_mark(c: Comparison) -> str:
    found = c.p_holm is not None and c.p_holm < ALPHA
    return number(c.mean, 2, "+") + (" †" if found else "")


def _in_short(report: Report) -> List[str]:
    """Return the findings as sentences."""
    points = []
    task = columns(report)[-1]
    means = {m: report.row(task, m).mean for m in report.runs.methods}
    known = {m: v for m, v in means.items() if v is not None}
    where = "on average over the tasks" if task == AVERAGE else f"on {task}"
    if len(known) > 1:
        ranked = sorted(known, key=lambda m: -known[m])
        order = ", ".join(f"`{m}` {number(known[m])}" for m in ranked)
        points.append(f"Mean of the seeds {where}, highest first: {order}.")
    found = [c for c in report.compared if c.p_holm is not None and c.p_holm < ALPHA]
    tests = sum(c.p is not None for c in report.compared)
    if found:
        by_method = {c.method: [o for o in found if o.method == c.method] for c in found}
        told = "; ".join(
            f"`{method}` " + ", ".join(f"{c.task} {number(c.mean, 2, '+')}" for c in mine)
            for method, mine in by_method.items()
        )
        points.append(
            f"Differences to `{report.baseline}` that the paired t-test finds (p < {ALPHA:g} after "
            f"Holm's correction, {len(found)} of {tests}): {told}."
        )
    elif tests:
        points.append(
            f"No difference to `{report.baseline}` is found by the paired t-test after Holm's "
            f"correction ({tests} tested). That is not evidence of equality."
        )
    else:
        points.append("Nothing could be tested: that takes two seeds of two methods.")
    times = [(m, report.row(task, m).time) for m in report.runs.methods]
    told = ", ".join(f"`{m}` {number(t, 2)}" for m, t in times if t is not None)
    if told and len(times) > 1:
        points.append(f"Time an update, `{report.one}` = 1: {told}.")
    return points


HOW_TO_READ = [
    "A run's score is that of its **best epoch on the development data**, as GLUE papers report "
    "it. An epoch chosen by the data that it is scored on is optimistic, more so with more epochs "
    "and with noisier tasks; the score at the last epoch is beside it.",
    "**Best of the seeds** grows with the number of seeds and with a method's variance. Compare "
    "it only between rows with equally many, and rather look at median and mean.",
    "Scores are as the logs have them, in percent with one decimal. `±` is the standard deviation "
    "over seeds, with n − 1: the spread of runs, not the error of the mean.",
    "**Only complete runs count.** `3/5` beside a figure says that it is of 3 of the 5 seeds that "
    "the task was run with; in an average, of the runs of all tasks. "
    "[The others](#runs-that-are-left-out) are listed. A run that broke off because it diverged is "
    "missing too, which flatters its method.",
    "Bold is the highest of our rows, without regard to whether the difference means anything.",
    "Equal hyperparameters are not equally good ones. What differs between the methods' settings "
    "is [listed](#how-the-runs-were-made).",
]


def _task(report: Report, task: str, metric: Metric, out: Path, index: int) -> List[Block]:
    everyone = [report.row(task, method) for method in report.runs.methods]
    rows = [row for row in everyone if row.n]
    parts = list(dict.fromkeys(name for row in rows for name in row.parts))
    rho = next((row.rho for row in rows if row.rho), None)
    table = []
    for row in rows:
        line = [row.method, f"{row.n} of {row.of}"]
        line += [number(row.best), number(row.median), spread(row.mean, row.std)]
        line += [number(row.parts.get(name)) for name in parts]
        line += [number(row.last), *([spread(row.sharpness, row.sharpness_std, 4)] if rho else [])]
        line += [number(row.pace, 2), number(row.time, 2)]
        table.append(line)
    for column, name in ((2, "best"), (3, "median"), (4, "mean")):
        cells = emphasised([getattr(row, name) for row in rows], [line[column] for line in table])
        for line, cell in zip(table, cells):
            line[column] = cell
    head = ["method", "seeds", "best", "median", "mean ± std", *parts, "last epoch"]
    head += [*([f"sharpness (rho {rho:g})"] if rho else []), "updates/s", "time"]
    name = _name("task", task)
    blocks: List[Block] = [
        Heading(3, task),
        Text(f"Score: {metric.name} (`{metric.key}`), development data."),
    ]
    if rows:
        blocks.append(Table(f"{task}, {metric.name}", head, table))
    lacking = [f"`{row.method}`" for row in everyone if not row.n]
    if lacking:
        told = f"Without a complete run on {task}: {', '.join(lacking)}; see "
        blocks.append(Text(told + "[what is left out](#runs-that-are-left-out).", "note"))
    here = {row.method for row in rows}  # of the others it has just been said
    found = [c for c in report.compared if c.task == task and c.method in here]
    if found:
        blocks += _comparison_table(found, f"{task}: difference to {report.baseline}")
    drawn = looks(report.runs.methods)
    pictures = panels(report.runs, task, metric, report.compared, drawn)
    if pictures:
        seen = {m: look for m, look in drawn.items() if report.runs.of(task, m)}
        png = f"{name}.png"
        as_png(pictures, seen, out / png)
        svgs = [as_svg(panel, f"f{index}-{i}") for i, panel in enumerate(pictures)]
        text = (
            f"Complete runs on {task}. Over epochs: mean and range of the seeds. Differences: a "
            "point a seed, their mean and its 95 % interval. Losses as fairseq logs them; that of "
            "training is of each method's own criterion, so not alike in what it adds up. "
            "Sharpness of the minimum: a point a run, the bar is the mean."
        )
        blocks.append(Figures(svgs, png, seen, text))
    return blocks


def _name(kind: str, text: str) -> str:
    """Return a name for links and files."""
    return kind + "-" + "".join(c if c.isalnum() or c in "-_" else "-" for c in text)


def _left_out(report: Report) -> List[Block]:
    others = [run for run in report.runs.runs if run.state != "complete"]
    if not others:
        return [Text("None: every method was completed with every seed of its task.")]
    never = {
        (run.task, run.method)
        for run in others
        if not [r for r in report.runs.of(run.task, run.method, None) if r.state != "missing"]
    }
    rows = [
        [task, method, "all", "missing", "the method was not run on this task"]
        for task in report.runs.tasks
        for method in report.runs.methods
        if (task, method) in never
    ]
    rows += [
        [run.task, run.method, str(run.seed), run.state, run.why]
        for run in others
        if (run.task, run.method) not in never
    ]
    return [Table("Not in any table", ["task", "method", "seed", "state", "why"], rows)]


# --- how the runs were made -------------------------------------------------------------------
_OF_THE_RUN = {"seed", "log_file", "save_dir", "tensorboard_logdir", "distributed_init_method"}
_OF_THE_RUN |= {"distributed_port", "wandb_project", "results_path", "plasma_path"}
_OF_THE_RUN |= {"filename"}  # of the log that hydra writes
_TOLD = (
    "data arch parameters finetune_from_model restore_file criterion optimizer lr lr_scheduler "
    "warmup_updates total_num_update batch_size max_tokens update_freq max_epoch max_update "
    "weight_decay adam_betas adam_eps clip_norm dropout attention_dropout fp16 bf16 amp "
    "distributed_world_size devices device user_dir"
).split()


def _settings(group: Sequence[Run], key: str) -> str:
    """Return an option of a method's runs; all its values where they are not alike."""
    values = list(dict.fromkeys(run.log.settings.get(key, "–") for run in group))
    return " / ".join(values)


def _options(group: Sequence[Run]) -> Set[str]:
    """Return the options that runs were trained with, but for those that are each run's own."""
    return set().union(*(run.log.settings for run in group)) - _OF_THE_RUN


def _differing(group: Sequence[Run]) -> List[str]:
    """Return the options that runs differ in."""
    keys = sorted(_options(group))
    return [key for key in keys if len({_settings([run], key) for run in group}) > 1]


def _mixed(report: Report) -> List[str]:
    """Tell which methods' runs of one task were made with different options."""
    told = []
    for task in report.runs.tasks:
        for method in report.runs.methods:
            group = report.runs.of(task, method)
            for key in _differing(group):
                told.append(f"{task} {method}: `{key}` {_settings(group, key)}")
    return told


def _how_made(report: Report) -> List[Block]:
    blocks: List[Block] = []
    for task in report.runs.tasks:
        groups = {m: report.runs.of(task, m) for m in report.runs.methods}
        groups = {m: group for m, group in groups.items() if group}
        everyone = [run for group in groups.values() for run in group]
        keys = _options(everyone)
        if not keys:
            if everyone:
                blocks.append(Text(f"**{task}**: the logs do not hold fairseq's options.", "note"))
            continue
        differ = _differing(everyone)
        alike = [key for key in _TOLD if key in keys and key not in differ]
        resumed = [f"`{r.method}` seed {r.seed}" for r in everyone if r.log.starts > 1]
        seeds = ", ".join(map(str, report.runs.seeds[task]))
        told = " ".join(f"`{key}={_settings(everyone, key)}`" for key in alike)
        blocks.append(Text(f"**{task}**, seeds {seeds}. The same in all runs: {told}"))
        if resumed:
            blocks.append(Text(f"Started more than once: {', '.join(resumed)}.", "note"))
        other = [
            f"`{r.method}` seed {r.seed} (log: {r.log.settings['seed']})"
            for r in everyone
            if r.log.settings.get("seed", str(r.seed)) != str(r.seed)
        ]
        if other:
            told = f"The log's seed is not the folder's: {', '.join(other)}. "
            blocks.append(Text(told + "Runs are paired by the folder's.", "warning"))
        if differ:
            rows = [[key, *(_settings(group, key) for group in groups.values())] for key in differ]
            blocks.append(Table(f"{task}: options that differ", ["option", *groups], rows))
        for method, group in groups.items():
            if group[0].command:
                command = " ".join(shlex.quote(str(word)) for word in group[0].command)
                title = f"Command of {task}, {method}, seed {group[0].seed}"
                blocks.append(Details(title, command))
    if not any(run.command for run in report.runs.runs):
        blocks.append(
            Text("fairseq's log does not hold the command line, only the options above.", "note")
        )
    blocks.append(Text(_versions(), "note"))
    return blocks


def _versions() -> str:
    told = [f"Python {platform.python_version()}"]
    for package in ("deltasam_fairseq", "fairseq-fixed", "fairseq", "torch", "scipy", "matplotlib"):
        try:
            told.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return (
        "fairseq's logs name no versions. Those of the environment that made this page, which may "
        f"not be the runs': {', '.join(told)}."
    )


def _paper(report: Report) -> List[Block]:
    source = report.paper.get("source", "")
    return [
        Text(
            "Rows marked `paper` (in italics, shaded, below ours) are copied from the paper, not "
            f"made by these runs: {source}. Other code, hardware and checkpoints: they are for "
            f"orientation, and no test compares them with ours. {report.paper.get('missing', '')}"
        )
    ]


def blocks_of(report: Report, source: Path, out: Path, command: str) -> List[Block]:
    """Return the whole report; writes the pictures for Markdown into ``out``."""
    runs = report.runs
    complete = sum(run.state == "complete" for run in runs.runs)
    today = datetime.date.today().isoformat()
    count = f"{complete} of {len(runs.runs)} runs complete"
    tasks = f"{len(runs.tasks)} task{'s' * (len(runs.tasks) != 1)}"
    blocks: List[Block] = [
        Heading(1, "Fine-tuning on GLUE: methods side by side"),
        Text(f"{len(runs.methods)} methods, {tasks}, {count}. Made on {today} by `{command}`."),
    ]
    if complete < len(runs.runs):
        blocks.append(
            Text(
                f"{len(runs.runs) - complete} runs are missing, failed or incomplete and are in no "
                "table: see [what is left out](#runs-that-are-left-out).",
                "warning",
            )
        )
    mixed = _mixed(report)
    if mixed:
        told = "Seeds of one method were trained with different options, so that they are no sample"
        blocks.append(Text(f"{told}: {'; '.join(mixed)}.", "warning"))
    blocks += [Heading(2, "In short"), Bullets(_in_short(report))]
    blocks += [Heading(2, "How to read this"), Bullets(HOW_TO_READ)]
    blocks.append(Heading(2, "Scores"))
    blocks += [_overview(report, statistic) for statistic in ("mean", "median", "best")]
    blocks += [Heading(2, "Differences to the baseline"), *_comparisons(report)]
    one = f"relative to {report.one}" if report.one else ""
    blocks += [Heading(2, f"Running time {one}".rstrip()), *_times(report)]
    blocks += [Heading(2, "The paper's figures"), *_paper(report)]
    blocks.append(Heading(2, "Task by task"))
    for index, (task, metric) in enumerate(runs.tasks.items()):
        blocks += _task(report, task, metric, out, index)
    blocks += [Heading(2, "Runs that are left out"), *_left_out(report)]
    blocks.append(Heading(2, "How the runs were made"))
    blocks.append(Text(f"Read from the logs in `{source}`."))
    return blocks + _how_made(report)
