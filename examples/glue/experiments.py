"""Experiments with MiniLM, many runs at a time, until the time is over: what every method reaches.

    python -m examples.glue.experiments --device cuda --seconds 270 --kit .gpu --work WORK --out OUT
    python -m examples.glue.experiments ... --experiment wrong-labels --data TEXT

glue          MRPC, RTE, STS-B, CoLA, 3 epochs of batches of 32, adam, sam, delta_sam, seed by seed
wrong-labels  TREC (40 %) and SST-2 (30 %), clean too, 10 epochs; lr, rho, beta by a held-out part
few-labels    300 rows of TREC, SST-2 and MRPC, likewise
mrpc          MRPC, 3 epochs, rho and beta by a held-out part, 3 seeds

The same command goes on with what is not done yet; --dry-run shows on a few rows that it works.

Runs are those of examples.glue.run.  OUT/trainings.json has the figures of every epoch of every
run, WORK/trainings.md the tables; both are rewritten as runs end.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from deltasam_fairseq.data.files import atomic_write
from deltasam_fairseq.glue.write_splits import PARTS
from deltasam_fairseq.markdown import markdown_table, spread
from deltasam_fairseq.options import ranged
from examples.common import warm
from examples.common.runner import StageError, run_all, run_side_by_side
from examples.common.stage import Stage, module, read_stamp
from examples.glue import options as glue_options
from examples.glue import search
from examples.glue import stages as glue
from examples.glue.report.content import context, make
from examples.glue.report.runs import read_runs

# rho and beta of the runs that are not searched for: clean data, short, see docs/choosing_rho.md
SETTINGS: Dict[str, Dict[str, float]] = {
    task: {"sam_rho": 0.01, "delta_sam_beta": 10} for task in ("CoLA", "STS-B", "MRPC", "RTE")
}
METHODS = ("adam", "sam", "delta_sam")
RIVALS = ("adam_2x", "swa")  # adam with twice the updates; SWA
ONLY_NOISE = ("r_drop", "delta_sam+swa")
GRID = {
    "lr": (3e-5, 1e-4, 3e-4),
    "rho": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    "beta": (3, 10, 30),
}
SEEDS = (1, 2, 3, 4, 5)
HOLD_OUT = 0.2
ENDING = 8  # seconds to end the runs and to write in
FIGURES = ("accuracy", "mcc", "f1", "acc_and_f1", "pearson", "spearman", "pearson_and_spearman")


class Setting(NamedTuple):
    """A text task of an experiment: which rows, and how many of their labels are wrong."""

    name: str
    source: str
    rows: int  # to train on
    noise: float = 0.0


# Searched together, a group after the other, in the order of importance.
GROUPS: Dict[str, List[List[Setting]]] = {
    "wrong-labels": [
        [Setting("TREC-40", "TREC", 1000, 0.4), Setting("TREC-0", "TREC", 1000)],
        [Setting("SST2-30", "SST-2", 2000, 0.3), Setting("SST2-0", "SST-2", 2000)],
    ],
    "few-labels": [
        [
            Setting("TREC-300", "TREC", 300),
            Setting("SST2-300", "SST-2", 300),
            Setting("MRPC-300", "MRPC", 300),
        ]
    ],
}
# options, and the experiments that have a use for them
OF_EXPERIMENTS = {
    **dict.fromkeys(("only", "rows", "methods", "seeds"), tuple(GROUPS)),
    **dict.fromkeys(("lr", "rho", "beta", "by"), (*GROUPS, "mrpc")),
}


class TimeUp(Exception):
    """The time is over."""


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(
        prog="python -m examples.glue.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--device", choices=("cuda", "cpu"), required=True, help="where the runs compute")
    add("--dry-run", action="store_true", help="a few rows, an epoch, one seed, two methods")
    add("--seconds", type=ranged(int, at_least=1), required=True, help="after which it ends")
    add("--kit", type=Path, required=True, help="folder with minilm/ and glue/")
    add("--work", type=Path, required=True, help="folder for data, runs and trainings.md")
    add("--out", type=Path, required=True, help="folder for trainings.json")
    add("--experiment", choices=("glue", *GROUPS, "mrpc"), default="glue")
    add("--only", nargs="+", metavar="SETTING", help="of text tasks, as TREC-40 (default: all)")
    add("--rows", type=ranged(int, at_least=1), help="of text tasks, to train on")
    add("--lr", nargs="+", type=float, help="to choose from (default: 3e-5 1e-4 3e-4)")
    add("--rho", nargs="+", type=float, help="to choose from (default: 0.001 to 0.3)")
    add("--beta", nargs="+", type=float, help="to choose from (default: 3 10 30)")
    add("--by", choices=("best", "last"), help="epoch that chooses (default: best)")
    add("--methods", nargs="+", help="of text tasks, as adam sam delta_sam (default: all)")
    add("--seeds", nargs="+", type=int, help="of text tasks (default: 1 2 3 4 5)")
    add("--data", type=Path, help="folder with TREC/ and SST-2/, TSV files (default: KIT/text)")
    add("--model", type=Path, help="MiniLM converted before (default: KIT/minilm is converted)")
    add("--jobs", type=ranged(int, at_least=1), default=14, help="runs at a time (default: 14)")
    add("--precision", choices=list(glue.PRECISIONS), help="default: fp32")
    return options


class Trainings:
    """The runs of one experiment.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begin = args, time.monotonic()
        self.small = args.dry_run
        self.gpus = 0 if args.device == "cpu" else torch.cuda.device_count()
        self.folder = args.work / args.experiment
        self.model = args.model.absolute() if args.model else args.work / "minilm" / "model"
        self.grid = {name: v[-2:-1] if self.small else v for name, v in GRID.items()}
        self.grid.update({name: given for name in GRID if (given := getattr(args, name))})
        self.done: Dict[str, Any] = {}
        self.precision = args.precision or "fp32"

    # --- what the programs of examples.glue get ---------------------------------------------
    def options(
        self, program: argparse.ArgumentParser, out: Path, tasks: Sequence[str], *more: object
    ) -> argparse.Namespace:
        """Return the arguments of examples.glue.run or search, without a check."""
        words = ["--checkpoint", self.model / "model.pt", "--backbone", "minilm"]
        words += ["--recipe", "minilm", "--bpe", "wordpiece", "--bpe-options"]
        words += [f"wordpiece-vocab={self.model / 'vocab.txt'}"]
        words += ["--jobs", self.args.jobs, "--cores", 1, "--precision", self.precision]
        words += ["--out", out, "--tasks", *tasks, *more]
        words += ["--any-rows"] if self.small else []
        options = program.parse_args(list(map(str, words)))
        if self.small:
            options.epochs = 1
        glue_options.absolute(options)
        return options

    def overrides(self, *splits: str) -> List[str]:
        """Return what all runs have: nothing is saved, validation takes few steps."""
        found = ["checkpoint.no_save=true", "dataset.batch_size_valid=64"]
        return [*found, f"dataset.valid_subset='{','.join(splits)}'"] if splits else found

    def run(self, jobs: Sequence[Sequence[Stage]], options: argparse.Namespace) -> None:
        """Make the jobs side by side; those that fail are reported."""
        failed = run_side_by_side(jobs, 1, glue.device_environments(options, self.gpus))
        print(*failed.values(), sep="\n", flush=True)

    def convert(self) -> None:
        """Make fairseq's checkpoint of MiniLM, and see that a fork of the server has the GPU."""
        source = self.args.kit.absolute() / "minilm"
        words = module(
            "deltasam_fairseq.convert", "to-fairseq", "--from", source, "--out", "{out}/model"
        )
        if self.args.model is None:
            run_all([Stage("convert MiniLM", words, self.model.parent)], 1)
        if self.gpus:
            program = "import torch; torch.zeros(1, device='cuda')"
            check = Stage(
                "CUDA in a fork", module("timeit", "-n", 1, "-r", 1, program), self.folder / "fork"
            )
            try:
                run_all([check], 1)
            except StageError as error:
                print(error, "every run imports torch itself", sep="\n", flush=True)
                warm.enabled = False

    # --- experiments ------------------------------------------------------------------------
    def glue_files(self, tasks: Sequence[str]) -> Path:
        """Return GLUE's folder; of a dry run one with the first rows of its tasks."""
        folder = self.args.kit.absolute() / "glue"
        if not self.small:
            return folder
        for task in tasks:
            for name in ("train.tsv", "dev.tsv"):
                with (folder / task / name).open(encoding="utf-8") as file:
                    atomic_write(self.args.work / "glue" / task / name, "".join(islice(file, 41)))
        return self.args.work / "glue"

    def glue(self) -> None:
        """GLUE's small tasks: the longest first, of a seed together."""
        tasks = ["RTE"] if self.small else list(SETTINGS)
        more = ["--glue-dir", self.glue_files(tasks), "--epochs", 3, "--batch-size", 32]
        options = self.options(glue_options.parser(), self.folder, tasks, *more)
        _complain(glue_options.check(options))
        self.run([[stage] for stage in glue.preparation(options)], options)
        methods = METHODS[::2] if self.small else METHODS
        jobs = [
            self.training(options, task, method, seed, SETTINGS[task], self.overrides())
            for seed in range(1, 2 if self.small else 11)
            for task in tasks
            for method in reversed(methods)
        ]
        self.run([[job] for job in jobs], options)

    def mrpc(self) -> None:
        """MRPC: search, then three seeds on all training rows."""
        more = ["--glue-dir", self.glue_files(["MRPC"]), "--epochs", 3]
        options = self.options(search.parser(), self.folder / "search", ["MRPC"], *more)
        options.hold_out = HOLD_OUT
        chosen = self.search(options, self.overrides())
        options = self.options(glue_options.parser(), self.folder, ["MRPC"], *more)
        _complain(glue_options.check(options))
        run_all(glue.preparation(options), 1)
        jobs = [
            self.training(options, "MRPC", method, seed, chosen["MRPC"], self.overrides())
            for seed in ((1,) if self.small else (1, 2, 3))
            for method in METHODS
        ]
        self.run([[job] for job in jobs], options)

    def text(self) -> None:
        """Text tasks with wrong or few labels: search on the held-out part, then five seeds."""
        only, groups = self.args.only, GROUPS[self.args.experiment]
        wanted = [[one for one in group if not only or one.name in only] for group in groups]
        for group in [groups[0][:1]] if self.small else filter(None, wanted):
            data = self.folder / "data"
            stages = [self.noisy_data(setting, data / setting.name) for setting in group]
            options = self.options(
                search.parser(), self.folder / "search", [setting.name for setting in group]
            )
            self.run([[stage] for stage in stages], options)
            options.data = data
            chosen = self.search(options, self.overrides("valid", "dev"))
            options.out = self.folder
            jobs = [
                self.training(
                    options, setting.name, method, seed, chosen[setting.name], self.on(setting)
                )
                for setting in group
                for methods in self.methods(setting)
                for seed in self.args.seeds[: 1 if self.small else None]
                for method in methods
            ]
            self.run([[job] for job in jobs], options)

    def on(self, setting: Setting) -> List[str]:
        """Return the overrides of a setting's runs: every split is validated on."""
        return self.overrides("valid", "dev", *(PARTS if setting.noise else ()))

    def methods(self, setting: Setting) -> List[Sequence[str]]:
        """Return the methods of a setting; those of a group are run with all seeds first."""
        if self.small:
            return [("adam", "adam_2x")]
        if self.args.methods:
            return [self.args.methods]
        return [METHODS, RIVALS, ONLY_NOISE if setting.noise else ()]

    def noisy_data(self, setting: Setting, out: Path) -> Stage:
        """Return the stage that prepares a setting's splits."""
        source = self.args.kit / "glue" if setting.source in SETTINGS else self.args.data
        rows = 40 if self.small else round((self.args.rows or setting.rows) / (1 - HOLD_OUT))
        own = () if setting.source in glue.GLUE else ("--columns", "sentence", "label")
        noise = ("--label-noise", setting.noise) if setting.noise else ()
        command = module(
            "deltasam_fairseq.glue.prepare",
            *("--glue-dir", source.absolute(), "--task", setting.source, *own, "--any-rows"),
            *("--train-rows", rows, *noise, "--hold-out", HOLD_OUT),
            *("--dict", self.model / "dict.txt", "--bpe", "wordpiece"),
            *("--wordpiece-vocab", self.model / "vocab.txt", "--out", "{out}"),
        )
        return Stage(f"prepare {setting.name}", command, out, [self.model.parent])

    def search(
        self, options: argparse.Namespace, overrides: List[str]
    ) -> Dict[str, Dict[str, float]]:
        """Choose lr, rho and beta on the held-out part; return them by task."""
        for name, values in self.grid.items():
            setattr(options, name, list(values))
        options.by = self.args.by or "best"
        _complain(search.check_values(options) or glue_options.check_common(options))
        search.search(options, overrides, self.gpus)
        record = json.loads((options.out / "chosen.json").read_text(encoding="utf-8"))
        self.done = {key: record[key] for key in ("chosen", "scores")}
        return record["chosen"]

    def training(
        self,
        options: argparse.Namespace,
        task: str,
        name: str,
        seed: int,
        chosen: Dict[str, float],
        overrides: List[str],
    ) -> Stage:
        """Return the stage of a run."""
        method = name.replace("_2x", "")
        made = [*glue.method_overrides(method, task, chosen), *overrides]
        if method != name:
            sizes = dict(word.split("=", 1) for word in options.sizes[task])
            counts = ("optimization.max_update", "lr_scheduler.total_num_update")
            made += [f"{key}={2 * int(sizes[key])}" for key in counts]
        return glue.training(options, task, name, made, seed, self.gpus)

    # --- what is kept -----------------------------------------------------------------------
    def runs(self) -> Iterator[Dict[str, Any]]:
        """Yield what every run reached, of the search too."""
        for folder in (self.folder, self.folder / "search"):
            try:
                found = read_runs(folder).runs
            except (OSError, ValueError):
                continue  # none yet
            for run in found:
                path = folder / run.task / f"{run.method}-seed{run.seed}"
                figures = ("task", "method", "seed", "state", "why", "best", "best_epoch", "last")
                yield {
                    "search": folder != self.folder,
                    **{key: getattr(run, key) for key in figures},
                    "seconds": read_stamp(path).get("seconds"),
                    "epochs": [
                        {key: value for key, value in epoch.items() if _is_kept(key)}
                        for epoch in run.log.epochs
                    ],
                }

    def write(self) -> None:
        """Write OUT/trainings.json and WORK/trainings.md."""
        device = torch.cuda.get_device_name() if self.gpus else "CPU"
        record = {
            "experiment": self.args.experiment,
            "device": device,
            "torch": torch.__version__,
            "precision": self.precision,
            "jobs": self.args.jobs,
            "seconds": round(time.monotonic() - self.begin, 1),
            **self.done,
            "runs": list(self.runs()),
        }
        atomic_write(self.args.out / "trainings.json", json.dumps(_finite(record)) + "\n")
        complete = sum(run["state"] == "complete" for run in record["runs"])
        head = (
            f"{self.args.experiment}: {complete} runs of MiniLM complete after "
            f"{record['seconds']:.0f} s, {self.precision}, {self.args.jobs} at a time, {device}."
        )
        try:
            text = self.args.experiment in GROUPS
            tables = (accuracies(record) if text else self.report()) if complete else ""
        except Exception as error:  # the figures are written, and the next tables will be
            tables = f"No tables: {error!r}"
        pages = [head, *map(json.dumps, self.done.get("chosen", {}).items()), tables]
        atomic_write(self.args.work / "trainings.md", "\n\n".join(pages) + "\n")

    def report(self) -> str:
        """Return the tables of examples.glue.report."""
        try:
            runs = read_runs(self.folder)
        except (OSError, ValueError):
            return ""
        baseline, timed = (name if name in runs.methods else None for name in ("adam", "sam"))
        found = context(make(runs, baseline, timed, {}))
        ways = found["times"] and f"Measured: {found['timings']}."
        tables = [*found["overviews"], found["differences"], found["times"], ways]
        return "\n\n".join(table for table in [*tables, found["uncounted"]] if table)


def _complain(wrong: Optional[str]) -> None:
    if wrong:
        raise StageError(wrong)


def _is_kept(key: str) -> bool:
    split, _, name = key.partition("_")
    return name in FIGURES or key in ("epoch", "train_loss", "train_num_updates", "valid_loss")


def _finite(value: Any) -> Any:
    """Return a value without NaN, which JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def readings(epochs: Sequence[Dict[str, float]]) -> List[float]:
    """Return a run's accuracies: of dev at the last epoch, at that which ``valid`` picks, at its
    best; of the training rows with right and with wrong labels at the last epoch (NaN without).
    """
    picked = max(epochs, key=lambda epoch: (epoch["valid_accuracy"], -epoch["epoch"]))
    best = max(epoch["dev_accuracy"] for epoch in epochs)
    learnt = [epochs[-1].get(f"{split}_accuracy", math.nan) for split in ("kept", "replaced")]
    return [epochs[-1]["dev_accuracy"], picked["dev_accuracy"], best, *learnt]


def accuracies(record: Dict[str, Any]) -> str:
    """Return the table of an experiment with held-out rows: means over seeds, and their spread."""
    groups: Dict[Tuple[str, str], List[Dict[str, Any]]] = {}
    for run in record["runs"]:
        if run["state"] == "complete" and not run["search"]:
            groups.setdefault((run["task"], run["method"]), []).append(run)
    rows = []
    for (task, method), found in groups.items():
        columns = zip(*(readings(run["epochs"]) for run in found))
        cells = ["–" if any(map(math.isnan, values)) else spread(values) for values in columns]
        seconds = sum(run["seconds"] or math.nan for run in found) / len(found)
        rows.append([task, method, str(len(found)), *cells, f"{seconds:.0f}"])
    head = ["task", "method", "seeds", "last epoch", "epoch by held-out", "best epoch"]
    return markdown_table([*head, "kept labels", "replaced labels", "seconds"], rows)


def _time_up(*_: object) -> None:
    raise TimeUp


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Make the runs until the time is over; return the exit code."""
    options = parser()
    args = options.parse_args(argv)
    args.data = args.data or args.kit / "text"
    for name, experiments in OF_EXPERIMENTS.items():
        if getattr(args, name) and args.experiment not in experiments:
            options.error(f"--{name}: not of {args.experiment}, only of {', '.join(experiments)}")
    args.seeds = list(dict.fromkeys(args.seeds or SEEDS))
    args.methods = list(dict.fromkeys(args.methods or ()))
    for name in args.methods:
        try:
            glue.method_overrides(name.replace("_2x", ""), "TREC")
        except ValueError as error:
            options.error(str(error))
        if "distill" in name:
            options.error(f"--methods {name}: has no teacher here; use examples.glue.run")
    known = [one.name for group in GROUPS.get(args.experiment, ()) for one in group]
    for name in args.only or ():
        if name not in known:
            options.error(f"--only {name}: not of {args.experiment}, whose settings are {known}")
    if args.experiment in GROUPS and not (args.data / "TREC").is_dir():
        options.error(f"--data {args.data}: has no folder TREC; give the one of TREC/ and SST-2/")
    args.work, args.out = args.work.absolute(), args.out.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    trainings, ended = Trainings(args), threading.Event()

    def keep() -> None:
        while not ended.wait(10):
            trainings.write()

    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, _time_up)
    signal.alarm(max(args.seconds - ENDING, 1))
    keeper = threading.Thread(target=keep)
    keeper.start()
    code = 0
    try:
        trainings.convert()
        {"glue": trainings.glue, "mrpc": trainings.mrpc}.get(args.experiment, trainings.text)()
    except TimeUp:
        print("the time is over", flush=True)
    except (StageError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        code = 1
    finally:
        signal.alarm(0)
        ended.set()
        keeper.join()
        trainings.write()
    complete = any(run["state"] == "complete" for run in trainings.runs())
    return code if complete else 1


if __name__ == "__main__":
    sys.exit(main())
