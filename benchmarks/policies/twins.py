"""Plain Python twins of the kernels, the oracles of their tests."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import cache
from typing import Protocol


class Twin(Protocol):
    """A cache of n-grams."""

    def holds(self, key: int) -> bool: ...

    def hit(self, key: int) -> None: ...

    def miss(self, key: int) -> None: ...


def replay(twin: Twin, batches: Sequence[Sequence[int]]) -> list[bool]:
    """Which accesses miss: a batch is looked up as a whole, then its misses come in."""
    missed = []
    for batch in batches:
        absent = [key for key in batch if not twin.holds(key)]
        for key in batch:
            missed.append(not twin.holds(key))
            if twin.holds(key):
                twin.hit(key)
        for key in absent:
            twin.miss(key)
    return missed


class Lru:
    """Least recently used goes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.order: OrderedDict[int, None] = OrderedDict()

    def holds(self, key: int) -> bool:
        return key in self.order

    def hit(self, key: int) -> None:
        self.order.move_to_end(key)

    def miss(self, key: int) -> None:
        if len(self.order) == self.capacity:
            self.order.popitem(last=False)
        self.order[key] = None


class Clock:
    """The oldest goes, unless touched."""

    def __init__(self, capacity: int, cap: int) -> None:
        self.capacity, self.cap = capacity, cap
        self.queue: deque[int] = deque()
        self.touched: dict[int, int] = {}

    def holds(self, key: int) -> bool:
        return key in self.touched

    def hit(self, key: int) -> None:
        self.touched[key] = min(self.cap, self.touched[key] + 1)

    def miss(self, key: int) -> None:
        if len(self.queue) == self.capacity:
            self.evict()
        self.queue.append(key)
        self.touched[key] = 0

    def evict(self) -> None:
        while self.touched[self.queue[0]]:
            self.touched[self.queue[0]] -= 1
            self.queue.rotate(-1)
        del self.touched[self.queue.popleft()]


class Sieve(Clock):
    """The hand stays where it evicted; what it spares stays in place."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, 1)
        self.hand = 0

    def evict(self) -> None:
        self.hand %= len(self.queue)
        while self.touched[self.queue[self.hand]]:
            self.touched[self.queue[self.hand]] = 0
            self.hand = (self.hand + 1) % len(self.queue)
        del self.touched[self.queue[self.hand]]
        del self.queue[self.hand]
        # The hand now stands on the next newer one, or past the newest: then the oldest is next,
        # even if a newer one comes in first.
        if self.hand == len(self.queue):
            self.hand = 0


class S3Fifo(Clock):
    """A small queue for all that is new, CLOCK for what was touched there or came back soon."""

    def __init__(self, capacity: int, small: int, promote: int, ghosts: int, cap: int) -> None:
        super().__init__(capacity, cap)
        self.small: deque[int] = deque()
        self.small_limit, self.promote = small, promote
        self.ghosts: deque[int] = deque(maxlen=ghosts)

    def miss(self, key: int) -> None:
        known = key in self.ghosts
        if known:
            self.ghosts.remove(key)
        if len(self.queue) + len(self.small) == self.capacity:
            self.make_room()
        (self.queue if known else self.small).append(key)
        self.touched[key] = 0

    def make_room(self) -> None:
        while self.small and (len(self.small) >= self.small_limit or not self.queue):
            key = self.small.popleft()
            if self.touched[key] < self.promote:
                del self.touched[key]
                self.ghosts.append(key)
                return
            self.touched[key] = 0
            self.queue.append(key)
        self.evict()


class Doorkeeper(Clock):
    """Admits what is missed again while its last miss is remembered."""

    def __init__(self, capacity: int, cap: int, ghosts: int) -> None:
        super().__init__(capacity, cap)
        self.ghosts: deque[int] = deque(maxlen=ghosts)

    def miss(self, key: int) -> None:
        if len(self.queue) < self.capacity:
            super().miss(key)
        elif key in self.ghosts:
            self.ghosts.remove(key)
            super().miss(key)
        else:
            self.ghosts.append(key)


def fewest_misses(keys: Sequence[int], capacity: int) -> int:
    """Over all ways to admit and evict: for traces of a dozen accesses."""

    @cache
    def least(at: int, held: frozenset[int]) -> int:
        if at == len(keys):
            return 0
        key = keys[at]
        if key in held:
            return least(at + 1, held)
        options = [held]
        if len(held) < capacity:
            options.append(held | {key})
        options += [held - {victim} | {key} for victim in held]
        return 1 + min(least(at + 1, option) for option in options)

    return least(0, frozenset())
