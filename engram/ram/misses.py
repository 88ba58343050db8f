"""The miss path: n-grams that the RAM tier lacks, read from the tier below, each once.

Whoever misses may have to read for all. A caller queues its request and takes its turn; the one
whose turn it is takes everything that waits, finds what others ask for too and what arrived in
the arena meanwhile, reads the rest in one go, so that the device has many reads to work on, and
answers everybody. So what several ask for is read once, as far as one turn reaches or the arena
admits it; a single caller pays for no thread, and nobody's answer depends on what is admitted.

Prefetches wait in a queue of their own and are read in small parts, only while no lookup waits.
"""

from __future__ import annotations

import copy
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engram._background import Background
from engram._counters import SECONDS, Counters, Histogram
from engram._failures import Failures
from engram._ngrams import number_ngrams
from engram.errors import EngramError, OverloadError, RowIntegrityError
from engram.ram import _staging
from engram.ram._failed_rows import RowsOf
from engram.ram.cache import Cache
from engram.ram.layout import STAGED_HEAD_BYTES
from engram.ram.memory import Memory
from engram.rows import Rows
from engram.tiers import Ngrams, Prefetch, Selection, Tier

TURN_NGRAMS = 512
"""N-grams read in one turn, and most that one request may name."""
WAITING_NGRAMS_MAX = 1 << 16
"""N-grams of all requests that wait; more is overload."""
PREFETCH_NGRAMS = 128
"""N-grams prefetched in one turn: a lookup waits for one such part at most."""
PENDING_NGRAMS_MAX = 1 << 18
"""N-grams that may wait to be prefetched."""

_NO_SCALES = np.empty((0, 0), np.uint8)


@dataclass(eq=False)
class _Request:
    """N-grams that somebody waits for, and where their staged entries go."""

    ngrams: Ngrams
    target: int
    request_id: int
    then: Ngrams | None
    failures: Failures = field(default_factory=Failures)
    error: EngramError | None = None
    served: bool = False


class MissPath:
    """Reads for one table in a `Cache`. Methods may be called from several threads at once.

    Args:
        backing: the tier below.
        cache: where bundles are kept.
        number: of the table in the cache.

    Attributes:
        counters: of n-grams, and of requests that were refused.
        seconds: how long requests took, with their wait.
    """

    def __init__(self, backing: Tier, cache: Cache, number: int) -> None:
        self._backing = backing
        self._cache = cache
        self._number = number
        self._bundle = cache.bundles[number]
        self._everything = Selection.of(backing.spec)
        self._rows_each = self._bundle.layers * self._bundle.heads
        self._rows_of = RowsOf(backing.spec, self._everything)
        self.counters = Counters(
            "ngrams_asked",
            "ngrams_refused",
            "ngrams_late",
            "ngrams_read",
            "ngrams_shared",
            "requests_refused",
            "prefetched_present",
            "prefetched_late",
            "prefetched_read",
            "prefetched_failed",
            "prefetches_cancelled",
            "prefetches_dropped",
        )
        self.seconds = Histogram(SECONDS)
        # A backlog means that reads cannot keep up: more hints would only arrive late.
        self._background = Background("engram-prefetch", PENDING_NGRAMS_MAX)
        self._closed = False
        self._renew()
        _ALL.add(self)

    def _renew(self) -> None:
        self._reading: object = None
        self._state = threading.Condition(threading.Lock())
        self._waiting: list[_Request] = []
        self._taken: list[_Request] = []
        self._scratch: Memory | None = None
        self._rows: Rows | None = None

    def read(
        self,
        ngrams: Ngrams,
        target: int,
        *,
        request_id: int = 0,
        timeout_s: float = 30.0,
        then: Ngrams | None = None,
    ) -> Failures:
        """Write the staged entry of each n-gram (see `engram.ram.layout`).

        Args:
            ngrams: at most `TURN_NGRAMS`, each once.
            target: address of the first entry; the others follow.
            request_id: for the entries.
            timeout_s: longest wait for the reading to begin.
            then: what this caller will ask for next; the device gets to it while bundles of
                `ngrams` are handed out.

        Returns:
            The rows that failed; every other row of every bundle is valid.

        Raises:
            OverloadError: too much waits already, or the wait was too long.
            StoreError: the tier below cannot be read.
        """
        # Kernels take int64; ids use all 64 bits.
        request = _Request(ngrams, target, int(np.uint64(request_id).astype(np.int64)), then)
        began = time.monotonic()
        deadline = began + timeout_s
        self.counters.add(ngrams_asked=len(ngrams))
        try:
            self._enqueue(request)
            while self._await_turn(request, deadline):
                self._serve(self._taken)
                self._end_turn()
        except BaseException:
            self._withdraw(request)
            raise
        finally:
            self.seconds.add(time.monotonic() - began)
        if request.error is not None:
            raise request.error
        return request.failures

    def _enqueue(self, request: _Request) -> None:
        with self._state:
            waiting = sum(len(each.ngrams) for each in self._waiting)
            if waiting and waiting + len(request.ngrams) > WAITING_NGRAMS_MAX:
                self.counters.add(requests_refused=1, ngrams_refused=len(request.ngrams))
                raise OverloadError(
                    f"{waiting:,} n-grams wait to be read from the table already; "
                    "send fewer at once, or try again later"
                )
            self._waiting.append(request)

    def _await_turn(self, request: _Request, deadline: float) -> bool:
        """True when it is this caller's turn to read for all in `_taken`; False once served."""
        with self._state:
            while self._reading is not None and not request.served:
                left = deadline - time.monotonic()
                if left > 0:
                    self._state.wait(left)
                elif request in self._waiting:
                    self.counters.add(requests_refused=1, ngrams_late=len(request.ngrams))
                    raise OverloadError("the time limit passed; the device cannot keep up")
                else:
                    # It is being read: its memory must not be left before that has ended.
                    self._state.wait()
            if request.served:
                return False
            self._reading = request
            self._take()
        return True

    def _take(self) -> None:
        """Take the next requests, as many as one turn reads."""
        count, total = 0, 0
        for request in self._waiting:
            total += len(request.ngrams)
            if count and total > TURN_NGRAMS:
                break
            count += 1
        self._taken, self._waiting = self._waiting[:count], self._waiting[count:]
        for request in self._taken:
            request.error = OverloadError("the reading was interrupted; try again")

    def _end_turn(self) -> None:
        with self._state:
            for request in self._taken:
                request.served = True
            self._taken, self._reading = [], None
            self._state.notify_all()

    def _withdraw(self, request: _Request) -> None:
        """Nothing is written for it once this returns."""
        if self._reading is request:
            self._end_turn()
        with self._state:
            if request in self._waiting:
                self._waiting.remove(request)
                self._state.notify_all()
            elif request in self._taken:
                self._state.wait_for(lambda: request.served)

    def _serve(self, requests: Sequence[_Request]) -> None:
        try:
            if len(requests) == 1:
                (only,) = requests
                only.failures = self._stage(
                    only.ngrams, only.target, only.request_id, then=only.then
                )
            else:
                self._serve_together(requests)
        except EngramError as error:
            for request in requests:
                request.error = copy.copy(error)
        else:
            for request in requests:
                request.error = None

    def _serve_together(self, requests: Sequence[_Request]) -> None:
        """Read what several ask for once, then copy it to each."""
        asked = Ngrams(
            np.concatenate([request.ngrams.windows for request in requests]),
            np.concatenate([request.ngrams.orders for request in requests]),
        )
        firsts, number = number_ngrams(asked)
        ngrams = asked.take(firsts)
        self.counters.add(ngrams_shared=len(asked) - len(ngrams))
        stride = self._bundle.staged_bytes
        base = self._scratch_memory().address
        failures = self._stage(ngrams, base, 0)
        addresses = base + number * stride
        at = 0
        for request in requests:
            mine = addresses[at : at + len(request.ngrams)]
            _staging.copy_staged(mine, request.target, stride, request.request_id)
            at += len(mine)
            if failures:
                request.failures = self._rows_of.failures_among(request.ngrams, failures)

    def _scratch_memory(self) -> Memory:
        if self._scratch is None:
            self._scratch = Memory.private(TURN_NGRAMS * self._bundle.staged_bytes)
        return self._scratch

    def _stage(
        self,
        ngrams: Ngrams,
        target: int,
        request_id: int,
        *,
        then: Ngrams | None = None,
        prefetched: bool = False,
    ) -> Failures:
        """Write entries from the arena or the tier below, and keep those that were read."""
        missed = self._cache.stage_present(self._number, ngrams, target, request_id)
        absent = np.flatnonzero(missed)
        if not len(absent):
            return Failures()
        wanted = ngrams.take(absent)
        rows, failures = self._read_bundles(wanted)
        if then is not None:
            self._backing.start(then)
        stride = self._bundle.staged_bytes
        _staging.stage(
            self._cache.views[self._number],
            ngrams.windows,
            ngrams.orders,
            request_id,
            rows.values,
            _NO_SCALES if rows.scales is None else rows.scales,
            target,
            stride,
            missed,
        )
        bundles = target + absent * stride + STAGED_HEAD_BYTES + self._bundle.head_bytes
        if failures:
            bundles[self._rows_of.touched(wanted, failures)] = 0
        self._cache.fill(self._number, wanted, bundles, prefetched=prefetched)
        self.counters.add(ngrams_read=len(absent))
        return failures

    def _read_bundles(self, ngrams: Ngrams) -> tuple[Rows, Failures]:
        """All rows of `ngrams` in canonical order, and those that failed."""
        if self._rows is None:
            self._rows = Rows.empty((TURN_NGRAMS * self._rows_each,), self._backing.row_format)
        count = len(ngrams) * self._rows_each
        failures = Failures()
        try:
            places = np.arange(count, dtype=np.int64)
            self._backing.read(ngrams, self._everything, self._rows, places)
        except RowIntegrityError as error:
            failures.add(error.failures, error.cause)
        return self._rows, failures

    def prefetch(self, ngrams: Ngrams) -> Prefetch:
        """Bring n-grams into the arena when no lookup waits; returns at once."""
        present = self._cache.present(self._number, ngrams)
        absent = np.flatnonzero(~present)
        handle = Prefetch()
        self.counters.add(prefetched_present=len(ngrams) - len(absent))
        if len(absent) and not self._background.submit(
            len(absent), self._prefetch, ngrams.take(absent), handle
        ):
            self.counters.add(prefetches_dropped=1)
        return handle

    def _prefetch(self, ngrams: Ngrams, handle: Prefetch) -> None:
        for at in range(0, len(ngrams), PREFETCH_NGRAMS):
            with self._state:
                self._state.wait_for(lambda: self._reading is None and not self._waiting)
                if handle.cancelled or self._closed:
                    self.counters.add(prefetches_cancelled=1)
                    return
                self._reading = handle
            part, then = (
                ngrams.take(slice(first, first + PREFETCH_NGRAMS))
                for first in (at, at + PREFETCH_NGRAMS)
            )
            try:
                self._prefetch_part(part, then)
            finally:
                self._end_turn()

    def _prefetch_part(self, ngrams: Ngrams, then: Ngrams) -> None:
        present = self._cache.present(self._number, ngrams)
        late = int(present.sum())
        absent = np.flatnonzero(~present)
        self.counters.add(prefetched_late=late, prefetched_read=len(absent))
        wanted = ngrams.take(absent)
        try:
            self._stage(wanted, self._scratch_memory().address, 0, then=then, prefetched=True)
        except EngramError:
            # Nobody waits for these rows; the lookup that does will name them.
            self.counters.add(prefetched_failed=len(absent))

    def warm(self, ngrams: Ngrams) -> None:
        """Compile what only several callers, or prefetches, need."""
        number_ngrams(ngrams)
        self._cache.present(self._number, ngrams)
        _staging.copy_staged(np.zeros(0, np.int64), 0, self._bundle.staged_bytes, 0)

    def check_integrity(self) -> None:
        """Assert the invariants; tests call it when nothing is under way."""
        self.counters.check_integrity()
        self._background.check_integrity()
        assert not self._waiting

    def close(self) -> None:
        """End the prefetching thread; safe to call twice."""
        self._closed = True
        self._background.close()


_ALL: weakref.WeakSet[MissPath] = weakref.WeakSet()


def _renew_after_fork() -> None:
    # Threads that do not exist in the child may have held a lock or waited.
    for misses in _ALL:
        misses._renew()


os.register_at_fork(after_in_child=_renew_after_fork)
