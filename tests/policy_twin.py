"""S3-FIFO once more, over n-grams in plain lists: the oracle of the compiled policy."""

from __future__ import annotations

from collections import Counter, deque

from arenas import buckets_twin, hash_twin

_WAYS = 4


class PolicyTwin:
    """Which n-grams are kept, as `engram.ram._fill` describes it.

    Keys are (table, ids). Attributes `small`, `main` and `limbo` hold them in the order in which
    they will be looked at.
    """

    def __init__(self, slots, tables, seed, buckets):
        self.slots, self.seed, self.buckets = slots, seed, buckets
        self.free = slots
        self.small, self.main, self.limbo = deque(), deque(), deque()
        self.limbo_max = max(4, slots // 32)
        self.epoch = 1
        self.hits, self.prefetched, self.waited = {}, set(), set()
        self.readers = []
        self.ghosts = [[[0, 0] for _ in range(_WAYS)] for _ in range(1 + slots // _WAYS)]
        self.used = [Counter() for _ in range(tables)]
        self.bucket_of = {}
        self.counts = Counter()
        self.left = [Counter() for _ in range(tables)]

    def touch(self, reader, key):
        """A hit of this key, seen by a reader."""
        reader.touches[key] = min(3, reader.touches[key] + 1)

    def fill(self, key, prefetched):
        if key in self.bucket_of:
            return
        if not self._make_room():
            self.counts["refused"] += 1
            return
        self._touches(key)
        if not self._link(key):
            self.counts["refused"] += 1
            return
        self.free -= 1
        self.counts["admitted"] += 1
        self.hits[key] = 0
        (self.main if self._was_evicted(key) else self.small).append(key)
        if prefetched:
            self.prefetched.add(key)

    def settle_prefetches(self):
        for key in list(self.prefetched):
            for reader in self.readers:
                if reader.touches[key]:
                    reader.touches[key] -= 1
                    self._settle(key, 1)
                    break

    def _touches(self, key):
        total = 0
        for reader in self.readers:
            total += reader.touches.pop(key, 0)
        return total

    def _make_room(self):
        if not self.free:
            for _ in range(min(64, 1 + self.slots // 64)):
                if len(self.limbo) >= self.limbo_max or not self._evict():
                    break
            self._reclaim()
        return self.free > 0

    def _reclaim(self):
        self.epoch += 1
        held = [min(reader.held) for reader in self.readers if reader.held]
        oldest = min([self.epoch, *held])
        while self.limbo and self.limbo[0][1] < oldest:
            self.limbo.popleft()
            self.free += 1

    def _evict(self):
        while self.small or self.main:
            wasted = self.counts["wasted"]
            if len(self.small) * 100 >= self.slots * 25 or not self.main:
                key = self.small.popleft()
                seen = min(3, self.hits[key] + self._touches(key))
                if self._stays(key, seen):
                    continue
                self._remember(key)
                why = "once"
            else:
                key = self.main.popleft()
                seen = min(3, self.hits[key] + self._touches(key))
                self._settle(key, seen)
                if seen:
                    self.hits[key] = seen - 1
                    self.main.append(key)
                    continue
                why = "cold"
            self.counts["evicted"] += 1
            self.left[key[0]]["unused" if wasted < self.counts["wasted"] else why] += 1
            self.used[key[0]][self.bucket_of.pop(key)] -= 1
            self.limbo.append((key, self.epoch))
            return True
        return False

    def _stays(self, key, seen):
        if key in self.prefetched and not seen and key not in self.waited:
            self.waited.add(key)
            self.small.append(key)
            return True
        if self._settle(key, seen) < 2:
            return False
        self.hits[key] = 0
        self.main.append(key)
        return True

    def _settle(self, key, seen):
        if key not in self.prefetched:
            return seen
        self.counts["useful" if seen else "wasted"] += 1
        self.prefetched.discard(key)
        self.waited.discard(key)
        return max(0, seen - 1)

    def _link(self, key):
        used = self.used[key[0]]
        first, second = buckets_twin(hash_twin(self.seed, key[1]), self.buckets)
        bucket = second if used[second] < used[first] else first
        if used[bucket] == 8:
            return False
        used[bucket] += 1
        self.bucket_of[key] = bucket
        return True

    def _ways(self, key):
        hashed = hash_twin(self.seed, key[1])
        return self.ghosts[(hashed >> 8) % len(self.ghosts)], hashed >> 32

    def _remember(self, key):
        ways, print_ = self._ways(key)
        known = [way for way in ways if way[0] == print_ and way[1]]
        way = known[0] if known else min(ways, key=lambda each: each[1])
        way[:] = print_, max(1, self.counts["evicted"])

    def _was_evicted(self, key):
        ways, print_ = self._ways(key)
        for way in ways:
            if way[0] == print_ and way[1]:
                age = self.counts["evicted"] - way[1]
                way[1] = 0
                return age <= self.slots
        return False
