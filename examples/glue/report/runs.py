"""Read a folder of runs: what every run reached, how fast, and why one does not count.

A run is the folder OUT/<TASK>/<method>-seed<N>, with fairseq's JSON log in train.log and, where
hydra started it, its options in hydra/.hydra/config.yaml.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import pandas as pd
import yaml

from deltasam_fairseq.checkpoints.data_record import read_json
from examples.common.fairseq_log import TIMINGS, Log, read_log
from examples.common.stage import sharpness_folder


class Metric(NamedTuple):
    """What a task is scored by; higher is better.

    Attributes:
        key: of fairseq's log.
        name: for people.
        parts: (key of the log, name) of what is shown beside it, at the same epoch.
    """

    key: str
    name: str
    parts: Tuple[Tuple[str, str], ...] = ()

    @property
    def beside(self) -> Tuple[Tuple[str, str], ...]:
        """The parts, and how many training rows with right and with wrong labels agree."""
        return (*self.parts, *LEARNT)


LEARNT = (("kept_accuracy", "right labels"), ("replaced_accuracy", "wrong labels"))
EARLY = ":early"  # ends the name of a method whose runs are scored where stopping early would end

ACCURACY = Metric("valid_accuracy", "accuracy")
F1 = Metric(
    "valid_acc_and_f1",
    "mean of accuracy and F1",
    (("valid_accuracy", "accuracy"), ("valid_f1", "F1")),
)
GLUE: Dict[str, Metric] = {  # in the order of the tables
    "CoLA": Metric("valid_mcc", "Matthews correlation"),
    "SST-2": ACCURACY,
    "MRPC": F1,
    "STS-B": Metric(
        "valid_pearson_and_spearman",
        "mean of Pearson and Spearman correlation",
        (("valid_pearson", "Pearson"), ("valid_spearman", "Spearman")),
    ),
    "QQP": F1,
    "MNLI": Metric(
        "valid_accuracy", "accuracy, matched", (("valid1_accuracy", "accuracy, mismatched"),)
    ),
    "QNLI": ACCURACY,
    "RTE": ACCURACY,
}


class Run(NamedTuple):
    """One fine-tuning run, also one that broke off or was never made.

    Attributes:
        state: complete, incomplete, failed or missing; only complete ones are in the tables.
        why: what is wrong, in words; empty for a complete run.
        best, last: the task's metric at its best and at its last epoch; NaN where there is none.
        best_epoch: the epoch of ``best``, which with `rescored` need not be the best one.
        parts: what was logged with the metric, at the same epoch.
        settings: fairseq's options, by name; empty where hydra left no configuration.
        rises: rise of the loss along SAM's ascent, by its radius rho, at the last weights.
        curves: loss along lines through the last weights, as sharpness.json has them.
    """

    task: str
    method: str
    seed: int
    state: str
    why: str = ""
    best: float = math.nan
    best_epoch: int = 0
    last: float = math.nan
    parts: Dict[str, float] = {}
    log: Log = Log()
    settings: Dict[str, str] = {}
    rises: Dict[float, float] = {}
    curves: Dict[str, Any] = {}
    command: Sequence[str] = ()


# --- a run ------------------------------------------------------------------------------------
def read_settings(run: Path) -> Dict[str, str]:
    """Return the options that hydra recorded for a run, by name; empty without its record.

    A component's name stands under that of its group: ``optimizer: delta_sam_adam``.
    """
    path = run / "hydra" / ".hydra" / "config.yaml"
    if not path.is_file():
        return {}
    found: Dict[str, str] = {}
    for group, options in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        for key, value in options.items() if isinstance(options, dict) else ():
            if value is not None and not str(value).startswith("${"):  # refers to another option
                found.setdefault(group if key == "_name" else key, str(value))
    return found


def metric_of(task: str, runs: Iterable[Run]) -> Metric:
    """Return what a task is scored by.

    For a task that is not GLUE's: accuracy, else the metric that its runs chose their best
    checkpoint with.
    """
    if task in GLUE:
        return GLUE[task]
    for run in runs:
        chosen = run.settings.get("best_checkpoint_metric", "loss")
        logged = set().union(*run.log.epochs)
        higher = run.settings.get("maximize_best_checkpoint_metric") == "True"
        if ACCURACY.key not in logged and higher and f"valid_{chosen}" in logged:
            return Metric(f"valid_{chosen}", chosen.replace("_", " "))
    return ACCURACY


def _limit(run: Run, key: str) -> int:
    """Return an option that is a number; 0, which is fairseq's "no limit", where there is none."""
    return int(float(run.settings.get(key, "0")))


def _ended(run: Run) -> bool:
    """Whether the training came to its end."""
    last = run.log.epochs[-1]
    if run.log.done or "train_num_updates" not in last:
        return run.log.done
    limits = ((last["epoch"], "max_epoch"), (last["train_num_updates"], "max_update"))
    return any(0 < _limit(run, key) <= reached for reached, key in limits)


def score(run: Run, metric: Metric, partial: bool = False) -> Run:
    """Return a run whose log was read with its score, or with what is wrong with it."""
    log = run.log
    if not log.epochs:
        return run._replace(state="failed", why=run.why or "no epoch was finished")
    scores = [(e[metric.key], -int(e["epoch"]), e) for e in log.epochs if metric.key in e]
    finite = [found for found in scores if math.isfinite(found[0])]
    if not finite:
        fault = "is never a number" if scores else "is not in the log"
        return run._replace(state="failed", why=f"{metric.key} {fault}")
    best, negative, epoch = max(finite, key=lambda found: found[:2])
    parts = {name: epoch[key] for key, name in metric.beside if key in epoch}
    run = run._replace(best=best, best_epoch=-negative, parts=parts, last=scores[-1][0])
    if partial or not _ended(run):
        limit = _limit(run, "max_epoch")
        of = f" of {limit}" if limit else ""
        why = f"training did not end; the log stops in or after epoch {log.last_epoch}{of}"
        return run._replace(state="incomplete", why=why)
    return run._replace(state="complete")


def read_run(task: str, folder: Path) -> Run:
    """Read the folder <method>-seed<N> of a run; the result has no score yet."""
    method, _, seed = folder.name.rpartition("-seed")
    run = Run(task, method, int(seed.split(".")[0]), "failed", "there is no train.log")
    if (folder / "train.log").is_file():
        run = run._replace(log=read_log(folder / "train.log"), why="")
    measured = read_json(sharpness_folder(folder) / "sharpness.json")
    means = {
        float(row["rho"]): (row.get("per_batch") or {}).get("mean")
        for row in measured.get("sharpness") or ()
    }
    return run._replace(
        settings=read_settings(folder),
        rises={rho: float(mean) for rho, mean in means.items() if mean is not None},
        curves=measured.get("curves") or {},
        command=read_json(folder / "stage.json").get("command") or (),
    )


def read_task(folder: Path, methods: Optional[Sequence[str]] = None) -> Tuple[Metric, List[Run]]:
    """Read the runs of one task, in the order of method and seed."""
    found: Dict[Tuple[str, int], Path] = {}
    for path in sorted(folder.iterdir()):  # <run>.partial, being made again, comes after <run>
        match = re.fullmatch(r"(.+)-seed(\d+)(\.partial)?", path.name)
        if match and path.is_dir() and (methods is None or match.group(1) in methods):
            found[match.group(1), int(match.group(2))] = path
    paths = [path for _, path in sorted(found.items())]
    runs = [read_run(folder.name, path) for path in paths]
    metric = metric_of(folder.name, runs)
    return metric, [score(r, metric, p.suffix == ".partial") for r, p in zip(runs, paths)]


# --- all runs ---------------------------------------------------------------------------------
class Runs(NamedTuple):
    """All runs of a report, missing ones too.

    Attributes:
        tasks: what each is scored by, in the order of the tables.
        methods: in the order of the tables.
        seeds: of each task: every seed that any of its methods was run with.
        runs: one for every task, method and seed.
        scored: the epoch that a run is scored at: best or last.
    """

    tasks: Dict[str, Metric]
    methods: List[str]
    seeds: Dict[str, List[int]]
    runs: List[Run]
    scored: str = "best"

    def of(self, task: str, method: str, state: Optional[str] = "complete") -> List[Run]:
        """Return the runs of a method on a task; with state None, all of them."""
        return [
            run
            for run in self.runs
            if run.task == task and run.method == method and state in (None, run.state)
        ]

    def complete(self, task: str) -> List[Run]:
        """Return the complete runs of a task."""
        return [run for run in self.runs if run.task == task and run.state == "complete"]

    def timed_by(self, task: str) -> str:
        """Return the most exact timing that all complete runs of a task have; empty without."""
        has = [run.log.updates_per_second for run in self.complete(task)]
        return next((way for way in TIMINGS if all(way in found for found in has)), "")

    def rho(self, task: str) -> Optional[float]:
        """Return the largest radius that every measured run of a task was measured at."""
        return common_rho(self.complete(task))

    def frame(self) -> pd.DataFrame:
        """Return a row a run: what runs.csv has."""
        rows = []
        for run in self.runs:
            timed_by, rho = self.timed_by(run.task), self.rho(run.task)
            row = {
                **{key: getattr(run, key) for key in ("task", "method", "seed", "state", "why")},
                "metric": self.tasks[run.task].key,
                "best": run.best,
                "best_epoch": run.best_epoch or None,
                "last": run.last,
                "epochs": run.log.last_epoch or None,
                "updates_per_second": run.log.updates_per_second.get(timed_by),
                "timed_by": timed_by,
                "rho": rho,
                "sharpness": run.rises.get(rho) if rho is not None else None,
                "starts": run.log.starts or None,
            }
            rows.append({**row, **run.parts})
        whole = dict.fromkeys(("best_epoch", "epochs", "starts"), "Int64")
        floats = dict.fromkeys(("updates_per_second", "rho", "sharpness"), float)
        return pd.DataFrame(rows).astype({**whole, **floats})


def rescored(runs: Runs, key: Optional[str], epoch: str, early: Sequence[str]) -> Runs:
    """Return the runs with other scores.

    Args:
        key: of the log, as ``dev_accuracy``, in place of the tasks' metrics.
        epoch: best or last, which is scored.
        early: methods to score a second time, under NAME:early, at the epoch that is the best by
            the task's own metric: what stopping early by it reaches.

    Raises:
        ValueError: a method is not among the runs, or no run has the key.
    """
    for method in early:
        if method not in runs.methods:
            raise ValueError(f"--early {method}: name some of {', '.join(runs.methods)}")
    tasks = runs.tasks
    if key is not None:
        tasks = dict.fromkeys(tasks, Metric(key, key.replace("_", " ")))

    def at(run: Run, number: int) -> Run:
        """Return a run as if its log had the one epoch."""
        epochs = [found for found in run.log.epochs if found["epoch"] == number]
        log = run.log._replace(epochs=epochs, done=True)
        found = score(run._replace(log=log), tasks[run.task])
        last = score(run._replace(log=run.log._replace(done=True)), tasks[run.task]).last
        return found._replace(log=run.log, last=last)

    table = []
    for run in runs.runs:
        if run.state != "complete":
            table.append(run)
        elif epoch == "last":
            table.append(at(run, run.log.last_epoch))
        else:
            table.append(score(run, tasks[run.task]))
        if run.method in early:
            stopped = at(run, run.best_epoch) if run.state == "complete" else run
            # what was measured of the last weights is not of these
            table.append(stopped._replace(method=run.method + EARLY, rises={}, curves={}))
    if key is not None and not any(run.state == "complete" for run in table):
        raise ValueError(f"--metric {key}: is in the log of no complete run")
    methods = [name for m in runs.methods for name in (m, m + EARLY) if name == m or m in early]
    return Runs(tasks, methods, runs.seeds, table, epoch)


def common_rho(runs: Sequence[Run]) -> Optional[float]:
    """Return the largest radius that every measured run was measured at; None without one."""
    radii = [set(run.rises) for run in runs if run.rises]
    return max(set.intersection(*radii), default=None) if radii else None


# The usual methods first, in the order of the paper's tables; others after them by name.
_USUAL = ("adam", "r3f", "r_drop", "freelb", "smart", "vat", "sam", "asam", "delta_sam")


def _rank(method: str) -> Tuple[int, str]:
    plain = method[: -len("_adam")] if method.endswith("_adam") else method
    return (_USUAL.index(plain) if plain in _USUAL else len(_USUAL), method)


def read_runs(
    out: Path, tasks: Optional[Sequence[str]] = None, methods: Optional[Sequence[str]] = None
) -> Runs:
    """Read the folder of all tasks.

    Args:
        out: holds a folder a task.
        tasks: read only these, in this order.
        methods: likewise.

    Raises:
        ValueError: a task's folder is missing, or there is no run at all.
    """
    if tasks is None:
        ranks = list(GLUE)
        folders = sorted(p.name for p in out.iterdir() if p.is_dir())
        tasks = sorted(folders, key=lambda n: ranks.index(n) if n in ranks else len(ranks))
    read = {}
    for task in tasks:
        if not (out / task).is_dir():
            raise ValueError(f"--tasks {task}: directory {out / task} does not exist")
        metric, runs = read_task(out / task, methods)
        if runs:
            read[task] = (metric, runs)
    known = {(run.task, run.method, run.seed): run for _, runs in read.values() for run in runs}
    if not known:
        raise ValueError(f"{out}: holds no run; expected {out}/<TASK>/<method>-seed<N>/train.log")
    order = list(methods) if methods else sorted({method for _, method, _ in known}, key=_rank)
    seeds = {task: sorted({run.seed for run in runs}) for task, (_, runs) in read.items()}
    table = [
        known.get((t, m, seed), Run(t, m, seed, "missing", "there is no folder for it"))
        for t in read
        for m in order
        for seed in seeds[t]
    ]
    return Runs({task: metric for task, (metric, _) in read.items()}, order, seeds, table)
