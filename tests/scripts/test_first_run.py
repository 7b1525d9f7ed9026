"""The first run on a GPU: parts that fail, hang or are cut leave the others and their findings."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
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
    assert not state_of(text.split("before the hang ")[1].split()[0])


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--minutes 0.05", "--minutes 0.05: 4 parts need at least 0.67"),
        ("--device cuda", "finds no GPU; --device cpu --minutes 3 makes the dry run"),
        ("--out {}/file", "/file: cannot be written, File exists; give another folder"),
        ("--out {}/file/out", "/file/out: cannot be written, Not a directory; give another"),
        ("--work {}/file", "/file: cannot be written, File exists; give another folder"),
        ("--out {}/old", "/old: has the findings of an earlier run; move them"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_part_begins(
    tmp_path, words, said, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "old").mkdir()
    for name in ("file", "old/first_run.md"):
        (tmp_path / name).write_text("kept")
    argv = ["--device", "cpu", "--out", str(tmp_path / "out"), *words.format(tmp_path).split()]
    with pytest.raises(SystemExit) as refusal:
        first_run.main(argv)
    assert refusal.value.code == 2
    option, error = words.split()[0], capsys.readouterr().err.splitlines()[-1]
    assert f"error: {option} " in error and said in error
    assert not (tmp_path / "out" / "output.log").exists()
    assert (tmp_path / "old" / "first_run.md").read_text() == "kept"


def test_a_part_is_run_once(tmp_path, monkeypatch):
    begin = "import sys, time; open(sys.argv[3] + '/begun', 'a').write('1')"
    monkeypatch.setattr(
        first_run.FirstRun,
        "command",
        lambda *_: [sys.executable, "-c", begin, "", "", f"{tmp_path}"],
    )
    words = ["--device", "cpu", "--parts", "smoke", "smoke", "--out", str(tmp_path)]
    assert first_run.main(words) == 0
    assert (tmp_path / "begun").read_text() == "1"


def test_findings_that_cannot_be_written_do_not_stop_the_next(tmp_path, monkeypatch, capsys):
    """As on a disk that is full; what was found is printed."""

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(first_run, "atomic_write", full)
    (tmp_path / "output.log").symlink_to("/dev/full")
    with pytest.raises(FileNotFoundError):
        start(tmp_path, monkeypatch, {"smoke": FINDS, "tests": FINDS})
    said = capsys.readouterr().out
    for part in ("smoke", "tests"):
        assert f"# Part {part}: failed, [Errno 28] No space left on device" in said


HANGS = """
    import sys, time
    from scripts.gpu import __main__ as first_run

    def command(self, part, seconds):
        program = "import os, sys, time; open(sys.argv[1], 'w').write(f'## pid {os.getpid()}.'); "
        page = str(self.work / f"{part}.md")
        return [sys.executable, "-c", program + "time.sleep(100)", page]

    first_run.FirstRun.command = command
    first_run.signal.signal(first_run.signal.SIGTERM, first_run.signal.default_int_handler)
    sys.exit(first_run.main(sys.argv[1:]))
"""


def state_of(pid):
    """Return the state of a process, as ps has it; nothing after its end."""
    words = ["ps", "-o", "stat=", "-p", str(pid)]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip().replace("Z", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_part_ends_with_the_program_and_leaves_its_findings(tmp_path, number):
    words = ["--device", "cpu", "--parts", "smoke", "tests", "--out", str(tmp_path)]
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HANGS), *words],
        env={**os.environ, "PYTHONPATH": PATH},
    )
    page, deadline = tmp_path / "first_run.md", time.monotonic() + 60
    while "## pid" not in (page.read_text() if page.exists() else ""):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.1)
    driver.send_signal(number)
    code = driver.wait(30)
    pid = page.read_text().split("## pid ")[1].split(".")[0]
    while state_of(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not state_of(pid)
    interrupted = number == signal.SIGTERM
    assert code == (130 if interrupted else -number)
    assert f"# Part smoke: {'interrupted' if interrupted else 'running'}" in page.read_text()
    assert "# Part tests" not in page.read_text()


def shell(folder, **variables):
    """Run first_run.sh from a folder; return the process."""
    words = ["bash", f"{PATH}/scripts/gpu/first_run.sh", "--device", "cpu", "--minutes", "1"]
    env = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(
        [*words, "--parts", "trainings"], capture_output=True, text=True, env=env, cwd=folder
    )


def test_a_kit_that_is_missing_is_named(tmp_path):
    """And paths are of the folder in which the command is given."""
    done = shell(tmp_path, KIT="no_kit", OUT="out")
    assert done.returncode == 1, done.stdout + done.stderr
    text = (tmp_path / "out" / "first_run.md").read_text()
    assert "# Part trainings: failed with code 2" in text and text in done.stdout
    assert f"--kit {tmp_path}/no_kit: minilm/config.json and glue/RTE/train.tsv are missing" in text


def test_a_python_without_torch_is_named(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    done = shell(tmp_path, PYTHON=str(python))
    assert done.returncode == 2 and not (tmp_path / "first_run").exists()
    (error,) = done.stderr.splitlines()
    assert error.startswith(f"PYTHON={python}: ModuleNotFoundError: No module named")
    assert f"It needs torch, and fairseq or KIT/site.tgz (KIT={tmp_path}/.gpu)" in error


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
    heads = ("### Bounds", "### Stochastic rounding", "### RoBERTa small, cpu, bf16", "| phase")
    assert all(head in text for head in heads)
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
