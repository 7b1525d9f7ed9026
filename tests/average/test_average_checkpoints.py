"""python -m deltasam_fairseq.average: the mean of the checkpoints that were asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils

from deltasam_fairseq.average.__main__ import main
from deltasam_fairseq.average.mean import average
from deltasam_fairseq.options import UsageError
from deltasam_fairseq.trainer.checkpoint_state import CRITERION, RADIUS, WEIGHT_AVERAGE
from tests.helpers import runs, tiny

COMMAND = [sys.executable, "-m", "deltasam_fairseq.average"]


@pytest.fixture(scope="module")
def folder(classification, tmp_path_factory):
    """3 epochs of 4 updates, saved after epochs and every 2 updates; a metric that is no trend."""
    path = tmp_path_factory.mktemp("run")
    argv = tiny.arguments(classification, path, "--max-epoch", "3", "--max-update", "0")
    argv += ["--save-interval-updates", "2", "--lr", "3e-2", "--keep-best-checkpoints", "2"]
    tiny.train(argv)
    return path


def model(path):
    return torch.load(path, weights_only=False, map_location="cpu")["model"]


def assert_mean(path, folder, names):
    states = [model(folder / f"checkpoint{name}.pt") for name in names]
    for key, value in model(path).items():
        mean = sum(state[key].double() for state in states) / len(states)
        torch.testing.assert_close(value, mean.float())


def call(capsys, *argv, code=0):
    if code:
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in argv])
        assert end.value.code == code
        return capsys.readouterr().err
    assert main([str(a) for a in argv]) == 0
    return ""


@pytest.mark.parametrize(
    "options, names",
    [
        (["--last-epochs", "2"], ["2", "3"]),
        (["--last-epochs", "1"], ["3"]),
        (["--last-epochs", "2", "--up-to", "2"], ["1", "2"]),
        (["--last-updates", "2"], ["_2_6", "_3_10"]),
        (["--last-updates", "1", "--up-to", "9"], ["_2_6"]),
    ],
)
def test_the_last(folder, tmp_path, capsys, options, names):
    call(capsys, folder, *options, "--output", tmp_path / "out.pt")
    assert_mean(tmp_path / "out.pt", folder, names)


def test_files(folder, tmp_path, capsys):
    files = [folder / "checkpoint1.pt", folder / "checkpoint_2_6.pt", folder / "checkpoint3.pt"]
    call(capsys, *files, "--output", tmp_path / "out.pt")
    assert_mean(tmp_path / "out.pt", folder, ["1", "_2_6", "3"])


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("more_is_better", [False, True])
def test_the_best(folder, tmp_path, capsys, n, more_is_better):
    """By the metric in the files, the best of --keep-best-checkpoints not counted twice."""
    copies = tmp_path / "copies"
    copies.mkdir()
    scores = {}
    for path in folder.glob("checkpoint*.pt"):
        state = torch.load(path, weights_only=False, map_location="cpu")
        state["cfg"]["checkpoint"]["maximize_best_checkpoint_metric"] = more_is_better
        torch.save(state, copies / path.name)
        if path.stem in ("checkpoint1", "checkpoint2", "checkpoint3") or "_" in path.stem:
            if "best" not in path.stem and "last" not in path.stem:
                scores[path.stem[10:]] = state["extra_state"]["val_loss"]
    assert len(scores) == 6 and len(set(scores.values())) == 6
    names = sorted(scores, key=scores.get, reverse=more_is_better)[:n]
    call(capsys, copies, "--best", n, "--output", tmp_path / "out.pt")
    assert_mean(tmp_path / "out.pt", folder, names)


def scored(folder, metrics):
    """Files checkpoint1.pt and on, with weights 1, 2, 3 and these validation metrics."""
    folder.mkdir()
    for i, metric in enumerate(metrics, 1):
        state = {
            "model": {"w": torch.tensor([float(i)])},
            "extra_state": {"val_loss": metric},
            "cfg": {"checkpoint": {"maximize_best_checkpoint_metric": False}},
            "optimizer_history": [{"num_updates": i}],
        }
        torch.save(state, folder / f"checkpoint{i}.pt")


def test_the_log_has_the_metric_as_it_is(tmp_path, capsys, caplog):
    scored(tmp_path / "run", [-3.25, 7.5])
    caplog.set_level("INFO")
    call(capsys, tmp_path / "run", "--best", 2, "--output", tmp_path / "out.pt")
    assert "metric -3.25 after" in caplog.text and "metric 7.5 after" in caplog.text


@pytest.mark.parametrize("absent", [float("nan"), None])
def test_the_best_of_those_with_a_metric(tmp_path, capsys, caplog, absent):
    """Of 2, -, 1, 3, - the best two are the first and the third: (1 + 3) / 2 = 2."""
    caplog.set_level("INFO")
    scored(tmp_path / "run", [2.0, absent, 1.0, 3.0, absent])
    call(capsys, tmp_path / "run", "--best", "2", "--output", tmp_path / "out.pt")
    assert model(tmp_path / "out.pt")["w"].tolist() == [2]
    skipped = [m for m in caplog.messages if "skipped" in m]
    assert len(skipped) == 2 and "checkpoint2.pt" in skipped[0]
    options = ["--best", "4", "--output", tmp_path / "out.pt"]
    assert "--best 4" in call(capsys, tmp_path / "run", *options, code=2)


def test_no_metric_at_all(tmp_path, capsys):
    scored(tmp_path / "run", [None, float("nan")])
    options = ["--best", "1", "--output", tmp_path / "out.pt"]
    message = call(capsys, tmp_path / "run", *options, code=2)
    assert "no checkpoint" in message and "--last-epochs" in message


def test_the_mean_of_one_is_a_copy_and_an_ordinary_checkpoint(folder, tmp_path, capsys):
    out = tmp_path / "out.pt"
    call(capsys, folder / "checkpoint2.pt", "--output", out)
    runs.assert_same(dict(model(out)), dict(model(folder / "checkpoint2.pt")))
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(out)])
    assert torch.equal(
        models[0].encoder.lm_head.weight, models[0].encoder.sentence_encoder.embed_tokens.weight
    )
    assert "last_optimizer_state" not in torch.load(out, weights_only=False)


def test_a_run_starts_from_it(classification, folder, tmp_path, capsys):
    out = tmp_path / "out.pt"
    call(capsys, folder, "--last-epochs", "3", "--output", out)
    start = ["--finetune-from-model", str(out), "--lr", "0", "--max-update", "1"]
    run = runs.train(classification, tmp_path / "tuned", *start)
    runs.assert_same(*map(tiny.without_fused, (run.checkpoint["model"], model(out))))


def save(path, **tensors):
    torch.save({"model": tensors, "extra_state": {}}, path)
    return str(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_by_hand(tmp_path, dtype):
    """(1 + 2 + 6) / 3 = 3, in the precision of the files; counters are those of the last."""
    paths = [
        save(tmp_path / f"{i}.pt", w=torch.tensor([v, 2048.0], dtype=dtype), n=torch.tensor(i))
        for i, v in enumerate((1.0, 2.0, 6.0))
    ]
    found = average(paths)["model"]
    assert found["w"].dtype == dtype and found["w"].tolist() == [3, 2048]
    assert found["n"].item() == 2


def test_sums_in_float32_where_half_precision_would_stall(tmp_path):
    """2048 + 1 is 2048 in fp16; the mean of 2048, 2050, 2052, 2054 is 2051, to even 2052."""
    values = (2048.0, 2050.0, 2052.0, 2054.0)
    paths = [save(tmp_path / f"{v}.pt", w=torch.tensor([v], dtype=torch.float16)) for v in values]
    assert average(paths)["model"]["w"].item() == torch.tensor(2051.0).half().item()


def test_shared_weights_are_one_in_the_file(tmp_path):
    paths = []
    for v in (1.0, 3.0):
        w = torch.full((1000,), v)
        paths.append(save(tmp_path / f"{v}.pt", w=w, tied=w, view=w[:500]))
    found = average(paths)["model"]
    assert found["w"].data_ptr() == found["tied"].data_ptr()
    assert all((t == 2).all() for t in found.values()) and found["view"].shape == (500,)


@pytest.mark.parametrize("tied_first", [True, False])
def test_tied_with_untied_is_refused(tmp_path, tied_first):
    """The mean of either kind would lose weights in a model of the other."""
    w = torch.ones(3)
    tied = save(tmp_path / "tied.pt", embed=w, head=w)
    untied = save(tmp_path / "untied.pt", embed=w, head=2 * w)
    first, second = (tied, untied) if tied_first else (untied, tied)
    with pytest.raises(UsageError, match="another model than the first, different in head") as e:
        average([first, second])
    assert second in str(e.value)


@pytest.mark.parametrize("shared_first", [True, False])
def test_a_file_with_a_copy_per_name_is_of_the_same_model(tmp_path, shared_first):
    """As fairseq writes shared weights from a GPU."""
    w = torch.ones(3)
    shared = save(tmp_path / "shared.pt", embed=w, head=w)
    copied = save(tmp_path / "copied.pt", embed=3 * w, head=3 * w)
    found = average([shared, copied] if shared_first else [copied, shared])["model"]
    assert found["embed"].tolist() == found["head"].tolist() == [2, 2, 2]


def test_output_that_is_a_folder(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    message = call(capsys, folder, "--last-epochs", "1", "--output", tmp_path / "out", code=2)
    assert f"--output {tmp_path / 'out'}: is a folder" in message
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_a_run_with_averages(classification, tmp_path, capsys):
    """Means of the averages in the files, or with --raw of the weights themselves."""
    swa = ["--lr-scheduler", "swa_fixed", "--swa-start", "1", "--save-interval-updates", "2"]
    runs.train(classification, tmp_path / "swa", *swa)
    files = [tmp_path / "swa" / f"checkpoint_{n}.pt" for n in ("1_2", "2_6")]
    states = [torch.load(f, weights_only=False) for f in files]
    call(capsys, *files, "--output", tmp_path / "out.pt")
    call(capsys, *files, "--raw", "--output", tmp_path / "raw.pt")
    name = "encoder.sentence_encoder.embed_tokens.weight"
    for out, values in (
        ("out.pt", [s["model"][name] for s in states]),
        ("raw.pt", [s["extra_state"][WEIGHT_AVERAGE]["raw"][f"model.{name}"] for s in states]),
    ):
        found = torch.load(tmp_path / out, weights_only=False)
        torch.testing.assert_close(found["model"][name], sum(values) / 2)
        assert torch.equal(found["model"][name], found["model"]["encoder.lm_head.weight"])
        assert WEIGHT_AVERAGE not in found["extra_state"]


@pytest.mark.parametrize("precision", [[], ["--fp16", "--fp16-no-flatten-grads"], ["--bf16"]])
def test_raw_of_a_file_from_before_the_start(classification, tmp_path, capsys, precision):
    """The embeddings are shared; before the start their float32 masters are saved as the model."""
    swa = ["--lr-scheduler", "swa_fixed", "--swa-start", "4", "--save-interval-updates", "2"]
    runs.train(classification, tmp_path / "swa", *swa, *precision)
    files = [tmp_path / "swa" / f"checkpoint_{n}.pt" for n in ("1_2", "2_6")]
    states = [torch.load(f, weights_only=False) for f in files]
    assert [s["extra_state"][WEIGHT_AVERAGE]["n"] for s in states] == [0, 3]
    call(capsys, *files, "--raw", "--output", tmp_path / "raw.pt")
    found = model(tmp_path / "raw.pt")
    raw = [s["extra_state"][WEIGHT_AVERAGE]["raw"] for s in states]
    for name, value in raw[0].items():
        key = name.split(".", 1)[1]
        assert torch.equal(states[0]["model"][key], value)
        torch.testing.assert_close(found[key], (value + raw[1][name]) / 2)
    name = "encoder.sentence_encoder.embed_tokens.weight"
    assert torch.equal(found[name], found["encoder.lm_head.weight"])


# options; what the message must name
ERRORS = {
    "a folder alone": (["{run}"], ["--last-epochs N"]),
    "no such file": (["/no/such.pt"], ["/no/such.pt", "not a file"]),
    "too few": (["{run}", "--last-epochs", "9"], ["--last-epochs 9", "has 3"]),
    "none": (["{run}", "--best", "0"], ["--best 0", "at least 1"]),
    "two folders": (["{run}", "{run}", "--best", "1"], ["--best 1", "one folder"]),
    "best up to": (["{run}", "--best", "1", "--up-to", "3"], ["--up-to 3", "--best"]),
    "files up to": (["{run}/checkpoint1.pt", "--up-to", "3"], ["--up-to 3", "--last-epochs"]),
    "raw of a run without": (["{run}/checkpoint1.pt", "--raw"], ["--raw", "omit --raw"]),
    "no checkpoint": (["{file}"], ["{file}", "checkpoint"]),
    "another model": (["{run}/checkpoint1.pt", "{other}"], ["{other}", "another model", "w"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_options(folder, tmp_path, capsys, name):
    options, expected = ERRORS[name]
    (tmp_path / "file.pt").write_text("no checkpoint")
    save(tmp_path / "other.pt", w=torch.ones(1))
    known = {"run": folder, "file": tmp_path / "file.pt", "other": tmp_path / "other.pt"}
    argv = [option.format(**known) for option in options]
    message = call(capsys, *argv, "--output", tmp_path / "out.pt", code=2)
    assert all(part.format(**known) in message for part in expected), message
    assert not (tmp_path / "out.pt").exists()


def test_as_a_program(folder, tmp_path):
    out = tmp_path / "out.pt"
    command = [*COMMAND, str(folder), "--last-epochs", "2", "--output", str(out)]
    root = Path(__file__).parents[2]
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout
    assert "average of 2 checkpoints" in result.stdout and out.is_file()


@pytest.mark.parametrize(
    "key, options, criterion",
    [
        ("ema", ["--store-ema", "--ema-decay", "0.5"], "sentence_prediction"),
        (CRITERION, ["--smart-momentum", "0.5"], "smart"),
        (RADIUS, ["--optimizer", "sam_adam", "--sam-radius", "trust_region_theta"], "plain"),
    ],
)
def test_averages_of_the_last_file_are_dropped(
    classification, tmp_path, caplog, key, options, criterion
):
    """They are of one file's weights, and would be taken for those of the mean."""
    run = runs.train(
        classification, tmp_path / "run", *options, "--max-update", "4", criterion=criterion
    )
    last = run.save_dir / "checkpoint_last.pt"
    assert runs.load(last)["extra_state"][key]
    with caplog.at_level("INFO"):
        mean = average([str(last), str(last)])
    assert key not in mean["extra_state"]
    assert any(f"{key} of --" in m and "is dropped" in m for m in caplog.messages)


@pytest.mark.parametrize(
    "key, options, criterion",
    [
        ("ema", ("--store-ema", "--ema-decay", "0.5"), "sentence_prediction"),
        (CRITERION, ("--smart-momentum", "0.5"), "smart"),
    ],
)
def test_averages_start_at_the_mean(classification, tmp_path, key, options, criterion):
    """In a run that goes on from it; not at those of the last file."""
    more = (*options, "--lr", "3e-2", "--max-update", "4")
    run = runs.train(classification, tmp_path / "run", *more, criterion=criterion)
    last = str(run.save_dir / "checkpoint_last.pt")
    mean = average([last, last])
    torch.save(mean, tmp_path / "mean.pt")
    start = ("--restore-file", str(tmp_path / "mean.pt"), "--reset-dataloader")
    more = (*more, *start, "--max-update", "5", "--lr", "0")
    on = runs.train(classification, tmp_path / "on", *more, criterion=criterion)
    found = on.checkpoint["extra_state"][key]
    for name, value in found.get("averages", found).items():
        if not name.endswith(".version"):
            torch.testing.assert_close(value, mean["model"][name])
