"""Start Python programs as forks of one process that has imported torch and fairseq.

Importing them takes 4 to 6 s and a core, longer than a small run. A server imports them once and
forks: a program begins there as ``python -m`` begins it, with its own environment, folder, output
and threads, and ends as any other.
"""

from __future__ import annotations

import array
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any, Dict, Optional, Sequence, Tuple, Union

PRELOAD = (
    *("fairseq.trainer", "fairseq.dataclass.initialize", "fairseq.model_parallel", "hydra"),
    "torch._dynamo",  # 2 to 5 s, else when the first optimizer is made
)
# Before the fork CUDA must not start. Where no device is visible, torch asks neither the driver
# nor NVML how many there are; and no thread of numpy's runs.
SERVER = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "OMP_NUM_THREADS": "1"}
# by -c, which looks for modules in the current folder: that of each program, as -m does
SERVE = f"import runpy; runpy.run_path({__file__!r})['main']()"
WORD = 8  # bytes of a number in a pipe
enabled = True  # False: every program imports for itself
_server: Optional[socket.socket] = None
_lock = threading.Lock()


class Fork:
    """A running program, with what `subprocess.Popen` has of the same names."""

    def __init__(self, status: int) -> None:
        """Wait until it has started; ``status`` is a pipe of its process and its exit code."""
        self._status = open(status, "rb", buffering=0)
        self.pid = int.from_bytes(self._status.read(WORD), "little")
        self.returncode: Optional[int] = None
        if not self.pid:
            raise RuntimeError(f'the server of processes has ended; see python -c "{SERVE}"')

    def wait(self, timeout: Optional[float] = None) -> int:
        """Return the exit code, negative after a signal.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            lost = (-signal.SIGKILL).to_bytes(WORD, "little", signed=True)  # with its parent
            code = self._status.read(WORD) or lost
            self.returncode = int.from_bytes(code, "little", signed=True)
            self._status.close()
        return self.returncode

    def terminate(self) -> None:
        """Ask it to end."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


def can_fork(command: Sequence[str], environment: Dict[str, str]) -> bool:
    """Whether a command is one for the server: a Python module that sees one GPU or none.

    fairseq takes the number of GPUs that it sees on import as the default of its world size.
    """
    import torch

    devices = environment.get("CUDA_VISIBLE_DEVICES")
    one = torch.cuda.device_count() < 2 if devices is None else "," not in devices
    return enabled and one and list(command[:2]) == [sys.executable, "-m"]


def start(
    command: Sequence[str], output: IO[Any], lock: int, environment: Dict[str, str]
) -> Union[Fork, subprocess.Popen]:
    """Start a command: as a fork of the server where that makes no difference, else afresh.

    Args:
        output: file of what it writes and of its errors.
        lock: file descriptor that it holds until its end.
        environment: its variables; PYTHONHASHSEED is that of the first command.
    """
    if not can_fork(command, environment):
        return subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, pass_fds=[lock]
        )
    request = {"argv": command[2:], "environment": environment, "folder": os.getcwd()}
    status, ours = os.pipe()
    with tempfile.TemporaryFile() as file, open(ours, "wb"):
        file.write(json.dumps(request).encode())
        file.seek(0)
        files = array.array("i", [file.fileno(), output.fileno(), lock, ours])
        with _lock:
            server = _running_server(environment)
            with contextlib.suppress(BrokenPipeError):  # Fork reports it
                server.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    return Fork(status)


def _running_server(environment: Dict[str, str]) -> socket.socket:
    """Return the socket of the server, which ends when this process does."""
    global _server
    if _server is None:
        _server, theirs = socket.socketpair()
        with theirs:
            subprocess.Popen(
                [sys.executable, "-c", SERVE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**environment, **SERVER},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
    return _server


def preload() -> None:
    """Import what the programs share; one that lacks it reports that itself."""
    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def serve(requests: socket.socket) -> Tuple[int, int]:
    """Fork for every request; in the fork, return the files of the request and of the output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the programs
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, ancillary, _, _ = requests.recvmsg(1, socket.CMSG_SPACE(4 * 4))
        if not message:
            sys.exit()
        files = array.array("i")
        files.frombytes(ancillary[0][2])
        request, output, lock, status = files
        if not os.fork():
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pid = os.fork()
            if not pid:
                os.close(status)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return request, output
            os.close(lock)  # the program alone holds it
            os.write(status, pid.to_bytes(WORD, "little"))
            _, ended = os.waitpid(pid, 0)
            code = -os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else os.WEXITSTATUS(ended)
            with contextlib.suppress(BrokenPipeError):
                os.write(status, code.to_bytes(WORD, "little", signed=True))
            os._exit(0)
        for file in files:
            os.close(file)


def become(request: int, output: int) -> None:
    """Run the program of a request in this process."""
    with open(request, encoding="utf-8") as file:
        wanted = json.load(file)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        # of torch 1.13 and 2.0: the number that the server saw
        getattr(torch.cuda.device_count, "cache_clear", lambda: None)()
    module, *sys.argv[1:] = wanted["argv"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Serve the socket whose file descriptor is the argument; without one, only import."""
    preload()
    if sys.argv[1:]:
        become(*serve(socket.socket(fileno=int(sys.argv[1]))))
