"""The GLUE report: exact numbers from written logs, and what it reports of incomplete runs."""

import csv
import importlib.util
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from scipy import stats

from examples.common.fairseq_log import LOG_INTERVALS, TRAIN_WALL, WHOLE_EPOCHS, read_log
from examples.glue.report import __main__ as glue_report
from examples.glue.report.numbers import (
    AVERAGE,
    compare,
    comparisons,
    detectable_difference,
    holm,
    least_difference,
    sign_flip,
    summarise,
)
from examples.glue.report.runs import read_runs, rescored

ROOT = Path(__file__).parents[2]

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)

START = "{'_name': None, 'common': {'_name': None, 'seed': 1}}"  # fairseq prints its options
DONE = "done training in 12.3 seconds"


def settings(epochs=3, optimizer="adam", metric="mcc"):
    """Options as hydra records them."""
    return {
        "_name": None,
        "common": {"_name": None, "seed": 1, "fp16": False, "log_file": "/tmp/x"},
        "distributed_training": {"fp16": "${common.fp16}"},
        "optimization": {"_name": None, "max_epoch": epochs, "max_update": 0, "lr": [1e-5]},
        "checkpoint": {
            "best_checkpoint_metric": metric,
            "maximize_best_checkpoint_metric": True,
        },
        "model": {"_name": "roberta", "dropout": 0.1, "checkpoint_activations": None},
        "task": {"_name": "sentence_prediction", "shorten_method": "truncate"},
        "optimizer": {"_name": optimizer, "adam_betas": "(0.9, 0.98)"},
    }


def line(epoch, **stats):
    """A JSON line of fairseq: every figure a string but the epoch."""
    return json.dumps({"epoch": epoch, **{k: v if v == [] else str(v) for k, v in stats.items()}})


def epoch_lines(epoch, scores, updates=10, ups=2.0, wall=5):
    """Validation and training figures of one epoch; both are printed twice, as fairseq may."""
    valid = line(epoch, valid_loss=0.5, valid_pred=[], **scores, valid_num_updates=updates * epoch)
    train = line(
        epoch,
        train_loss=0.7,
        train_ups=ups,
        train_num_updates=updates * epoch,
        train_train_wall=wall,
    )
    return [valid, valid, train, train]


class Lines(list):
    """A log's lines, and the options of its run."""

    settings = None


def log(scores, key="valid_mcc", ups=2.0, **of_settings):
    """The log of a complete run: one score an epoch, or a dict of figures."""
    lines = Lines([START])
    for epoch, score in enumerate(scores, 1):
        figures = score if isinstance(score, dict) else {key: score}
        lines += epoch_lines(epoch, figures, ups=ups, wall=10 / ups)
    lines += [DONE]
    lines.settings = settings(len(scores), **of_settings)
    return lines


def cut(epochs, *lines):
    """The log of a run that broke off."""
    found = Lines([START, *lines])
    found.settings = settings(epochs)
    return found


def put_settings(folder, found):
    (folder / "hydra" / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / "hydra" / ".hydra" / "config.yaml").write_text(yaml.safe_dump(found))


def put(out, task, run, lines, rise=None):
    folder = out / task / run
    folder.mkdir(parents=True)
    seed = re.search(r"-seed(\d+)", run).group(1)
    (folder / "train.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if getattr(lines, "settings", None):
        found = lines.settings
        put_settings(folder, {**found, "common": {**found["common"], "seed": int(seed)}})
    if rise is not None:
        measured = out / task / f"{run}-sharpness"
        measured.mkdir()
        rows = [{"rho": 0.05, "per_batch": {"mean": rise, "standard_error": 0.1}}]
        curves = {"radii": [0, 0.1], "sam": [0.4, 0.5]}
        text = json.dumps({"sharpness": rows, "curves": curves})
        (measured / "sharpness.json").write_text(text)


ADAM = {1: 60.0, 2: 61.0, 3: 58.0, 4: 62.0, 5: 59.0}
SAM = {1: 61.0, 2: 61.5, 3: 60.0, 4: 62.0, 5: 60.5}  # above adam by 1, 0.5, 2, 0, 1.5


def summaries(runs, time_baseline):
    """A row for every task and method."""
    return [row for _, row in summarise(runs, time_baseline).iterrows()]


def read_lines(tmp_path, lines):
    (tmp_path / "train.log").write_text("\n".join(lines))
    return read_log(tmp_path / "train.log")


@pytest.fixture
def five(tmp_path):
    """Five seeds on CoLA; the best epoch is the second of three; sam takes twice as long."""
    out = tmp_path / "OUT"
    for method, scores, ups in (("adam", ADAM, 2.0), ("sam", SAM, 1.0)):
        for seed, best in scores.items():
            lines = log([best - 5, best, best - 1], ups=ups, optimizer=f"{method}_adam")
            put(out, "CoLA", f"{method}-seed{seed}", lines, rise=0.1 * seed / ups)
    return out


def test_best_median_mean_std(five):
    adam, sam = summaries(read_runs(five), "sam")
    assert tuple(adam[["n", "of", "best", "median", "mean"]]) == (5, 5, 62.0, 60.0, 60.0)
    assert adam["std"] == pytest.approx(math.sqrt(10 / 4))  # 0, 1, -2, 2, -1 around 60
    assert adam.last == 59.0  # an epoch later, one point below the best
    assert tuple(sam[["best", "median", "mean"]]) == (62.0, 61.0, 61.0)
    assert (adam.time, sam.time) == (0.5, 1.0)
    assert adam.rho == 0.05
    assert (adam.sharpness, sam.sharpness) == pytest.approx((0.15, 0.3))
    assert adam.sharpness_std == pytest.approx(0.05 * math.sqrt(10 / 4))


def test_paired_by_seed(five):
    """Differences 1, 0.5, 2, 0, 1.5: mean 1, variance 2.5/4, t = 1 / sqrt(0.625/5) = 2.828."""
    (found,) = comparisons(read_runs(five), "adam")
    assert found.differences == {1: 1.0, 2: 0.5, 3: 2.0, 4: 0.0, 5: 1.5}
    assert found.mean == 1.0 and found.std == pytest.approx(math.sqrt(0.625))
    assert found.p == pytest.approx(2 * stats.t.sf(math.sqrt(8), 4))
    assert found.p == pytest.approx(stats.ttest_rel(list(SAM.values()), list(ADAM.values())).pvalue)
    assert found.p_holm == found.p  # one method
    # All signs plus or all minus, and the 0 either way: 4 of 32.
    assert found.p_sign == 4 / 32
    half = stats.t.ppf(0.975, 4) * math.sqrt(0.125)
    assert (found.low, found.high) == (pytest.approx(1 - half), pytest.approx(1 + half))


def test_pairs_only_the_seeds_that_both_have():
    found = compare("CoLA", "sam", "adam", {1: 3.0, 2: 5.0, 9: 0.0}, {1: 2.0, 2: 3.0, 7: 0.0})
    assert found.differences == {1: 1.0, 2: 2.0}


@pytest.mark.parametrize(
    "differences, p, p_sign",
    [([], None, None), ([1.0], None, None), ([0.0, 0.0], 1.0, 1.0), ([0.1, 0.1, 0.1], None, 0.25)],
)
def test_where_t_does_not_exist(differences, p, p_sign):
    base = {i: 60.3 + i for i in range(len(differences))}
    found = compare(
        "CoLA", "sam", "adam", {i: base[i] + d for i, d in enumerate(differences)}, base
    )
    assert (found.p, found.p_sign) == (p, p_sign)


def test_holm_by_hand():
    """0.01 * 3, then 0.02 * 2, then 0.03 * 1 raised to the one before; None is not counted."""
    assert holm([0.03, None, 0.01, 0.02]) == [0.04, None, 0.03, 0.04]
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_five_seeds_can_show():
    assert sign_flip([1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 32
    assert least_difference(5) == pytest.approx(2.7764451 / math.sqrt(5))
    assert detectable_difference(2) > detectable_difference(3) > detectable_difference(5)
    size = detectable_difference(5)
    edge, shift = stats.t.ppf(0.975, 4), size * math.sqrt(5)
    assert stats.nct.sf(edge, 4, shift) + stats.nct.cdf(-edge, 4, shift) == pytest.approx(0.8)


def test_average_over_tasks(tmp_path):
    """Seed averages 61, 62 and 63, 62; RTE has a third seed, which has no average."""
    scores = {
        ("CoLA", "adam"): [50.0, 52.0],
        ("RTE", "adam"): [72.0, 72.0, 10.0],
        ("CoLA", "sam"): [55.0, 52.0],
        ("RTE", "sam"): [71.0, 72.0, 20.0],
    }
    for (task, method), values in scores.items():
        for seed, score in enumerate(values, 1):
            key = "valid_mcc" if task == "CoLA" else "valid_accuracy"
            put(tmp_path, task, f"{method}-seed{seed}", log([score], key))
    runs = read_runs(tmp_path)
    assert list(runs.tasks) == ["CoLA", "RTE"]
    report = glue_report.make(runs, "adam", "sam", {})
    (found,) = [c for c in report.compared if c.task == AVERAGE]
    assert found.differences == {1: 2.0, 2: 0.0}
    assert report.row(AVERAGE, "adam").best == (52 + 72) / 2
    assert report.row(AVERAGE, "adam")["median"] == (51 + 72) / 2
    assert report.row(AVERAGE, "adam")["std"] == pytest.approx(math.sqrt(0.5))


def test_parts_are_those_of_the_best_epoch(tmp_path):
    """MRPC by the mean of accuracy and F1, MNLI by the matched set."""
    mrpc = [
        {"valid_acc_and_f1": 88.0, "valid_accuracy": 86.0, "valid_f1": 90.0},
        {"valid_acc_and_f1": 87.5, "valid_accuracy": 87.0, "valid_f1": 88.0},
    ]
    mnli = [
        {"valid_accuracy": 80.0, "valid1_loss": 0.5, "valid1_accuracy": 83.0},
        {"valid_accuracy": 81.0, "valid1_loss": 0.5, "valid1_accuracy": 82.0},
    ]
    put(tmp_path, "MRPC", "adam-seed1", log(mrpc))
    put(tmp_path, "MNLI", "adam-seed1", log(mnli))
    row, other, _ = summaries(read_runs(tmp_path), None)
    assert (row.task, row.best, row.last) == ("MRPC", 88.0, 87.5)
    assert (row["accuracy"], row["F1"]) == (86.0, 90.0)
    assert (other.best, other["accuracy, mismatched"]) == (81.0, 82.0)
    assert math.isnan(other["F1"])


def noisy(tmp_path):
    """adam is best on noisy ``valid`` at its second epoch, sam at its third."""
    record = {"label_noise": {"share": 0.4, "seed": 3}, "splits": {"train": {"rows": 50}}}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "task.json").write_text(json.dumps(record))
    for method, valid in (("adam", (40, 48, 45)), ("sam", (20, 40, 50))):
        for seed in (1, 2):
            epochs = [
                {
                    "valid_accuracy": v,
                    "dev_accuracy": 2 * v + i * seed,
                    "kept_accuracy": 90.0 + i,
                    "replaced_accuracy": 30.0 + i,
                }
                for i, v in enumerate(valid)
            ]
            lines = log(epochs)
            lines.settings["task"]["data"] = str(tmp_path / "data")
            put(tmp_path / "OUT", "TREC", f"{method}-seed{seed}", lines, rise=0.1)
    return tmp_path / "OUT"


def test_scores_of_the_last_epoch_and_of_stopping_early(tmp_path):
    """dev is 2 valid + epoch x seed, epochs from 0: adam 92 and 94 at the end, 97 and 98 early."""
    runs = rescored(read_runs(noisy(tmp_path)), "dev_accuracy", "last", ["adam"])
    scores = {m: [run.best for run in runs.of("TREC", m)] for m in runs.methods}
    assert scores == {"adam": [92.0, 94.0], "adam:early": [97.0, 98.0], "sam": [102.0, 104.0]}
    adam, early, _ = summaries(runs, None)
    assert (adam["last"], early["last"]) == (93.0, 93.0)
    assert (adam["wrong labels"], early["wrong labels"]) == (32.0, 31.0)
    assert adam.sharpness == pytest.approx(0.1) and math.isnan(early.sharpness)
    best = rescored(read_runs(tmp_path / "OUT"), "kept_accuracy", "best", [])
    assert [run.best for run in best.of("TREC", "adam")] == [92.0, 92.0]
    for key, early in (("dev_f1", []), (None, ["swa"])):
        with pytest.raises(ValueError, match="--metric dev_f1: is in|--early swa: name some of"):
            rescored(read_runs(tmp_path / "OUT"), key, "last", early)


@needs_matplotlib
def test_report_of_wrong_labels(tmp_path):
    words = ["--metric", "dev_accuracy", "--epoch", "last", "--early", "adam"]
    out = tmp_path / "REPORT"
    assert glue_report.main([str(noisy(tmp_path)), "--out", str(out), *words]) == 0
    text = (out / "report.md").read_text()
    assert "Rows: train 50. **40% of the training labels are wrong** (seed 3)." in text
    assert "| right labels | wrong labels |" in text and "its **last epoch**" in text
    assert "wrong labels, training rows" in (out / "report.html").read_text()


def test_a_task_that_is_not_of_glue(tmp_path):
    put(tmp_path, "ORDER", "adam-seed1", log([87.0], "valid_accuracy"))
    put(tmp_path, "WMT", "adam-seed1", log([27.0], "valid_bleu", metric="bleu"))
    runs = read_runs(tmp_path)
    assert {task: metric.key for task, metric in runs.tasks.items()} == {
        "ORDER": "valid_accuracy",
        "WMT": "valid_bleu",
    }
    assert [run.best for run in runs.runs] == [87.0, 27.0]


# --- logs -------------------------------------------------------------------------------------
def test_a_resumed_run_repeats_epochs(tmp_path):
    """The second attempt repeats epoch 2: its figures count, once; epoch 3 comes after."""
    first = [START, *epoch_lines(1, {"valid_mcc": 1}), *epoch_lines(2, {"valid_mcc": 9})]
    again = [START, *epoch_lines(2, {"valid_mcc": 2}), *epoch_lines(3, {"valid_mcc": 3}), DONE]
    found = read_lines(tmp_path, first + again)
    assert [epoch["valid_mcc"] for epoch in found.epochs] == [1, 2, 3]
    assert (found.done, found.starts) == (True, 2)
    assert found.updates_per_second[WHOLE_EPOCHS] == found.updates_per_second[TRAIN_WALL] == 2.0


def test_a_run_that_began_anew_forgets_what_came_later(tmp_path):
    first = [START, *epoch_lines(1, {"valid_mcc": 1}), *epoch_lines(2, {"valid_mcc": 9}), DONE]
    found = read_lines(tmp_path, [*first, START, *epoch_lines(1, {"valid_mcc": 4})])
    assert [epoch["valid_mcc"] for epoch in found.epochs] == [4]
    assert not found.done


def test_pace_leaves_out_validation_and_starts(tmp_path):
    """Clean intervals: 10 updates at 5 a second and 20 at 4 a second, 30 in 7 seconds."""

    def inner(epoch, updates, ups):
        return line(epoch, update=0.1, loss=1, ups=ups, num_updates=updates, train_wall=1)

    lines = [START, inner(1, 10, 0.1), inner(1, 20, 5)]  # the first has the start in it
    lines += [*epoch_lines(1, {"valid_mcc": 1}, updates=25, wall=3)]
    lines += [inner(2, 30, 0.2), inner(2, 50, 4), "{'_name': None, 'common'", inner(2, 60, 0.3)]
    found = read_lines(tmp_path, lines)
    assert found.updates_per_second[LOG_INTERVALS] == pytest.approx(30 / 7)
    assert found.updates_per_second[TRAIN_WALL] == pytest.approx(25 / 3)
    assert len(found.epochs) == 1


def test_all_methods_of_a_task_are_timed_in_one_way(five):
    """One run's log has no intervals, so none is timed by them."""
    runs = read_runs(five)
    first = runs.runs[0]
    speeds = {**first.log.updates_per_second, LOG_INTERVALS: 99.0}
    first = first._replace(log=first.log._replace(updates_per_second=speeds))
    runs = runs._replace(runs=[first, *runs.runs[1:]])
    assert {row.timed_by for row in summaries(runs, "sam")} == {TRAIN_WALL}


def test_settings_from_hydras_record(five):
    """By name; a component by its group's; what is not set or refers to another option is not."""
    found = read_runs(five).of("CoLA", "sam")[0].settings
    assert found["optimizer"] == "sam_adam" and found["model"] == "roberta"
    assert found["adam_betas"] == "(0.9, 0.98)"
    assert found["lr"] == "[1e-05]" and found["fp16"] == "False"
    assert found["shorten_method"] == "truncate"
    assert found["task"] == "sentence_prediction"
    assert "checkpoint_activations" not in found


@needs_matplotlib
def test_runs_without_hydras_record_are_named(five, tmp_path):
    """As fairseq-train and older versions leave them: counted, but their options are unknown."""
    (five / "CoLA" / "sam-seed2" / "hydra" / ".hydra" / "config.yaml").unlink()
    assert glue_report.main([str(five), "--out", str(tmp_path / "R")]) == 0
    text = (tmp_path / "R" / "report.md").read_text(encoding="utf-8")
    assert "10 of 10 runs complete" in text
    assert "CoLA: the options of `sam` are not known" in text and "different options" not in text


def test_lines_with_a_prefix_and_lines_cut_off(tmp_path):
    """As in ``fairseq-train ... | tee train.log``, killed in the middle of a line."""
    lines = [f"2026-11-21 12:00:00 | INFO | train | {x}" for x in epoch_lines(1, {"valid_mcc": 7})]
    found = read_lines(tmp_path, [*lines, lines[-1][:60]])
    assert [epoch["valid_mcc"] for epoch in found.epochs] == [7]


@needs_matplotlib
def test_seeds_of_different_settings_are_named(tmp_path):
    """A run of another length among those of a method, left from an earlier command."""

    def report():
        assert glue_report.main([str(tmp_path / "OUT"), "--out", str(tmp_path / "R")]) == 0
        return (tmp_path / "R" / "report.md").read_text(encoding="utf-8")

    for seed in (1, 2):
        put(tmp_path / "OUT", "CoLA", f"adam-seed{seed}", log([50.0]))
    assert "different options" not in report()
    other = log([50.0])
    other.settings["lr_scheduler"] = {"warmup_updates": 7}
    put(tmp_path / "OUT", "CoLA", "adam-seed3", other)
    text = report()
    assert "different options" in text and "CoLA adam: `warmup_updates` – / 7" in text


def test_a_run_that_is_made_anew_does_not_count(tmp_path):
    """The finished one beside its .partial is of other options, or it would not be made again."""
    out = tmp_path / "OUT"
    put(out, "CoLA", "adam-seed1", log([50.0]))
    put(out, "CoLA", "adam-seed1.partial", log([60.0]))
    assert [run.state for run in read_runs(out).runs] == ["incomplete"]


# --- runs that do not count -------------------------------------------------------------------
@pytest.fixture
def broken(tmp_path):
    """A run of each kind that does not count, beside three that do."""
    out = tmp_path / "OUT"
    for seed in (1, 2, 3):
        put(out, "CoLA", f"adam-seed{seed}", log([50.0 + seed, 49.0], ups=2.0))
    put(out, "CoLA", "sam-seed1", log([60.0, 59.0], ups=1.0))
    put(out, "CoLA", "sam-seed2", cut(10, *epoch_lines(1, {"valid_mcc": 99.0})))
    put(out, "CoLA", "r3f-seed1", log([math.nan, math.nan]))
    put(out, "CoLA", "r3f-seed2", cut(10, "Traceback (most recent call last):"))
    put(out, "CoLA", "r3f-seed3.partial", cut(10, *epoch_lines(1, {"valid_mcc": 99.0}), DONE))
    put(out, "CoLA", "smart-seed1", log([50.0], "valid_accuracy"))
    (out / "CoLA" / "smart-seed2").mkdir()
    put(out, "RTE", "adam-seed1", log([70.0], "valid_accuracy"))
    return out


def test_what_is_wrong_with_a_run(broken):
    runs = {(r.task, r.method, r.seed): (r.state, r.why) for r in read_runs(broken).runs}
    assert runs["CoLA", "sam", 1] == ("complete", "")
    epoch = "training did not end; the log stops in or after epoch 1 of 10"
    assert runs["CoLA", "sam", 2] == ("incomplete", epoch)
    assert runs["CoLA", "sam", 3] == ("missing", "there is no folder for it")
    assert runs["CoLA", "r3f", 1] == ("failed", "valid_mcc is never a number")
    assert runs["CoLA", "r3f", 2] == ("failed", "no epoch was finished")
    assert runs["CoLA", "r3f", 3] == ("incomplete", epoch)
    assert runs["CoLA", "smart", 1] == ("failed", "valid_mcc is not in the log")
    assert runs["CoLA", "smart", 2] == ("failed", "there is no train.log")
    assert runs["RTE", "sam", 1][0] == "missing"
    assert len(runs) == 4 * 3 + 4 * 1


def test_only_complete_runs_are_in_the_numbers(broken):
    rows = {(r.task, r.method): r for r in summaries(read_runs(broken), "sam")}
    assert (rows["CoLA", "sam"].n, rows["CoLA", "sam"].of) == (1, 3)
    assert rows["CoLA", "sam"].best == 60.0 and math.isnan(rows["CoLA", "sam"]["std"])
    assert rows["CoLA", "r3f"].n == 0 and math.isnan(rows["CoLA", "r3f"]["mean"])
    assert math.isnan(rows["RTE", "adam"].time)  # sam was not run there


def test_reaching_the_last_epoch_is_complete_without_the_farewell(tmp_path):
    without_done = log([1.0, 2.0])
    assert without_done.pop() == DONE
    put(tmp_path, "CoLA", "adam-seed1", without_done)
    assert read_runs(tmp_path).runs[0].state == "complete"


@needs_matplotlib
def test_nothing_is_dropped_silently(broken, tmp_path):
    assert glue_report.main([str(broken), "--out", str(tmp_path / "R")]) == 0
    text = (tmp_path / "R" / "report.md").read_text(encoding="utf-8")
    page = (tmp_path / "R" / "report.html").read_text(encoding="utf-8")
    assert "5 of 16 runs complete" in text and "5 of 16 runs complete" in page
    uncounted = text[text.index("## Runs that are not counted") :]
    listed = [[c.strip() for c in x.split("|")[1:-1]] for x in uncounted.split("\n") if "| " in x]
    assert ["CoLA", "r3f", "1", "failed", "valid_mcc is never a number"] in listed
    assert ["CoLA", "sam", "3", "missing", "there is no folder for it"] in listed
    assert ["RTE", "sam", "all", "missing", "the method was not run on this task"] in listed
    assert "**60.0** (1/3)" in text and "<strong>60.0</strong> (1/3)" in page


@needs_matplotlib
def test_a_seed_that_is_not_the_folders(five, tmp_path):
    """Such a run is not what it is paired as."""
    glue_report.main([str(five), "--out", str(tmp_path / "R")])
    warning = "The recorded seed is not the folder's: `sam` seed 2 (recorded: 9)."
    assert warning not in (tmp_path / "R" / "report.md").read_text(encoding="utf-8")
    put_settings(five / "CoLA" / "sam-seed2", {"common": {"seed": 9}})
    glue_report.main([str(five), "--out", str(tmp_path / "R")])
    assert warning in (tmp_path / "R" / "report.md").read_text(encoding="utf-8")


@needs_matplotlib
def test_one_seed_only(tmp_path):
    for method, score in (("adam", 50.0), ("sam", 51.0)):
        put(tmp_path / "OUT", "CoLA", f"{method}-seed1", log([score]))
    assert glue_report.main([str(tmp_path / "OUT"), "--out", str(tmp_path / "R")]) == 0
    text = (tmp_path / "R" / "report.md").read_text(encoding="utf-8")
    assert "With **n = 1** there is a difference and no test" in text
    assert re.search(r"\| sam +\| 1 +\| \+1\.00 +\| – +\| – +\| – +\| – +\| – +\|", text)
    assert not re.search(r"\d ± \d", text) and "of 1 seed**" in text


# --- the files --------------------------------------------------------------------------------
def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@needs_matplotlib
def test_tables_and_csv(five, tmp_path):
    out = tmp_path / "R"
    assert glue_report.main([str(five), "--out", str(out)]) == 0
    text = (out / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\| adam +\| 60\.0 ± 1\.6 +\|", text)
    assert re.search(r"\| sam +\| \*\*61\.0 ± 0\.8\*\* +\|", text)
    assert re.search(r"\| sam +\| 5 +\| \+1\.00 +\| 0\.79 +\| \+0\.02 to \+1\.98 +\| 0\.047", text)
    assert re.search(r"\| adam +\| 0\.50 +\|", text)
    assert "so never 0.05" in text and "more than 1.24 standard deviations" in text
    assert (out / "task-CoLA.png").is_file()

    runs = rows_of(out / "runs.csv")
    assert [float(r["best"]) for r in runs] == [*ADAM.values(), *SAM.values()]
    assert [float(r["last"]) for r in runs] == [v - 1 for v in (*ADAM.values(), *SAM.values())]
    assert {r["best_epoch"] for r in runs} == {"2"} and {r["state"] for r in runs} == {"complete"}
    report = glue_report.make(read_runs(five), "adam", "sam", {})
    for (_, row), read in zip(report.rows.iterrows(), rows_of(out / "summary.csv")):
        assert (row.task, row.method) == (read["task"], read["method"])
        for name in ("best", "median", "mean", "std", "time", "updates_per_second", "sharpness"):
            assert float(read[name]) == row[name]  # all digits
    (read,) = rows_of(out / "comparisons.csv")
    (compared,) = report.compared
    assert float(read["p"]) == compared.p and int(read["n"]) == 5
    pairs = dict(pair.split(":") for pair in read["differences"].split())
    assert {int(seed): float(d) for seed, d in pairs.items()} == compared.differences


class Page(HTMLParser):
    """Collects what a page has, and checks that its elements are closed in order."""

    VOID = {"meta", "br", "hr", "img", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def values(self, *names):
        return [a[n] for _, a in self.elements for n in names if a.get(n) is not None]


@needs_matplotlib
def test_the_page_stands_alone(five, tmp_path):
    """Nothing is loaded, every link leads to a place in the page, and no name is given twice."""
    glue_report.main([str(five), "--out", str(tmp_path / "R")])
    text = (tmp_path / "R" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {tag for tag, _ in page.elements} & {"link", "script", "iframe", "img", "object"}
    assert not re.search(r"https?:|//www|@import|@font-face|url\((?!#)", text)
    names = page.values("id")
    assert len(names) == len(set(names))
    links = page.values("href", "xlink:href", "src")
    assert links and all(link[0] == "#" and link[1:] in names for link in links)
    used = re.findall(r"url\(#([^)]+)\)", text)
    assert used and set(used) <= set(names)
    drawn = [a["viewbox"] for tag, a in page.elements if tag == "svg"]
    assert len(drawn) == 6  # score, two losses, differences, sharpness, loss around the minimum
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert "#010203" not in text and "#040506" not in text


@needs_matplotlib
def test_names_with_signs_are_shown_as_they_are(tmp_path):
    put(tmp_path / "OUT", "CoLA", "a<b>&c-seed1", log([50.0]))
    glue_report.main([str(tmp_path / "OUT"), "--out", str(tmp_path / "R")])
    text = (tmp_path / "R" / "report.html").read_text(encoding="utf-8")
    assert "a&lt;b&gt;&amp;c" in text and "a<b>" not in text
    Page(text)


# --- the paper --------------------------------------------------------------------------------
def test_figures_of_the_paper():
    """Read off the paper: RoBERTa large in table 1, running times, and "18 %" over SAM in its text.
    Where its row has an average, that is the mean of the row."""
    path = ROOT / "examples" / "glue" / "report" / "paper.json"
    paper = json.loads(path.read_text(encoding="utf-8"))
    entries = {(e["where"], e["statistic"], e["method"]): e["scores"] for e in paper["entries"]}
    best = entries["table 1, RoBERTa large", "best", "delta_sam"]
    assert (best["CoLA"], best["RTE"], best["average"]) == (71.9, 88.8, 90.14)
    assert entries["table 1, BERT base", "best", "adam"]["MNLI"] == 83.8
    assert entries["its text: 18 % more than SAM", "time", "delta_sam"] == {"average": 1.18}
    minutes = [
        entries["table 4, RoBERTa large", "minutes", m]["SST-2"] for m in ("sam", "delta_sam")
    ]
    assert minutes == [285, 348]
    assert entries["table 4, RoBERTa large", "time", "delta_sam"]["SST-2"] == round(348 / 285, 3)
    assert entries["table 2, Mirror-BERT base", "spearman", "r3f+delta_sam"]["SICK-R"] == 70.83
    for (where, statistic, method), scores in entries.items():
        if statistic == "best" and method != "r3f":
            tasks = [score for task, score in scores.items() if task != "average"]
            assert sum(tasks) / 8 == pytest.approx(scores["average"], abs=0.06), (where, method)
    assert "BERT base sam RTE" in paper["repaired"] and "EMNLP 2022" in paper["source"]
    assert "missing" not in paper


@needs_matplotlib
def test_the_papers_figures_are_marked(five, tmp_path):
    args = [str(five), "--out", str(tmp_path / "R")]
    for method in ("adam", "sam"):
        put(five, "RTE", f"{method}-seed1", log([70.0], "valid_accuracy"))
    glue_report.main(args)
    text = (tmp_path / "R" / "report.md").read_text(encoding="utf-8")
    assert "They are readings, not quotations" in text
    theirs = r"\| \*delta_sam \(paper, table 1, RoBERTa large\)\* +\| 71\.9 +\| 88\.8 +\| 90\.1 "
    assert re.search(theirs, text)
    assert re.search(r"\| \*sam \(paper, table 4, BERT base\)\* +\| 25 ", text)
    theirs = r"\| \*delta_sam \(paper, its text: 18 % more than SAM\)\* +\|( – +\|){2} 1\.18 "
    assert re.search(theirs, text)

    entry = {"where": "table 9, a model", "method": "sam"}
    entries = [
        {**entry, "statistic": "best", "scores": {"CoLA": 12.3}},
        {**entry, "statistic": "time", "scores": {"CoLA": 1.0}},
    ]
    made_up = tmp_path / "paper.json"
    made_up.write_text(json.dumps({"source": "a test", "entries": entries}))
    glue_report.main([*args, "--paper", str(made_up)])
    text = (tmp_path / "R" / "report.md").read_text(encoding="utf-8")
    page = (tmp_path / "R" / "report.html").read_text(encoding="utf-8")
    assert re.search(r"\| \*sam \(paper, table 9, a model\)\* \| 12\.3 ", text)
    theirs = "<td><em>sam (paper, table 9, a model)</em></td>"
    assert page.count(theirs) == 2 and "its text" not in page


# --- the command ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--baseline", "bert"],
            "--baseline bert: is not among the methods; name one of adam, sam",
        ),
        (["--time-baseline", "x"], "--time-baseline x: is not among the methods"),
        (["--tasks", "WNLI"], "--tasks WNLI:"),
        (["--methods", "none"], "holds no run"),
        (["--paper", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_errors(five, tmp_path, capsys, words, message):
    assert glue_report.main([str(five), "--out", str(tmp_path / "R"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "R").exists()


def test_tasks_and_methods_are_chosen_and_ordered(five):
    put(five, "RTE", "adam-seed1", log([70.0], "valid_accuracy"))
    runs = read_runs(five, ["RTE", "CoLA"], ["sam", "adam", "r_drop"])
    assert list(runs.tasks) == ["RTE", "CoLA"] and runs.methods == ["sam", "adam", "r_drop"]
    assert {run.state for run in runs.of("CoLA", "r_drop", None)} == {"missing"}
    assert list(read_runs(five, ["CoLA"]).tasks) == ["CoLA"]


@pytest.mark.parametrize(
    "methods, given, one",
    [
        (["adam", "sam_adam", "sam"], None, "sam"),
        (["adam", "sam_adam", "sam_sgd"], None, "sam_adam"),
        (["adam", "sam_sgd"], None, "sam_sgd"),
        (["adam", "delta_sam_adam"], None, None),
        (["adam", "sam"], "adam", "adam"),
    ],
)
def test_whose_time_is_one(methods, given, one):
    assert glue_report.time_baseline(methods, given) == one
