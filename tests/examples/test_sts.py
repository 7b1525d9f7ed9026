"""examples.sts: what its stages run, what its report says, what it refuses."""

import json
import sys

import pytest
from fairseq.dataclass.configs import FairseqConfig
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import OmegaConf

from deltasam_fairseq.sts.datasets import SETS
from examples.sts import report, run
from tests.helpers import runs


@pytest.fixture
def files(tmp_path):
    for name in ("sts/STSBenchmark/sts-dev.csv", "model.pt", "dict.txt", "sentences.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")
    rows = "".join(f"g\tf\ty\t{i}\t2.{i}\ta\tb\n" for i in range(3))
    (tmp_path / "sts" / "STSBenchmark" / "sts-test.csv").write_text(rows)
    return tmp_path


def arguments(files, *more):
    words = ["--sts", files / "sts", "--train", files / "sentences.txt"]
    words += ["--checkpoint", files / "model.pt", "--out", files / "out", *more]
    args = run.parser().parse_args([str(word) for word in words])
    return args, run.check(args)


@pytest.mark.parametrize("recipe", run.RECIPES)
def test_rows_are_table_2s(files, recipe):
    """Criterion and optimizer of each row, with the recipe's numbers; fairseq takes the words."""
    args, wrong = arguments(files, "--recipe", recipe, "--seeds", "7", "--any-rows")
    assert wrong is None
    stages = run.run_stages(args, ["--lr", "3e-5"], files / "data")
    names = [stage.out.name for stage in stages if stage.title.startswith("train")]
    assert names == [f"{row}-seed7" for row in report.ROWS] and len(stages) == 8
    for row, stage in zip(report.ROWS, stages[::2]):
        cfg = runs.parse(stage.command[3:])
        assert cfg.criterion._name == ("nt_xent_r3f" if "r3f" in row else "nt_xent")
        assert cfg.optimization.lr == [3e-5] and cfg.common.seed == 7
        assert cfg.dataset.batch_size == 200 and cfg.task.pooling == args.pooling
        if "r3f" in row:
            assert cfg.criterion.eps == {"bert": 5e-2, "roberta": 1e-3}[recipe]
        if "delta_sam" in row:
            found = cfg.optimizer.sam_rho, cfg.optimizer.delta_sam_beta
            assert found == {"bert": (0.05, 3), "roberta": (0.01, 5)}[recipe]
        else:
            assert cfg.optimizer._name == "adam"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--checkpoint", "none.pt"], "--checkpoint none.pt: no such file"),
        (["--sts", "nowhere"], "--sts nowhere: has no folder STSBenchmark"),
        (["--sets", "STS12", "STS-B"], "--sets STS12: not in --sts"),
        (["--batch-size", "9", "--sentences", "8"], "--batch-size 9: more than --sentences 8"),
    ],
)
def test_refusals(files, more, message):
    if "none.pt" in more:
        more = [*more, "--dict", files / "dict.txt"]
    assert message in arguments(files, "--any-rows", *more)[1]


def test_sets_are_read_before_any_stage(files):
    """What is not as published is refused, or taken by every stage that reads it."""
    path = files / "sts" / "STSBenchmark" / "sts-test.csv"
    wrong = arguments(files)[1]
    assert f"{path}: 3 scored pairs, published are 1379" in wrong and "--any-rows" in wrong
    args, wrong = arguments(files, "--any-rows")
    assert wrong is None
    stages = [run.data_stage(args), *run.run_stages(args, [], files / "data")]
    reading = [stage for stage in stages if not stage.title.startswith("train")]
    assert len(reading) == 21 and all("--any-rows" in stage.command for stage in reading)
    path.write_text(path.read_text().replace("2.0", "x"))
    assert "line 1: the score 'x' is not a number" in arguments(files, "--any-rows")[1]
    path.unlink()
    assert f"{path}: no such file" in arguments(files, "--any-rows")[1]
    (files / "sts" / "SICK").mkdir()
    assert "SICK_test_annotated.txt: no such file" in arguments(files, "--sets", "SICK-R")[1]


def test_hydra_file_has_options_that_exist():
    """What fairseq-hydra-train asks of it; roberta is a model of fairseq's without dataclass."""
    whole = OmegaConf.structured(FairseqConfig)
    file = OmegaConf.load(run.ROOT / "examples" / "sts" / "config" / "mirror_bert.yaml")
    registries = {name: found["dataclass_registry"] for name, found in REGISTRIES.items()}
    registries["task"] = TASK_DATACLASS_REGISTRY
    for group in set(file) - {"model"}:
        name = file[group].pop("_name", None)
        fields = registries[group][name] if group in registries else whole[group]
        OmegaConf.merge(fields, file[group])
    assert file.optimizer.sam_rho == run.RECIPES["roberta"].rho
    assert file.checkpoint.best_checkpoint_metric == "spearman"


def write_run(folder, name, scores, seconds):
    (folder / "scores" / name).mkdir(parents=True)
    (folder / "runs" / name).mkdir(parents=True)
    (folder / "scores" / name / "sts.json").write_text(json.dumps({"spearman": scores}))
    lines = [
        {"epoch": 1, "valid_spearman": "80.5", "valid_num_updates": "10"},
        {"epoch": 1, "train_num_updates": "10", "train_ups": "1", "train_train_wall": seconds},
    ]
    log = "".join(f"| INFO | train | {json.dumps(line)}\n" for line in lines)
    (folder / "runs" / name / "train.log").write_text(log)


def test_report_by_hand(tmp_path, monkeypatch):
    for name, score, seconds in (
        ("base-seed1", 70, 10),
        ("base-seed2", 72, 10),
        ("r3f-seed1", 73, 25),
    ):
        write_run(tmp_path, name, {"STS-B": score, "SICK-R": score - 2}, seconds)
    words = [str(tmp_path), "--recipe", "bert", "--out", str(tmp_path / "report")]
    monkeypatch.setattr(sys, "argv", ["report", *words])
    report.main()
    text = (tmp_path / "report" / "report.md").read_text()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    mirror, r3f = rows[2:4]
    expected = ["Mirror", "2", "70.00 ± 1.41", "71.00 ± 1.41", "69.00 ± 1.41", "80.50 ± 0.00"]
    assert mirror == [*expected, "10", "1.00"]
    assert r3f == ["+ R3F", "1", "72.00", "73.00", "71.00", "80.50", "25", "2.50"]
    assert "Not measured: STS12, STS13, STS14, STS15, STS16." in text
    assert all(len(row) == 1 + len(SETS) for rows in report.PAPER.values() for row in rows.values())


def test_report_of_runs_within_half_a_second(tmp_path):
    """fairseq logs 0 seconds."""
    write_run(tmp_path, "base-seed1", {"STS-B": 70}, 0)
    text = report.report({"base": report.read_runs(tmp_path, "base")}, "bert")
    assert [cell.strip() for cell in text.splitlines()[2].split("|")[-3:-1]] == ["0", "-"]


def test_runs_on_different_sets_are_refused(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, "base-seed1", {"STS-B": 1.0}, 10)
    write_run(tmp_path, "base-seed2", {"SICK-R": 1.0}, 10)
    words = [str(tmp_path), "--recipe", "bert", "--out", str(tmp_path / "report")]
    monkeypatch.setattr(sys, "argv", ["report", *words])
    with pytest.raises(SystemExit):
        report.main()
    assert "runs were measured on different sets" in capsys.readouterr().err
