"""The first run on a GPU: parts that fail, hang or are cut leave the others and their findings."""

import json
import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch

from scripts.gpu import __main__ as first_run
from scripts.gpu import smoke
from scripts.gpu import tests as gpu_tests
from tests.helpers.kit import write_kit
from tests.helpers.processes import PATH


def start(tmp_path, monkeypatch, scripts, minutes="0.5", capsys=None):
    """Run the driver with small programs in place of the parts; return code and findings."""

    def command(self, part, seconds):
        words = [str(seconds), str(self.work / f"{part}.md"), str(tmp_path)]
        return [sys.executable, "-c", textwrap.dedent(scripts[part]), *words]

    monkeypatch.setattr(first_run.FirstRun, "command", command)
    argv = ["--device", "cpu", "--minutes", minutes, "--parts", *scripts, "--out", str(tmp_path)]
    code = first_run.main(argv)
    return code, (tmp_path / "first_run.md").read_text()


FINDS = "import sys; open(sys.argv[2], 'w').write('## found it')"


def test_a_part_that_fails_does_not_stop_the_next(tmp_path, monkeypatch):
    scripts = {"smoke": "print('last words'); raise SystemExit(3)", "tests": FINDS}
    code, text = start(tmp_path, monkeypatch, scripts)
    assert code == 1
    assert "# Part smoke: failed with code 3" in text and "last words" in text
    assert "# Part tests: done" in text and "## found it" in text


def test_a_part_that_hangs_is_cut_and_leaves_its_findings_and_no_process(tmp_path, monkeypatch):
    hangs = """
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        open(sys.argv[2], "w").write(f"## before the hang {child.pid}")
        time.sleep(100)
    """
    monkeypatch.setattr(first_run, "GRACE", 0.5)
    scripts = {"smoke": hangs, "tests": FINDS}
    code, text = start(tmp_path, monkeypatch, scripts, minutes="0.1")
    assert code == 1
    assert "# Part smoke: cut at its time limit" in text and "# Part tests: done" in text
    child = text.split("before the hang ")[1].split()[0]
    state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True)
    assert state.stdout.strip() in ("", "Z")


def test_findings_are_there_while_a_part_runs(tmp_path, monkeypatch):
    looks = """
        import pathlib, sys, time
        open(sys.argv[2], "w").write("## early")
        page = pathlib.Path(sys.argv[3]) / "first_run.md"
        while "## early" not in page.read_text():
            time.sleep(0.1)
    """
    code, text = start(tmp_path, monkeypatch, {"smoke": looks})
    assert code == 0 and "# Part smoke: done" in text


def test_what_a_part_leaves_of_its_time_is_shared_by_those_behind_it(tmp_path, monkeypatch):
    says = "import sys; open(sys.argv[2], 'w').write('seconds=' + sys.argv[1])"
    scripts = dict.fromkeys(("smoke", "tests", "costs"), says)
    _, text = start(tmp_path, monkeypatch, scripts, minutes="5.5")  # 330 s: shares as they are
    given = [float(part.split()[0]) for part in text.split("seconds=")[1:]]
    assert given[0] == pytest.approx(60 - first_run.GRACE, abs=3)
    assert given[1] == pytest.approx(330 * 120 / 270 - first_run.GRACE, abs=3)
    assert given[2] == pytest.approx(330 - first_run.GRACE, abs=3)


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--parts", "all"], ["--device", "tpu"]])
def test_wrong_options_are_refused(tmp_path, words, capsys):
    with pytest.raises(SystemExit):
        first_run.main(["--out", str(tmp_path), *words])
    assert words[0] in capsys.readouterr().err


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """All parts on the smallest shapes: what the program printed, and the folder of its findings.

    Nothing is compiled, which alone takes long on a CPU.
    """
    folder = tmp_path_factory.mktemp("dry_run")
    kit = write_kit(folder / "kit")
    out = {"OUT": str(folder / "out"), "KIT": str(kit), "PYTHON": sys.executable}
    env = {**os.environ, **out, "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    words = ["bash", f"{PATH}/scripts/gpu/first_run.sh", "--device", "cpu", "--minutes", "6"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder / "out"


def test_dry_run(dry_run):
    said, out = dry_run
    names = sorted(path.name for path in out.iterdir())
    parts = list(first_run.PARTS)
    assert names == sorted(["first_run.md", "output.log", *(f"{part}.json" for part in parts)])
    text = (out / "first_run.md").read_text()
    for part in parts:
        assert f"# Part {part}: done" in text and f"{part}: done" in said


def test_dry_run_of_smoke(dry_run):
    found = json.loads((dry_run[1] / "smoke.json").read_text())
    first = [(r["optimizer"], r["precision"]) for r in found["results"][:3]]
    assert first == [(name, "fp32") for name in ("adam", "sam_adam", "delta_sam_adam")]
    assert not any(r["faults"] for r in found["results"])


def test_dry_run_of_the_tests(dry_run):
    """Without a GPU all are skipped; each is recorded."""
    found = json.loads((dry_run[1] / "tests.json").read_text())
    assert found["tests"] and not found["collection_errors"]
    assert {t["outcome"] for t in found["tests"].values()} <= {"skipped", "passed"}


def test_dry_run_of_the_costs(dry_run):
    """All methods, both precisions, the rounding; both files say the same."""
    record = json.loads((dry_run[1] / "costs.json").read_text())
    text = (dry_run[1] / "first_run.md").read_text()
    parts = record["parts"]
    assert not any(part["why"] for part in parts.values())
    full, rounding, half = (part["measured"] for part in parts.values())
    assert {"Adam", "SAM", "delta-SAM", "SAM, torch loop"} <= set(full["rows"])
    assert set(half["rows"]) == {"Adam", "SAM", "delta-SAM"} == set(half["base_steps"])
    assert "SAM, davda54" in full["unavailable"] and "SAM, davda54 (--davda54" in text
    assert [row["ratio"] for row in full["bars"]] == ["SAM / Adam", "delta-SAM / SAM"]
    assert [row["bar"] for row in full["bars"]] == [2.05, 1.17]
    assert [row["bar"] for row in half["bars"]] == [2.05, pytest.approx(8 / 6)]
    (row,) = rounding["rows"]
    assert row["weights"] > 5e6 and row["differ"] == 0 and 0.001 < row["moved"] < 1
    assert set(row["seconds"]) == {"operations", "compiled"}
    assert "## Costs of an update" in text
    for part in ("### Bars", "### Stochastic rounding", "### RoBERTa small, cpu, bf16", "| phase"):
        assert part in text
    for name in ("Adam", "SAM", "delta-SAM"):
        assert f"| {name} " in text and full["memory"][name] > 0


def test_dry_run_of_the_trainings(dry_run):
    record = json.loads((dry_run[1] / "trainings.json").read_text())
    assert [(run["method"], run["state"]) for run in record["runs"]] == [
        ("adam", "complete"),
        ("delta_sam", "complete"),
    ]
    for run in record["runs"]:
        (epoch,) = run["epochs"]
        assert epoch["train_num_updates"] == 2 and epoch["valid_accuracy"] == run["last"]
        assert run["seconds"] > 0
    text = (dry_run[1] / "first_run.md").read_text()
    assert "2 runs of MiniLM complete" in text and "| delta_sam " in text


def test_smoke_sees_weights_that_are_not_restored(monkeypatch):
    def update(trainer, samples):
        found = own(trainer, samples)
        weight = next(trainer.get_model().parameters()).data
        weight[-1, -1] = torch.nextafter(weight[-1, -1], weight.new_tensor(1.0))
        return found

    own = smoke.log_of_update
    monkeypatch.setattr(smoke, "log_of_update", update)
    assert smoke.faults("sam_adam", "fp32", "cpu") == ["weights changed at a learning rate of 0"]


def test_figures_that_a_test_prints_are_kept(tmp_path):
    """Without what fairseq logs to the same stream."""
    record = gpu_tests.Record(tmp_path / "tests.json", tmp_path / "tests.md")
    record.pytest_runtest_logstart("a test")
    printed = "2026 | INFO | fairseq.trainer | begin\n\nadam 3, sam_adam 4\n"
    report = types.SimpleNamespace(
        nodeid="a test", duration=0.1, when="call", outcome="passed", capstdout=printed
    )
    record.pytest_runtest_logreport(report)
    found = json.loads((tmp_path / "tests.json").read_text())["tests"]["a test"]
    assert found["printed"] == ["adam 3, sam_adam 4"]
    assert "adam 3, sam_adam 4" in (tmp_path / "tests.md").read_text()
