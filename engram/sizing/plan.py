"""From a trace and a table to how much memory is worth having."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from engram.errors import ConfigError
from engram.sizing.curve import Curve
from engram.sizing.geometry import Geometry
from engram.sizing.replay import replay, replay_tiers
from engram.sizing.trace import Trace
from engram.store.layout import PAGE_BYTES

PLAN_VERSION = 1
TARGETS = (0.80, 0.90, 0.95)
_STEPS = 40


@dataclass(frozen=True)
class Drive:
    """What reads from disk are held against.

    Attributes:
        reads_per_second: random reads of 4 KiB.
        source: where the number comes from, for people.
    """

    reads_per_second: float
    source: str


@dataclass(frozen=True)
class Load:
    """What is left for the drive.

    Attributes:
        reads_per_token: rows, each a 4 KiB read, if the page cache helps with none.
        tokens_per_second: that the drive sustains; None if nothing is read.
    """

    reads_per_token: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class Target:
    """What a part of hits costs; None where no memory reaches it.

    Attributes:
        hits: 0 to 1, of all n-grams asked for.
        of_most: the part of `Plan.most_hits` that this is, where that was what was wanted.
        ram_bytes: of the RAM tier.
        page_cache_bytes: of page cache with as many hits, if rows share pages as hashing has it.
        page_cache_worst_bytes: the same if no two rows shared a page.
    """

    hits: float
    of_most: float | None = None
    ram_bytes: int | None = None
    load: Load | None = None
    page_cache_bytes: int | None = None
    page_cache_worst_bytes: int | None = None


@dataclass(frozen=True)
class Choice:
    """What given memory does.

    Attributes:
        name: `now`, `twice the RAM` or `with HBM`.
        hits: in any tier; `hbm_hits`: in the upper one.
    """

    name: str
    ram_bytes: int
    hbm_bytes: int
    hits: float
    hbm_hits: float
    load: Load


@dataclass(frozen=True)
class Step:
    """A point of the drawn curve: hits of the RAM tier, and of a page cache of its size."""

    ram_bytes: int
    hits: float
    error: float
    page_cache_hits: float


@dataclass(frozen=True)
class Plan:
    """All that `engram plan` says.

    Attributes:
        table_bytes: of the pages that hold its rows: no page cache needs more.
        targets: of `TARGETS`; if these are out of reach, then also that part of `most_hits` each.
        most_hits: with memory for every n-gram asked for; the others were never asked for before.
    """

    table: str
    table_bytes: int
    fingerprint: str
    tokens: int
    accesses: int
    samples: int
    level: int
    most_hits: float
    drive: Drive
    targets: tuple[Target, ...]
    choices: tuple[Choice, ...]
    steps: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with `plan_version` in front; names as here."""
        return {"plan_version": PLAN_VERSION, **asdict(self)}


class PageCache:
    """What a page cache hits, from what single n-grams kept by recency would.

    A page is evicted when as many other pages were used since its last use as there is room for,
    and so many n-grams' rows lie on so many pages as `Geometry.pages_of` says. Besides, a row that
    was not used of late may lie on a page that another row of it keeps.
    """

    def __init__(self, recency: Curve, geometry: Geometry) -> None:
        self._curve, self._geometry = recency, geometry
        self._most = float(recency.points[-1].slots)

    def hits(self, size: int) -> float:
        """Part of all rows that `size` bytes of page cache hit."""
        low, high = 0.0, self._most
        for _ in range(_STEPS):
            middle = (low + high) / 2
            over = self._geometry.pages_bytes(middle) > size
            low, high = (low, middle) if over else (middle, high)
        return self._hits_of(low)

    def bytes_for(self, hits: float) -> tuple[int, int] | None:
        """(bytes, bytes if no two rows shared a page) for this part of hits, None if never."""
        if self._hits_of(self._most) < hits:
            return None
        low, high = 0.0, self._most
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._hits_of(middle) >= hits else (middle, high)
        alone = self._curve.slots_for(hits)
        worst = self._geometry.pages_bytes_worst(self._most if alone is None else alone)
        expected = self._geometry.pages_bytes(high)
        return expected, max(worst, expected)

    def _hits_of(self, ngrams: float) -> float:
        own = self._curve.hits_at(ngrams)
        shared = self._geometry.pages_of(ngrams) / self._geometry.pages
        return own + (1 - own) * shared


def make_plan(
    trace: Trace,
    geometry: Geometry,
    drive: Drive,
    *,
    ram: int,
    hbm: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Plan:
    """Simulate, and say what memory buys.

    Args:
        ram, hbm: bytes to compare others with; no HBM choice if `hbm` is 0.
        progress: told (steps done, steps in all).

    Raises:
        TraceError: the trace is of another table, or says too little.
        ConfigError: memory too small for a single n-gram, or a drive that reads nothing.
    """
    trace.require_table(geometry.fingerprint, geometry.name)
    if drive.reads_per_second <= 0:
        raise ConfigError("a drive does at least one read a second; name its rate with --iops")
    for name, slots in (("--ram", geometry.ram_slots(ram)), ("--hbm", geometry.hbm_slots(hbm))):
        if not slots and (name == "--ram" or hbm):
            raise ConfigError(f"{name} is too small for a single n-gram; give it more")
    total = 2 * len(trace.orders)
    curve = replay(trace, progress=lambda done, _: progress(done, total))
    recency = replay(
        trace, recency=True, progress=lambda done, _: progress(len(trace.orders) + done, total)
    )
    pages = PageCache(recency, geometry)
    per_token = trace.accesses / max(1, trace.tokens) * geometry.rows

    def load(reads: float) -> Load:
        rows = reads * per_token
        return Load(rows, drive.reads_per_second / rows if rows else None)

    def target(hits: float, of_most: float | None = None) -> Target:
        slots = curve.slots_for(hits)
        cached = pages.bytes_for(hits) or (None, None)
        if slots is None:
            return Target(hits, of_most, None, None, *cached)
        reads = load(curve.reads_at(slots))
        return Target(hits, of_most, geometry.ram_bytes(slots), reads, *cached)

    def choice(name: str, ram: int, hbm: int = 0) -> Choice:
        found = replay_tiers(trace, geometry.ram_slots(ram), geometry.hbm_slots(hbm))
        return Choice(name, ram, hbm, found.hits, found.hbm_hits, load(found.reads))

    most = curve.hits_at(curve.points[-1].slots)
    targets = [target(hits) for hits in TARGETS]
    if most < TARGETS[-1]:
        targets += [target(part * most, part) for part in TARGETS]
    choices = [choice("now", ram), choice("twice the RAM", 2 * ram)]
    choices += [choice("with HBM", ram, hbm)] if hbm else []
    return Plan(
        table=geometry.name,
        table_bytes=geometry.pages * PAGE_BYTES,
        fingerprint=geometry.fingerprint,
        tokens=trace.tokens,
        accesses=trace.accesses,
        samples=len(trace.orders),
        level=trace.level,
        most_hits=most,
        drive=drive,
        targets=tuple(targets),
        choices=tuple(choices),
        steps=tuple(_steps(curve, pages, geometry)),
    )


def _steps(curve: Curve, pages: PageCache, geometry: Geometry) -> list[Step]:
    found = []
    for point in curve.points:
        size = geometry.ram_bytes(point.slots)
        hits = curve.hits_at(point.slots)
        found.append(Step(size, hits, point.error, pages.hits(size)))
    return found
