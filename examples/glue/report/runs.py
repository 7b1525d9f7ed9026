"""Read a folder of GLUE runs: what every run reached, how fast, and why one does not count.

A run is OUT/<TASK>/<method>-seed<N>/train.log, fairseq's log with ``--log-format json``.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from examples.common.runner import sharpness_folder

Epoch = Dict[str, float]  # fairseq's figures at the end of an epoch: valid_loss, train_ups, ...


class Metric(NamedTuple):
    """What a task is judged by; higher is better.

    Attributes:
        key: of fairseq's log.
        name: for people.
        parts: (key of the log, name) of what is shown beside it, at the same epoch.
    """

    key: str
    name: str
    parts: Tuple[Tuple[str, str], ...] = ()


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

# Ways to know the updates a second, the best first.
INTERVALS = "log intervals"
TRAIN_WALL = "train_wall"
EPOCHS = "whole epochs, with validation"
PACES = (INTERVALS, TRAIN_WALL, EPOCHS)


class Log(NamedTuple):
    """What a train.log says.

    Attributes:
        epochs: figures by epoch, in order.
        paces: updates a second, by the way they were found.
        settings: fairseq's options, as it printed them.
        done: fairseq ended the training itself.
        starts: how often training was started: above 1, the run was resumed.
    """

    epochs: List[Epoch]
    paces: Dict[str, float]
    settings: Dict[str, str]
    done: bool
    starts: int


class Run(NamedTuple):
    """One fine-tuning run, also one that broke off or was never made.

    Attributes:
        state: complete, incomplete, failed or missing; only complete ones are in the tables.
        why: what is wrong, in words; empty for a complete run.
        best, last: the task's metric at its best and at its last epoch; NaN where there is none.
        parts: the metric's parts at the best epoch.
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
    log: Log = Log([], {}, {}, False, 0)
    rises: Dict[float, float] = {}
    curves: Optional[Dict[str, Any]] = None
    command: Sequence[str] = ()


# --- a log ------------------------------------------------------------------------------------
_VALUE = r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|\[[^\]]*\]|\([^)]*\)|[^,(){}\[\]]+"
_IN_DICT = re.compile(rf"'(\w+)': ({_VALUE})")
_IN_NAMESPACE = re.compile(rf"\b(\w+)=({_VALUE})")
_COMPONENT = re.compile(r"'(\w+)': \{'_name': '?(\w+)")
_ELSEWHERE = (
    ("parameters", re.compile(r"num\. shared model params: ([\d,]+)")),
    ("devices", re.compile(r"training on (\d+) devices")),
    ("device", re.compile(r"rank +0: capabilities.*name = (.+?) *$")),
)


def settings_of(header: str) -> Dict[str, str]:
    """Return fairseq's options, by name, from the line that it prints them in."""
    found: Dict[str, str] = {}
    for pattern in (_COMPONENT, _IN_NAMESPACE, _IN_DICT):
        for key, value in pattern.findall(header):
            if key != "_name" and value.strip() != "None":
                found.setdefault(key, value.strip().strip("'\""))
    return found


def _numbers(line: str) -> Epoch:
    """Return the figures of a JSON line; none for a line that was cut off."""
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


def read_log(text: str) -> Log:
    """Read a train.log.

    A resumed run logs some epochs again: the last time counts, and where it went back further,
    what came after in the earlier attempt is dropped.  Of several validations in one epoch the last
    counts.

    Updates a second are taken from log intervals in which nothing else happened, no start, no
    validation and no saving; else from the time that fairseq measured inside training steps
    (whole seconds an epoch); else from whole epochs.
    """
    epochs: Dict[int, Epoch] = {}
    settings: Dict[str, str] = {}
    done, starts = False, 0
    before: Optional[float] = None  # updates made when the interval began; None: not a clean one
    updates = elapsed = 0.0
    for line in text.splitlines():
        if "{'_name': None, 'common'" in line:
            settings, done, starts, before = settings_of(line), False, starts + 1, None
        elif "done training in" in line:
            done = True
        elif '{"epoch"' in line:
            stats = _numbers(line)
            if not stats:
                continue
            number = int(stats["epoch"])
            for later in [n for n in epochs if n > number]:
                del epochs[later]
            if "update" not in stats:
                epochs.setdefault(number, {}).update(stats)
                before = None
                continue
            now, ups = stats.get("num_updates", 0.0), stats.get("ups", 0.0)
            if before is not None and now > before and ups > 0:
                updates, elapsed = updates + now - before, elapsed + (now - before) / ups
            before = now
        else:
            for key, pattern in _ELSEWHERE:
                match = pattern.search(line)
                if match:
                    settings[key] = match.group(1)
    ordered = [epochs[number] for number in sorted(epochs)]
    paces = _paces_of_epochs(ordered)
    if elapsed > 0:
        paces[INTERVALS] = updates / elapsed
    return Log(ordered, paces, settings, done, max(starts, 1))


def _paces_of_epochs(epochs: Sequence[Epoch]) -> Dict[str, float]:
    trained = [epoch for epoch in epochs if "train_num_updates" in epoch]
    counts = [epoch["train_num_updates"] for epoch in trained]
    made = [after - before for before, after in zip([0.0, *counts], counts)]
    wall = [epoch.get("train_train_wall", math.nan) for epoch in trained]
    whole = [n / max(epoch.get("train_ups", 0.0), 1e-9) for n, epoch in zip(made, trained)]
    found = {}
    for name, seconds in ((TRAIN_WALL, sum(wall)), (EPOCHS, sum(whole))):
        if trained and 0 < seconds < 1e8:
            found[name] = sum(made) / seconds
    return found


def metric_of(task: str, logs: Iterable[Log]) -> Metric:
    """Return what a task is judged by.

    A task that is not of GLUE is judged by accuracy, or else by the metric that its runs chose
    their best checkpoint with.
    """
    if task in GLUE:
        return GLUE[task]
    for log in logs:
        chosen = log.settings.get("best_checkpoint_metric", "loss")
        seen = set().union(*log.epochs) if log.epochs else set()
        higher = log.settings.get("maximize_best_checkpoint_metric") == "True"
        if ACCURACY.key not in seen and higher and f"valid_{chosen}" in seen:
            return Metric(f"valid_{chosen}", chosen.replace("_", " "))
    return ACCURACY


# --- a run ------------------------------------------------------------------------------------
def _whole(log: Log, key: str) -> int:
    """Return an option that is a number; 0 where there is none, which is fairseq's "no limit"."""
    try:
        return int(float(log.settings.get(key, "0")))
    except ValueError:
        return 0


def _ended(log: Log) -> bool:
    """Tell whether the training came to its end."""
    last = log.epochs[-1]
    if log.done or "train_num_updates" not in last:
        return log.done
    limits = ((last["epoch"], "max_epoch"), (last["train_num_updates"], "max_update"))
    return any(0 < _whole(log, key) <= reached for reached, key in limits)


def judge(run: Run, log: Optional[Log], metric: Metric, partial: bool = False) -> Run:
    """Return the run with its score, or with what is wrong with it."""
    if log is None:
        return run._replace(state="failed", why="there is no train.log")
    run = run._replace(log=log)
    if not log.epochs:
        return run._replace(state="failed", why="no epoch was finished")
    scores = [(e[metric.key], int(e["epoch"]), e) for e in log.epochs if metric.key in e]
    finite = [score for score in scores if math.isfinite(score[0])]
    if not finite:
        fault = "is never a number" if scores else "is not in the log"
        return run._replace(state="failed", why=f"{metric.key} {fault}")
    best, number, epoch = max(finite, key=lambda score: (score[0], -score[1]))
    parts = {name: epoch[key] for key, name in metric.parts if key in epoch}
    run = run._replace(best=best, best_epoch=number, parts=parts, last=scores[-1][0])
    if partial or not _ended(log):
        limit = _whole(log, "max_epoch")
        of = f" of {limit}" if limit else ""
        why = f"training did not end; the log stops in or after epoch {number_of(log)}{of}"
        return run._replace(state="incomplete", why=why)
    return run._replace(state="complete")


def number_of(log: Log) -> int:
    """Return the number of the last epoch in the log."""
    return int(log.epochs[-1]["epoch"]) if log.epochs else 0


def _json(path: Path) -> Dict[str, Any]:
    """Return a JSON file; nothing where it is missing or cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _sharpness(folder: Path) -> Tuple[Dict[float, float], Optional[Dict[str, Any]]]:
    """Return the rises by radius, and the curves, of ``<run>-sharpness/sharpness.json``."""
    measured = _json(sharpness_folder(folder) / "sharpness.json")
    rises = {}
    for row in measured.get("sharpness") or ():
        mean = (row.get("per_batch") or {}).get("mean")
        if mean is not None:
            rises[float(row["rho"])] = float(mean)
    return rises, measured.get("curves")


def read_task(folder: Path, methods: Optional[Sequence[str]] = None) -> Tuple[Metric, List[Run]]:
    """Read the runs of one task, in the order of method and seed."""
    found: Dict[Tuple[str, int], Path] = {}
    for path in sorted(folder.iterdir()):  # <run>.partial, being made anew, comes after <run>
        match = re.fullmatch(r"(.+)-seed(\d+)(\.partial)?", path.name)
        if match and path.is_dir() and (methods is None or match.group(1) in methods):
            found[match.group(1), int(match.group(2))] = path
    logs: Dict[Tuple[str, int], Optional[Log]] = {}
    for key, path in found.items():
        log = path / "train.log"
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else None
        logs[key] = None if text is None else read_log(text)
    metric = metric_of(folder.name, [log for log in logs.values() if log is not None])
    runs = []
    for (method, seed), path in sorted(found.items()):
        run = judge(
            Run(folder.name, method, seed, "failed"),
            logs[method, seed],
            metric,
            partial=path.suffix == ".partial",
        )
        rises, curves = _sharpness(path)
        command = _json(path / "stage.json").get("command") or ()
        runs.append(run._replace(rises=rises, curves=curves, command=command))
    return metric, runs


class Runs(NamedTuple):
    """All runs of a report, missing ones too.

    Attributes:
        tasks: what each is judged by, in the order of the tables.
        methods: in the order of the tables.
        seeds: of each task: every seed that any of its methods was run with.
        runs: one for every task, method and seed.
    """

    tasks: Dict[str, Metric]
    methods: List[str]
    seeds: Dict[str, List[int]]
    runs: List[Run]

    def of(self, task: str, method: str, state: Optional[str] = "complete") -> List[Run]:
        """Return the runs of a method on a task; with state None, all of them."""
        return [
            run
            for run in self.runs
            if run.task == task and run.method == method and state in (None, run.state)
        ]


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
        ranks = {name: f"{i}" for i, name in enumerate(GLUE)}
        folders = sorted((p for p in out.iterdir() if p.is_dir()), key=lambda p: p.name)
        tasks = [p.name for p in sorted(folders, key=lambda p: ranks.get(p.name, "~"))]
    read = {}
    for task in tasks:
        if not (out / task).is_dir():
            raise ValueError(f"--tasks {task}: {out / task} is no folder; name one that is there")
        metric, runs = read_task(out / task, methods)
        if runs or methods is not None:
            read[task] = (metric, runs)
    everything = [run for _, runs in read.values() for run in runs]
    if not everything:
        raise ValueError(f"{out}: holds no run; expected {out}/<TASK>/<method>-seed<N>/train.log")
    read = {task: both for task, both in read.items() if both[1]}
    order = list(methods) if methods else sorted({run.method for run in everything}, key=_rank)
    seeds = {task: sorted({run.seed for run in runs}) for task, (_, runs) in read.items()}
    known = {(run.task, run.method, run.seed): run for run in everything}
    table = [
        known.get(
            (task, method, seed),
            Run(task, method, seed, "missing", "there is no folder for it"),
        )
        for task in read
        for method in order
        for seed in seeds[task]
    ]
    return Runs({task: metric for task, (metric, _) in read.items()}, order, seeds, table)
