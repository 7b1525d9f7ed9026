"""A program ends orderly although a thread of fairseq's reads data ahead."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, threading, torch
from fairseq.data.iterators import BufferedIterator
@atexit.register  # the last that is called
def say():
    print("alive", sum(t.name == "reads ahead" for t in threading.enumerate()))
{plugin}
class Batches:
    def __len__(self):
        return 10**6
    def __iter__(self):
        rows = [torch.ones(50) for _ in range(200)]
        while True:
            yield torch.stack(rows).sum(0)
data = BufferedIterator({size}, Batches())
next(data)
data._consumer.name = "reads ahead"
"""


def run(plugin, size):
    words = [sys.executable, "-c", PROGRAM.format(plugin=plugin, size=size)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("size", [1, 10**5], ids=["waits for room", "collates"])
def test_the_thread_ends_first(size):
    found = run("import deltasam_fairseq", size)
    assert found.stdout.split()[-2:] == ["alive", "0"], found.stderr
    assert found.returncode == 0, found.stderr


def test_fairseq_alone_leaves_it():
    """Which aborts some of the times, "terminate called without an active exception"."""
    assert run("", 1).stdout.split()[-2:] == ["alive", "1"]
