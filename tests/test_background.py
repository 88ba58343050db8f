"""Background work and counters: bounded, counted, alive after a fork."""

from __future__ import annotations

import copy
import os
import threading

from engram._background import Background
from engram._counters import Counters
from engram.errors import RowIntegrityError, SpecMismatchError


def test_work_runs_and_its_queue_is_bounded():
    go, ran = threading.Event(), []
    background = Background("test", 5)
    assert background.submit(9, go.wait), "alone, work of any size is taken"
    assert not background.submit(1, ran.append, 1)
    go.set()
    done = threading.Event()
    while not background.submit(2, ran.append, 2):
        pass
    assert background.submit(2, done.set)
    assert done.wait(20)
    background.close()
    background.close()
    background.check_integrity()
    assert ran == [2]
    assert not background.submit(1, ran.append, 3)


def test_failing_work_gives_its_room_back():
    background = Background("test", 1)
    for _ in range(20):
        while not background.submit(1, lambda: 1 / 0):
            pass
    background.close()


def in_child(work):
    """Whether `work` succeeds in a forked child, within 20 seconds."""
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(20)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_a_forked_child_has_background_work_and_counters_of_its_own():
    background, counters = Background("test", 1), Counters("a")
    go = threading.Event()
    assert background.submit(1, go.wait)

    def work():
        done = threading.Event()
        counters.add(a=1)
        assert counters.read() == {"a": 1}
        assert background.submit(1, done.set)
        assert done.wait(10)

    with counters._lock:  # as if another thread were adding
        assert in_child(work)
    go.set()
    background.close()
    assert counters.read() == {"a": 0}


def test_counters_add_up_over_threads():
    counters = Counters("a", "b")
    threads = [
        threading.Thread(target=lambda: [counters.add(a=1, b=2) for _ in range(2000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.read() == {"a": 8000, "b": 16000}
    counters.check_integrity()


def test_errors_cross_processes_whole():
    error = RowIntegrityError.of({1: [5, 6]}, "t", "I/O error")
    # By the same protocol as multiprocessing sends them.
    again = copy.copy(error)
    assert str(again) == str(error)
    assert (again.failures, again.layer, again.cause) == ({1: (5, 6)}, 1, "I/O error")
    mismatch = copy.copy(SpecMismatchError("no", "heads"))
    assert (str(mismatch), mismatch.field) == ("no", "heads")
