"""End fairseq's threads that read data ahead before Python takes down what they use.

``--data-buffer-size`` above 0, fairseq's default, collates batches in a daemon thread. Python ends
such a thread when it next asks for the interpreter's lock; inside an operation of torch that is an
exception which no C++ code lets pass: "terminate called without an active exception", and a run
that has done all its work exits with the code of an abort.
"""

import atexit
import contextlib
import queue
import threading
import time
import weakref
from typing import Any, Callable, Iterable, Iterator

from fairseq.data.iterators import BackgroundConsumer

from deltasam_fairseq.fairseq_patches.patching import patch

LONGEST_WAIT = 5.0  # seconds, for a batch that is being collated

_ending = threading.Event()
_threads: "weakref.WeakSet[Any]" = weakref.WeakSet()


def _until_the_end(source: Iterable[Any]) -> Iterator[Any]:
    for item in source:
        if _ending.is_set():
            return
        yield item


def _run_until_the_end(run: Callable[[Any], None], thread: Any) -> None:
    _threads.add(thread)
    thread._source = _until_the_end(thread._source)
    run(thread)


def end_all() -> None:
    """Let every thread finish its batch, and wait for it."""
    _ending.set()
    deadline = time.monotonic() + LONGEST_WAIT
    for thread in list(_threads):
        while thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):  # it may wait for room in the queue
                thread._queue.get(timeout=0.01)


def install() -> None:
    """Let the threads end with the program; again, it changes nothing."""
    patch(BackgroundConsumer, "run", _run_until_the_end)
    atexit.unregister(end_all)
    atexit.register(end_all)
