"""examples/glue: the recipes hold the published values, and the runner runs, skips and survives."""

import csv
import fcntl
import itertools
import json
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
import yaml

from examples.glue import options as glue_options
from examples.glue import stages as glue_stages
from tests.helpers import runs, tiny
from tests.helpers.processes import run_module

ROOT = Path(__file__).parents[2]
GLUE = ROOT / "examples" / "glue"
CONFIG = GLUE / "config"

TASKS = "MNLI QNLI QQP RTE SST-2 MRPC CoLA STS-B".split()
SMALL = (
    "model.encoder_layers=2 model.encoder_embed_dim=16 model.encoder_ffn_embed_dim=32 "
    "model.encoder_attention_heads=2 model.max_positions=64 task.max_positions=64 "
    "optimization.max_update=2"
).split()


def recipe(backbone, task):
    return yaml.safe_load((CONFIG / "recipe" / backbone / f"{task}.yaml").read_text())


# lr, batch, updates, warm-up, rho, beta: the tables in the README of fairseq's GLUE example, of
# R3F's, of R-Drop's BERT recipe, and of the delta-SAM paper.
PUBLISHED = {
    ("roberta_large", "MNLI"): (1e-5, 32, 123873, 7432, 0.02, 3),
    ("roberta_large", "RTE"): (2e-5, 16, 2036, 122, 0.02, 5),
    ("roberta_large", "SST-2"): (1e-5, 32, 20935, 1256, 0.05, 3),
    ("roberta_large", "CoLA"): (1e-5, 16, 5336, 320, 0.02, 20),
    ("roberta_large", "STS-B"): (2e-5, 16, 3598, 214, 0.01, 10),
    ("roberta_large_r3f", "RTE"): (1e-5, 8, 3120, 187, 0.02, 5),
    ("roberta_large_r3f", "QQP"): (5e-6, 32, 113272, 28318, 0.02, 3),
    ("roberta_large_r3f", "MRPC"): (1e-5, 16, 2296, 137, 0.02, 5),
    ("bert_base", "QNLI"): (1e-5, 32, 33112, 1986, 0.05, 3),
    ("bert_base", "MRPC"): (1e-5, 16, 2296, 137, 0.05, 10),
    ("bert_base", "STS-B"): (1e-5, 16, 3598, 214, 0.01, 10),
}


@pytest.mark.parametrize("backbone, task", PUBLISHED)
def test_published_values(backbone, task):
    found = recipe(backbone, task)
    assert (
        float(found["optimization"]["lr"][0]),
        found["dataset"]["batch_size"],
        found["optimization"]["max_update"],
        found["lr_scheduler"]["warmup_updates"],
        found["optimizer"]["sam_rho"],
        found["optimizer"]["delta_sam_beta"],
    ) == PUBLISHED[backbone, task]


@pytest.mark.parametrize("backbone", ["roberta_large", "roberta_base", "bert_base"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_recipe_with_its_metric(backbone, task):
    found = recipe(backbone, task)
    metric = {
        "CoLA": "mcc",
        "MRPC": "acc_and_f1",
        "QQP": "acc_and_f1",
        "STS-B": "pearson_and_spearman",
    }.get(task, "accuracy")
    assert found["checkpoint"]["best_checkpoint_metric"] == metric
    if metric != "accuracy":
        assert any(key.startswith("report_") for key in found["criterion"])
    assert found["task"]["num_classes"] == {"MNLI": 3, "STS-B": 1}.get(task, 2)
    assert found["criterion"]["regression_target"] == (task == "STS-B")
    assert found["optimization"]["max_update"] == found["lr_scheduler"]["total_num_update"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Data of two tasks and a checkpoint to start from."""
    folder = tmp_path_factory.mktemp("glue")
    for task in ("RTE", "CoLA"):
        tiny.write_classification(folder / "data" / task)
    data = folder / "data" / "RTE"
    return folder, runs.train(data, folder / "start", "--max-update", "1").save_dir


def output_of(module, argv, code, folder):
    """What a program says, started in a folder and without GPUs; it has to end with the code."""
    env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = run_module(module, argv, folder / "said", env, folder)
    assert result.returncode == code, result.stdout
    return result.stdout


def run(prepared, out, *more, code=0):
    folder, start = prepared
    argv = [
        *("--data", folder / "data"),
        *("--checkpoint", start / "checkpoint_last.pt", "--backbone", "roberta_base"),
        *("--tasks", "RTE", "--methods", "adam", "r3f+delta_sam", "--seeds", "1"),
        *("--cores", "1", "--jobs", "2", "--out", out, *more),
    ]
    return output_of("examples.glue.run", argv, code, folder)


class TestRunner:
    def test_runs_reports_skips_and_goes_on(self, prepared, tmp_path):
        out = tmp_path / "out"
        text = run(prepared, out, "--sharpness", "--", *SMALL)
        assert "2 of 2 runs are done" in text
        log = (out / "RTE" / "r3f+delta_sam-seed1" / "train.log").read_text()
        assert re.search('"train_symm_kl"', log) and re.search('"train_sharpness"', log)
        assert (out / "RTE" / "adam-seed1" / "checkpoint_best.pt").is_file()
        assert (out / "RTE" / "adam-seed1" / "hydra" / ".hydra" / "config.yaml").is_file()
        assert not (out / "RTE" / "adam-seed1" / "checkpoint_last.pt").exists()
        with (out / "report" / "runs.csv").open() as file:
            assert len(list(csv.DictReader(file))) == 2
        assert (out / "report" / "report.html").is_file()
        assert (out / "RTE" / "adam-seed1-sharpness" / "sharpness.json").is_file()
        again = run(prepared, out, "--sharpness", "--", *SMALL)
        assert again.count("already there") == 4

    def test_averages(self, prepared, tmp_path):
        """2 updates: SWA averages the weights after 1 and 2, at the recipe's highest rate."""
        out = tmp_path / "out"
        more = ["--methods", "ema", "delta_sam+swa", "--", *SMALL]
        assert "2 of 2 runs are done" in run(prepared, out, *more)
        log = (out / "RTE" / "delta_sam+swa-seed1" / "train.log").read_text()
        assert '"valid_swa_n": "2"' in log and '"train_lr": "2e-05"' in log
        assert '"train_sharpness"' in log
        log = (out / "RTE" / "ema-seed1" / "train.log").read_text()
        assert "'swa_decay': 0.998" in log and '"valid_swa_n": "2"' in log

    def test_a_student_learns_from_the_teacher_of_its_task(self, prepared, tmp_path):
        """And is made again when its teacher was."""
        folder, start = prepared
        teacher = tmp_path / "large" / "RTE" / "model.pt"
        teacher.parent.mkdir(parents=True)
        shutil.copy(start / "checkpoint_last.pt", teacher)
        more = ["--methods", "distill+delta_sam", "--teacher", tmp_path / "large/{task}/model.pt"]
        out = tmp_path / "out"
        assert "1 of 1 runs are done" in run(prepared, out, *more, "--", *SMALL)
        log = (out / "RTE" / "distill+delta_sam-seed1" / "train.log").read_text()
        assert '"train_distill_agreement"' in log and '"train_sharpness"' in log
        assert "already there" in run(prepared, out, *more, "--", *SMALL)
        torch.save({**torch.load(teacher, weights_only=False), "other": 1}, teacher)
        assert "already there" not in run(prepared, out, *more, "--", *SMALL)

    def test_a_failed_run_is_named_and_stops_no_other(self, prepared, tmp_path):
        """SMART at a share of updates that are not set ends with fairseq-train's own error."""
        more = ["--methods", "smart", "adam", "--", *SMALL, "optimization.max_update=0"]
        more += ["optimization.max_epoch=1"]
        text = run(prepared, tmp_path / "out", *more, code=1)
        assert "RTE smart seed 1: FAILED" in text and "1 of 2 runs are done" in text
        assert "--smart-switch" in text and "output.log" in text
        assert (tmp_path / "out" / "RTE" / "adam-seed1").is_dir()

    def test_two_at_once_do_not_write_the_same_run(self, prepared, tmp_path):
        """A run that is still being made, by a program that was killed say, is left alone."""
        out = tmp_path / "out"
        lock = out / "RTE" / "adam-seed1.lock"
        lock.parent.mkdir(parents=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = run(prepared, out, "--methods", "adam", "--", *SMALL, code=1)
        assert "is being made by another process" in text

    def test_paths_with_signs_of_hydras_grammar(self, prepared, tmp_path):
        out = tmp_path / "lr=2e-5, é (a~b)"
        text = run(prepared, out, "--methods", "adam", "--", *SMALL)
        assert "1 of 1 runs are done" in text and (out / "RTE" / "adam-seed1").is_dir()

    def test_sharpness_of_runs_that_kept_no_checkpoint(self, prepared, tmp_path):
        more = ["--methods", "adam", "--", *SMALL]
        run(prepared, tmp_path / "out", "--keep", "none", *more)
        text = run(prepared, tmp_path / "out", "--sharpness", *more, code=2)
        assert "1 existing runs kept no checkpoint" in text and "adam-seed1" in text

    def test_list_and_only(self, prepared, tmp_path):
        more = ["--tasks", "RTE", "CoLA", "--seeds", "1", "2", "--keep", "none"]
        lines = run(prepared, tmp_path / "out", *more, "--list").splitlines()
        titles = [line.split(None, 1)[1] for line in lines if re.match(r" +\d", line)]
        assert len(titles) == 8 and titles[3] == "CoLA r3f+delta_sam seed 1"
        run(prepared, tmp_path / "out", *more, "--only", "3", "--", *SMALL)
        (folder,) = (tmp_path / "out" / "CoLA").iterdir()
        assert folder.name == "r3f+delta_sam-seed1" and not list(folder.glob("*.pt"))

    def test_values_that_were_chosen(self, prepared, tmp_path):
        """SAM takes the rho, delta-SAM both, plain Adam neither; the recipe has 0.02 and 5."""
        chosen = tmp_path / "chosen.json"
        values = {"sam_rho": 0.25, "delta_sam_beta": 50}
        chosen.write_text(json.dumps({"chosen": {"RTE": values}}))
        more = ["--methods", "adam", "sam", "delta_sam", "--keep", "none", "--chosen", chosen]
        run(prepared, tmp_path / "out", *more, "--", *SMALL)
        for method, rho, beta in (("adam", 0, 5), ("sam", 0.25, 0), ("delta_sam", 0.25, 50)):
            log = (tmp_path / "out" / "RTE" / f"{method}-seed1" / "train.log").read_text()
            found = re.search(r"'sam_rho': ([\d.]+).*'delta_sam_beta': ([\d.]+)", log)
            assert tuple(map(float, found.groups())) == (rho, beta), method
        more = ["--tasks", "CoLA", "--chosen", chosen]
        assert "lacks CoLA" in run(prepared, tmp_path / "out", *more, code=2)
        chosen.write_text(json.dumps({"chosen": {"RTE": values}, "backbone": "bert_base"}))
        text = run(prepared, tmp_path / "out", "--chosen", chosen, "--list", code=2)
        assert "was chosen for --backbone bert_base, not" in text
        rho = {"sam_rho": 0.02}
        for wrong in ({}, rho, {**rho, "delta_sam_beta": "x"}, {**rho, "delta_sam_beta": -1}, 0.5):
            chosen.write_text(json.dumps({"chosen": {"RTE": wrong}}))
            text = run(prepared, tmp_path / "out", "--chosen", chosen, "--list", code=2)
            assert "not a chosen.json" in text

    @pytest.mark.parametrize(
        "options, expected",
        [
            (["--methods", "sgd"], ["--methods sgd", "delta_sam"]),
            (["--methods", "r3f+tram"], ["--methods r3f+tram", "drop one"]),
            (["--methods", "adam+sam"], ["--methods adam+sam", "at most one"]),
            (["--checkpoint", "/no/such.pt"], ["--checkpoint /no/such.pt", "no such file"]),
            (["--recipe", "bert_huge"], ["--recipe bert_huge", "roberta_large"]),
            (
                ["--recipe", "roberta_large_r3f", "--tasks", "STS-B"],
                ["--recipe roberta_large_r3f", "STS-B.yaml is missing"],
            ),
            (["--tasks", "MNLI"], ["--data", "MNLI", "--glue-dir"]),
            (["--sharpness", "--keep", "none"], ["--sharpness", "--keep best"]),
            (["--jobs", "0"], ["--jobs", "0"]),
            (["--methods", "distill"], ["--methods distill", "--teacher"]),
            (["--methods", "distill+sam", "--teacher", "no/{task}.pt"], ["no/RTE.pt is missing"]),
            (["--only", "9"], ["--only 9", "0 to 1"]),
        ],
    )
    def test_wrong_options(self, prepared, tmp_path, options, expected):
        text = run(prepared, tmp_path / "out", *options, code=2)
        assert all(part in text for part in expected)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """GLUE's TSV files of CoLA, cut, with a wordpiece vocabulary, and a checkpoint for both."""
    folder = tmp_path_factory.mktemp("raw")
    letters = "abcdefgh"
    rows = [f"s\t{i % 2}\t*\t{letters[i % 8]} {letters[(i * 3) % 8]}\n" for i in range(40)]
    (folder / "GLUE" / "CoLA").mkdir(parents=True)
    (folder / "GLUE" / "CoLA" / "train.tsv").write_text("".join(rows))
    (folder / "GLUE" / "CoLA" / "dev.tsv").write_text("".join(rows[:8]))
    (folder / "vocab.txt").write_text(
        "\n".join("[PAD] [UNK] [CLS] [SEP] [MASK]".split() + [*letters])
    )
    (folder / "dict.txt").write_text("".join(f"{letter} 1\n" for letter in letters))
    argv = [
        *("--glue-dir", folder / "GLUE", "--task", "CoLA", "--any-rows"),
        *("--dict", folder / "dict.txt", "--out", folder / "data"),
        *("--bpe", "wordpiece", "--wordpiece-vocab", folder / "vocab.txt"),
    ]
    output_of("deltasam_fairseq.glue.prepare", argv, 0, folder)
    return folder, runs.train(folder / "data", folder / "start", "--max-update", "1").save_dir


def search(raw, out, *more, code=0):
    folder, start = raw
    argv = [
        *("--any-rows", "--glue-dir", folder / "GLUE"),
        *("--checkpoint", start / "checkpoint_last.pt", "--dict", folder / "dict.txt"),
        *("--bpe", "wordpiece", "--bpe-options", f"wordpiece-vocab={folder / 'vocab.txt'}"),
        *("--backbone", "roberta_base", "--tasks", "CoLA", "--cores", "1", "--jobs", "2"),
        *("--out", out, *more),
    ]
    return output_of("examples.glue.search", argv, code, folder)


def test_an_own_task_is_trained_by_the_default_recipe(raw, tmp_path):
    """CoLA's rows under another name, 32 of them, 13 labels wrong: 2 batches, 10 epochs."""
    folder, start = raw
    shutil.copytree(folder / "GLUE" / "CoLA", tmp_path / "DATA" / "MINE")
    small = [word for word in SMALL if "max_update" not in word]
    argv = [
        *("--glue-dir", tmp_path / "DATA"),
        *("--tasks", "MINE", "--task-columns", "4", "2", "--train-rows", "32"),
        *("--label-noise", "0.4", "--checkpoint", start / "checkpoint_last.pt"),
        *("--dict", folder / "dict.txt", "--bpe", "wordpiece"),
        *("--bpe-options", f"wordpiece-vocab={folder / 'vocab.txt'}", "--backbone", "roberta_base"),
        *("--methods", "sam", "--seeds", "1", "--cores", "1", "--out", tmp_path / "out"),
    ]
    text = output_of("examples.glue.run", [*argv, "--", *small], 0, folder)
    assert "1 of 1 runs are done" in text
    log = (tmp_path / "out" / "MINE" / "sam-seed1" / "train.log").read_text()
    assert '"train_num_updates": "20"' in log and '"train_sharpness"' in log
    record = json.loads((tmp_path / "out" / "data" / "MINE" / "task.json").read_text())
    assert record["splits"]["train"]["replaced_labels"] == 13
    assert '"kept_accuracy"' in log and '"replaced_accuracy"' in log


def assert_chosen_by_last(record, rows):
    """Of the rhos within a standard error of the best the largest, of the betas the smallest."""
    scores, chosen = record["scores"]["CoLA"], record["chosen"]["CoLA"]
    for method, option, largest in (("sam", "rho", True), ("delta_sam", "beta", False)):
        found = {
            float(k.split(option)[1]): v for k, v in scores.items() if k.startswith(f"{method}-")
        }
        best = max(found.values())
        share = max(best, 0) / 100
        least = best - 100 * (share * (1 - share) / rows) ** 0.5
        alike = [value for value, score in found.items() if score >= least]
        assert chosen[f"{method}_{option}"] == (max if largest else min)(alike)


class TestSearch:
    def test_the_best_of_the_held_out_rows_is_chosen(self, raw, tmp_path):
        """rho by SAM's scores, then beta by delta-SAM's, as the logs have them; dev is not read."""
        (raw[0] / "GLUE" / "CoLA" / "dev.tsv").rename(raw[0] / "dev.tsv")
        try:
            more = ["--rho", "0.5", "2", "--beta", "3", "70", "--", *SMALL]
            text = search(raw, tmp_path, *more)
        finally:
            (raw[0] / "dev.tsv").rename(raw[0] / "GLUE" / "CoLA" / "dev.tsv")
        record = json.loads((tmp_path / "chosen.json").read_text())
        rho, beta = (record["chosen"]["CoLA"][key] for key in ("sam_rho", "delta_sam_beta"))
        assert f"--chosen {tmp_path / 'chosen.json'}" in text
        assert (record["backbone"], record["seeds"]) == ("roberta_base", [1])
        scores = record["scores"]["CoLA"]
        assert set(scores) == {
            *("adam", "sam-rho0.5", "sam-rho2"),
            *(f"delta_sam-rho{rho:g}-beta{b}" for b in (3, 70)),
        }
        for name, score in scores.items():
            log = (tmp_path / "CoLA" / f"{name}-seed1" / "train.log").read_text()
            logged = max(map(float, re.findall(r'"valid_mcc": "([-\d.]+)"', log)))
            assert score == logged
        assert scores[f"sam-rho{rho:g}"] == max(v for k, v in scores.items() if k[:3] == "sam")
        chosen = scores[f"delta_sam-rho{rho:g}-beta{beta:g}"]
        assert chosen == max(v for k, v in scores.items() if k.startswith("delta_sam"))
        (tmp_path / "chosen.json").unlink()
        for name, score in scores.items():
            assert re.search(rf"^\| {name} +\| {score:g} +\|$", text, re.M), text
        assert ("CoLA: adam is ahead" in text) == (scores["adam"] == max(scores.values()))
        assert search(raw, tmp_path, "--by", "last", *more).count("already there") >= 4
        last = json.loads((tmp_path / "chosen.json").read_text())["scores"]["CoLA"]
        for name in last:
            log = (tmp_path / "CoLA" / f"{name}-seed1" / "train.log").read_text()
            assert last[name] == float(re.findall(r'"valid_mcc": "([-\d.]+)"', log)[-1])
        assert_chosen_by_last(json.loads((tmp_path / "chosen.json").read_text()), rows=8)
        kept = {**record, "chosen": {"RTE": {"sam_rho": 1}}, "scores": {"RTE": {}}}
        (tmp_path / "chosen.json").write_text(json.dumps(kept))
        search(raw, tmp_path, *more)  # of another task: what was chosen before stays
        both = json.loads((tmp_path / "chosen.json").read_text())
        assert both["chosen"] == {**kept["chosen"], **record["chosen"]}
        assert both["scores"] == {"RTE": {}, "CoLA": scores}
        assert "another overrides" in search(raw, tmp_path, *more, "common.seed=1", code=1)

    @pytest.mark.parametrize(
        "options, expected",
        [
            (["--rho", "0"], "--rho 0: give numbers above 0"),
            (["--beta", "nan", "3"], "--beta nan 3"),
            (["--hold-out", "1"], "--hold-out 1"),
            (["--recipe", "bert_huge"], "--recipe bert_huge"),
        ],
    )
    def test_wrong_options(self, raw, tmp_path, options, expected):
        assert expected in search(raw, tmp_path, *options, code=2)

    def test_a_failed_run_ends_it_without_a_choice(self, raw, tmp_path):
        more = ["--rho", "0.5", "--", *SMALL, "optimizer.nonsense=1"]
        text = search(raw, tmp_path, *more, code=1)
        assert "python -m examples.glue.search: CoLA adam seed 1 failed" in text
        assert not (tmp_path / "chosen.json").exists()


def test_the_gpus_are_those_that_the_user_left_visible(monkeypatch):
    module, one = glue_stages, types.SimpleNamespace(jobs=None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-3a")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in module.device_environments(one, 2)] == [
        "2",
        "GPU-3a",
    ]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in module.device_environments(one, 2)] == ["0", "1"]
    assert module.device_environments(one, 0) == [{}]


def test_every_method_of_every_task_has_its_files():
    module = glue_stages
    methods = [*module.OPTIMIZERS, *module.FAMILY, *module.REGULARISERS]
    methods += [f"{r}+{o}" for r in module.REGULARISERS for o in module.OPTIMIZERS]
    methods += [f"{m}+{a}" for m in methods for a in module.AVERAGES]
    for task, method in itertools.product(TASKS, methods):
        for override in module.method_overrides(method, task):
            group, name = override[1:].split("=")
            assert (CONFIG / group / f"{name}.yaml").is_file(), (task, method)
    overrides = module.method_overrides
    assert overrides("r3f+delta_sam", "RTE") == ["+method=delta_sam", "+regulariser=r3f_RTE"]
    assert overrides("freelb", "CoLA") == ["+method=adam", "+regulariser=freelb_CoLA"]
    assert overrides("delta_sam+swa", "CoLA") == ["+method=delta_sam", "+averaging=swa"]
    with pytest.raises(ValueError, match="--methods swa.ema: at most one"):
        overrides("swa+ema", "CoLA")


class TestOwnTask:
    """Any folder with train.tsv and dev.tsv; three classes, 40 rows."""

    def args(self, folder, *more):
        for file in ("train", "dev"):
            rows = "".join(f"row {i}\tc{i % 3}\n" for i in range(40))
            (folder / "MINE").mkdir(exist_ok=True)
            (folder / "MINE" / f"{file}.tsv").write_text(f"sentence\tlabel\n{rows}")
        (folder / "model.pt").touch()
        (folder / "dict.txt").touch()
        words = ["--glue-dir", folder, "--tasks", "MINE", "--checkpoint", folder / "model.pt"]
        words += ["--backbone", "minilm", "--out", folder / "out", *more]
        args = glue_options.parser().parse_args(list(map(str, words)))
        return args, glue_options.check(args)

    def test_default_recipe_and_changes(self, tmp_path):
        """30 rows are 2 batches of 16, 20 updates in 10 epochs; warm-up is 6 % of them."""
        more = ["--task-columns", "sentence", "label", "--train-rows", 30, "--label-noise", "0.4"]
        args, wrong = self.args(tmp_path, *more, "--noise-seed", 7)
        assert wrong is None
        (encode,) = glue_stages.preparation(args)
        given = " ".join(encode.command)
        assert "--columns sentence label" in given and "--bpe gpt2" in given
        assert "--noise-seed 7 --train-rows 30 --label-noise 0.4" in given
        command = glue_stages.training(args, "MINE", "sam", [], 1, 0).command
        for word in (
            *("+recipe=minilm/default", "task.num_classes=3", "optimization.max_update=20"),
            *("lr_scheduler.total_num_update=20", "lr_scheduler.warmup_updates=1"),
        ):
            assert word in command

    def test_a_vocabulary_beside_the_dictionary_is_wordpiece(self, tmp_path):
        (tmp_path / "vocab.txt").touch()
        args, wrong = self.args(tmp_path, "--task-columns", "1", "2")
        assert wrong is None
        (encode,) = glue_stages.preparation(args)
        found = f"--bpe wordpiece --wordpiece-vocab {tmp_path / 'vocab.txt'}"
        assert found in " ".join(encode.command)

    @pytest.mark.parametrize(
        "more, expected",
        [
            ([], "--tasks MINE: not a task of GLUE; give its columns by --task-columns"),
        ],
    )
    def test_wrong_options(self, tmp_path, more, expected):
        assert expected in self.args(tmp_path, *more)[1]

    def test_a_share_of_all_labels(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            self.args(tmp_path, "--label-noise", "1")
        assert "--label-noise: must be above 0 and below 1, got 1" in capsys.readouterr().err
