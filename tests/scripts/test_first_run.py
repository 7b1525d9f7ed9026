"""The first run on a GPU: parts that fail, hang or are cut leave the others and their findings."""

import json
import subprocess
import sys
import textwrap
import types

import pytest
import torch

from scripts.gpu import __main__ as first_run
from scripts.gpu import smoke
from scripts.gpu import tests as gpu_tests
from tests.helpers.processes import PATH, run_module


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


def test_smoke_is_well_on_a_cpu(tmp_path):
    argv = ["--device", "cpu", "--seconds", "10", "--kit", tmp_path]
    argv += ["--work", tmp_path / "work", "--out", tmp_path / "out"]
    result = run_module("scripts.gpu.smoke", argv, tmp_path)
    assert result.returncode == 0, result.stdout
    found = json.loads((tmp_path / "out" / "smoke.json").read_text())
    first = [(r["optimizer"], r["precision"]) for r in found["results"][:3]]
    assert first == [(name, "fp32") for name in ("adam", "sam_adam", "delta_sam_adam")]
    assert not any(r["faults"] for r in found["results"])
    assert "are well" in (tmp_path / "work" / "smoke.md").read_text()


def test_smoke_sees_weights_that_are_not_restored(monkeypatch):
    def update(trainer, samples):
        found = own(trainer, samples)
        weight = next(trainer.get_model().parameters()).data
        weight[-1, -1] = torch.nextafter(weight[-1, -1], weight.new_tensor(1.0))
        return found

    own = smoke.log_of_update
    monkeypatch.setattr(smoke, "log_of_update", update)
    assert smoke.faults("sam_adam", "fp32", "cpu") == ["weights changed at a learning rate of 0"]


def test_cuda_tests_are_recorded_one_by_one(tmp_path):
    argv = ["--device", "cpu", "--seconds", "100", "--kit", tmp_path]
    argv += ["--work", tmp_path / "work", "--out", tmp_path / "out"]
    result = run_module("scripts.gpu.tests", argv, tmp_path, cwd=PATH)
    assert result.returncode == 0, result.stdout
    found = json.loads((tmp_path / "out" / "tests.json").read_text())
    assert found["tests"] and not found["collection_errors"]
    assert {t["outcome"] for t in found["tests"].values()} <= {"skipped", "passed"}
    assert "| outcome" in (tmp_path / "work" / "tests.md").read_text()


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
