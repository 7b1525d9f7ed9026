"""examples.common.warm: a fork of the server is what ``python -m`` is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.common import runner, warm
from examples.common.runner import StageError
from examples.common.stage import Stage, module

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Write a module into the folder that programs are started in; return a stage that runs it."""
    monkeypatch.chdir(tmp_path)

    def stage(text, *words):
        (tmp_path / "program.py").write_text(text)
        command = module("program", *words)
        return Stage("stage", command, tmp_path / "out" / "run")

    return stage


def log_of(stage):
    return (stage.out / runner.LOG).read_text()


def test_environment_arguments_folder_threads_and_hashes(program, tmp_path):
    """As python -m has them; torch is imported, fairseq's plugin and CUDA are not begun."""
    stage = program(
        "import sys\n"
        "print('torch' in sys.modules, 'deltasam_fairseq' in sys.modules)\n"
        "import os, torch\n"
        "print(__name__, sys.argv, os.path.abspath(sys.path[0]), os.getcwd())\n"
        "print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'], os.environ['PLACE'])\n"
        "print(os.environ.get('CUDA_VISIBLE_DEVICES'), torch.cuda.is_initialized())\n"
        "print(sys.flags.hash_randomization, file=sys.stderr)\n",
        *("{out}", "é 1"),
    )
    runner.run(stage, "1/1", 2, {"PLACE": "here", "CUDA_VISIBLE_DEVICES": "3"})
    argv = [str(tmp_path / "program.py"), f"{stage.out}.partial", "é 1"]
    # Errors are written as they come, output at the end, as both are in a file.
    assert sorted(log_of(stage).splitlines()) == sorted(
        [
            "True False",
            f"__main__ {argv} {tmp_path} {tmp_path}",
            "2 2 here",
            "3 False",
            "0",
        ]
    )


def test_one_state_does_not_pass_to_the_next(program):
    stage = program("import fairseq\nassert not hasattr(fairseq, 'mark')\nfairseq.mark = 1\n")
    for name in ("a", "b"):
        runner.run(stage._replace(out=stage.out.with_name(name)), "1/1", 1)


@pytest.mark.parametrize(
    "text, code, said",
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('why')", 1, "why"),
        ("raise ValueError('why')", 1, "ValueError: why"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("import os; os._exit(200)", 200, ""),
    ],
)
def test_exit_codes(program, text, code, said):
    with pytest.raises(StageError, match=f"failed with code {code}\n") as error:
        runner.run(program(text), "1/1", 1)
    assert said in str(error.value)


def test_what_is_registered_for_the_end_is_called_and_all_output_is_there(program):
    stage = program(
        "import atexit, os\n"
        "atexit.register(print, 'at the end')\n"
        "os.write(1, b'direct\\n')\n"
        "print('word ' * 100000)\n"
    )
    runner.run(stage, "1/1", 1)
    assert log_of(stage) == "direct\n" + "word " * 100000 + "\nat the end\n"


WAITS = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
RUNS = """
import signal, sys
from pathlib import Path
from examples.common import runner
from examples.common.stage import Stage, module
signal.signal(signal.SIGTERM, signal.default_int_handler)
stage = Stage("stage", module("program"), Path("out/run"))
sys.exit(runner.exit_code(lambda: runner.run_side_by_side([[stage]], 1, [{}]), "program"))
"""


def is_there(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def waits_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_runner_that_is_ended_ends_the_program_or_leaves_it_the_lock(program, tmp_path, number):
    """Asked to end, it ends the program too; killed, the program goes on and keeps the lock."""
    stage = program(WAITS)
    (tmp_path / "runs.py").write_text(RUNS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "runs"],
        env=environment,
        cwd=tmp_path,
        # A shell that starts the tests in its background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "out" / "run.partial" / runner.LOG
    waits_for(lambda: log.is_file() and log.read_text())
    pid = int(log.read_text())
    process.send_signal(number)
    code = process.wait(30)
    try:
        if number == signal.SIGKILL:
            assert is_there(pid)
            with pytest.raises(StageError, match="being made by another process"):
                runner.run(stage, "1/1", 1)
            os.kill(pid, signal.SIGKILL)
            waits_for(lambda: not is_there(pid))
            with runner.locked(stage):
                pass
        else:
            assert code == 130 and not is_there(pid)
    finally:
        if is_there(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_program_that_several_gpus_are_visible_to_is_started_afresh(monkeypatch):
    """fairseq has taken their number for its default when the server imported it."""
    import torch

    command = module("program")
    assert warm.can_fork(command, {"CUDA_VISIBLE_DEVICES": "1"})
    assert not warm.can_fork(command, {"CUDA_VISIBLE_DEVICES": "0,1"})
    for devices in (0, 1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        assert warm.can_fork(command, {}) == (devices < 2)
    assert not warm.can_fork(["/bin/true"], {})


def test_the_server_asks_nobody_for_gpus():
    """Either the driver or NVML, asked before the fork, may not answer after it."""
    text = """
import torch
asked = []
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    setattr(torch._C, name, lambda name=name: asked.append(name) or 0)
for name in ("_raw_device_count_nvml", "_raw_device_uuid_nvml", "_lazy_init"):
    setattr(torch.cuda, name, lambda name=name: asked.append(name) or 0)
torch.cuda._is_compiled = lambda: True
from examples.common import warm
warm.preload()
assert not asked, asked
torch.cuda.device_count(), torch.cuda.is_available()
assert not asked, asked
"""
    environment = {**os.environ, **warm.SERVER, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", text], check=True, env=environment)
