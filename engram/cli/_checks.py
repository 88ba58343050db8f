"""What `engram doctor` finds wrong: each check a function of facts, nothing else.

A sentence says what is wrong, with its figures, then what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from engram.cli._facts import Facts
from engram.cli._readings import Reading
from engram.sizes import format_size

NGRAMS_MIN = 10_000
"""Fewer say nothing about a share."""
READS_MIN = 1000
READ_SECONDS_MAX = 0.01
DISK_SHARE_MAX = 0.1
FULL_SHARE = 0.9
LATE_SHARE_MAX = 0.1
WASTED_SHARE_MAX = 0.25
REFUSED_SHARE_MAX = 0.25
LARGE_ARENA_BYTES = 1 << 30
FILES_MIN = 1024
FILES_SHARE_MAX = 0.8
CACHED_SHARE_MAX = 0.5
FREE_SHARE_MIN = 0.1
SWAP_BYTES_MAX = 64 << 20
SPARE_BYTES_MIN = 256 << 20
"""What a sidecar needs beside its RAM tier."""
HELD_SECONDS_MAX = 10.0

REJECTED = {
    "bad_request": "look in the clients' logs for the field, or raise limits.request_rows and "
    "limits.request_bytes if requests were too large",
    "unknown_table": "correct the table's name in the client, or serve it with --table",
    "other_table": "clients expect another table's content; serve the one they were made for",
    "overloaded": "raise limits.streams or limits.leases, whichever the clients' logs name",
    "unavailable": "clients came while the sidecar stopped; let them wait for the next one",
    "store": "run 'engram verify' on the tables and look in the sidecar's log",
    "internal": "look in the sidecar's log and report what it says",
}


@dataclass(frozen=True)
class Finding:
    """Something to change.

    Attributes:
        check: name of the check.
        says: what is wrong, and what to do.
        figures: those in `says`, for programs.
    """

    check: str
    says: str
    figures: dict[str, float | str] = field(default_factory=dict)


def findings(facts: Facts) -> list[Finding]:
    """All that is wrong, in the order in which it is best looked at."""
    return [
        Finding(check.__name__, says, figures) for check in CHECKS for says, figures in check(facts)
    ]


_Found = Iterator[tuple[str, dict[str, float | str]]]


def _tables(reading: Reading | None) -> list[str]:
    return [] if reading is None else list(reading.by("engram_table_info", "table"))


def damage(facts: Facts) -> _Found:
    """Rows that are not what was written."""
    for table in _tables(facts.reading):
        assert facts.reading is not None
        count = facts.reading.total("engram_integrity_errors_total", table=table)
        if count:
            yield (
                f"{count:,.0f} rows of {table} were not what was written: run 'engram verify' on "
                "its directory, import it again, and look at the disk's own log",
                {"table": table, "rows": count},
            )


def failed_rows(facts: Facts) -> _Found:
    """Rows that clients did not get, though they may be sound."""
    advice = {
        "io": "look at the disk's own log and run 'engram verify'",
        "deadline": "the disk is too slow for what is asked; give more --ram or a faster disk",
        "overload": "more is asked than the disk gives; give more --ram or a faster disk",
    }
    for table in _tables(facts.reading):
        assert facts.reading is not None
        failed = facts.reading.by("engram_rows_failed_total", "reason", table=table)
        for reason, what in advice.items():
            count = failed.get(reason, 0.0)
            if count:
                yield (
                    f"{count:,.0f} rows of {table} failed by {reason}: {what}",
                    {"table": table, "reason": reason, "rows": count},
                )


def ram_too_small(facts: Facts) -> _Found:
    """A RAM tier that is full and evicts what is then read from disk."""
    if facts.reading is None:
        return
    capacity = facts.reading.total("engram_tier_capacity_bytes", tier="ram")
    used = facts.reading.total("engram_tier_used_bytes", tier="ram")
    served = facts.reading.by("engram_ngrams_served_total", "tier")
    evicted = facts.reading.total("engram_evictions_total", tier="ram")
    ngrams = sum(served.values())
    if not capacity or not evicted or ngrams < NGRAMS_MIN or used < FULL_SHARE * capacity:
        return
    disk = served.get("ssd", 0.0) / ngrams
    if disk > DISK_SHARE_MAX:
        yield (
            f"the RAM tier is full ({format_size(int(used))} of {format_size(int(capacity))}) and "
            f"has evicted {evicted:,.0f} n-grams, while {disk:.0%} of {ngrams:,.0f} lookups went "
            "to disk: give it more with --ram",
            {"capacity_bytes": capacity, "used_bytes": used, "evicted": evicted, "disk": disk},
        )


def prefetches(facts: Facts) -> _Found:
    """Prefetches that come too late, are for nothing, or find no room."""
    for table in _tables(facts.reading):
        assert facts.reading is not None
        results = facts.reading.by("engram_prefetch_ngrams_total", "result", table=table)
        useful, late, wasted = (results.get(name, 0.0) for name in ("useful", "late", "wasted"))
        ended = useful + late + wasted
        if ended < NGRAMS_MIN:
            continue
        if late > LATE_SHARE_MAX * ended:
            yield (
                f"{late / ended:.0%} of {ended:,.0f} n-grams prefetched for {table} were looked "
                "up before they were read: prefetch earlier, or use a faster disk",
                {"table": table, "late": late, "ended": ended},
            )
        if wasted > WASTED_SHARE_MAX * ended:
            yield (
                f"{wasted / ended:.0%} of {ended:,.0f} n-grams prefetched for {table} were "
                "evicted unused: prefetch less, later or more surely, or give more --ram",
                {"table": table, "wasted": wasted, "ended": ended},
            )


def no_room(facts: Facts) -> _Found:
    """N-grams that were read, prefetched ones too, and dropped because the tier had no room."""
    for table in _tables(facts.reading):
        assert facts.reading is not None
        results = facts.reading.by("engram_promotions_total", "result", table=table)
        refused, read = results.get("refused", 0.0), sum(results.values())
        # Without a tier none are kept, and that was asked for.
        if results.get("kept") and read >= NGRAMS_MIN and refused > REFUSED_SHARE_MAX * read:
            yield (
                f"{refused / read:.0%} of {read:,.0f} n-grams read for {table} were dropped, for "
                "the RAM tier had no room: give it more with --ram, or prefetch less",
                {"table": table, "refused": refused, "read": read},
            )


def held_memory(facts: Facts) -> _Found:
    """A reader that keeps what was evicted from being used again."""
    if facts.reading is None:
        return
    held = facts.reading.total("engram_tier_pinned_bytes", tier="ram")
    seconds = facts.reading.total("engram_oldest_epoch_age_seconds")
    if held and seconds > HELD_SECONDS_MAX:
        yield (
            f"a client has been within one read for {seconds:.0f} s, for which "
            f"{format_size(int(held))} wait to be used again: continue or end what is stopped",
            {"held_bytes": held, "seconds": seconds},
        )


def rejected(facts: Facts) -> _Found:
    """Requests and clients that were refused."""
    if facts.reading is None:
        return
    counts = facts.reading.by("engram_requests_rejected_total", "reason")
    for reason, count in counts.items():
        if count:
            advice = REJECTED.get(reason, "look in the sidecar's log")
            yield (
                f"{count:,.0f} requests were rejected as {reason}: {advice}",
                {"reason": reason, "requests": count},
            )


def leases_at_limit(facts: Facts) -> _Found:
    """No place for another client."""
    if facts.reading is None:
        return
    leases = facts.reading.total("engram_leases")
    most = facts.reading.total("engram_leases_max")
    if most and leases >= most:
        yield (
            f"{leases:.0f} clients are attached and no more than {most:.0f} may be: raise "
            "limits.leases, or end clients that are idle",
            {"leases": leases, "leases_max": most},
        )


def open_files(facts: Facts) -> _Found:
    """A limit of descriptors that clients will meet."""
    if facts.reading is None:
        return
    now, most = facts.reading.total("process_open_fds"), facts.reading.total("process_max_fds")
    if most and (most < FILES_MIN or now > FILES_SHARE_MAX * most):
        yield (
            f"the sidecar has {now:,.0f} files open and may have {most:,.0f}: raise its limit "
            "(ulimit -n, or LimitNOFILE=)",
            {"open": now, "most": most},
        )


def _arena_bytes(facts: Facts) -> float:
    if facts.reading is None:
        return 0.0
    return facts.reading.total("engram_shm_segment_bytes", purpose="slab")


def small_pages(facts: Facts) -> _Found:
    """A large arena in pages of 4 KiB."""
    arena = _arena_bytes(facts)
    if facts.huge_pages in ("never", "deny") and arena >= LARGE_ARENA_BYTES:
        yield (
            f"the arena of {format_size(int(arena))} is in small pages, for shmem_enabled is "
            f"{facts.huge_pages}: write 'advise' to "
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled and start the sidecar again",
            {"arena_bytes": arena, "shmem_enabled": facts.huge_pages},
        )


def locked_memory(facts: Facts) -> _Found:
    """GPU clients that may not lock the arena, so that rows are copied."""
    arena = _arena_bytes(facts)
    used = facts.reading is not None and facts.reading.total("engram_gpu_ngrams_total") > 0
    if (used or facts.gpus) and facts.memlock_bytes < arena:
        yield (
            f"a process of this user may lock {format_size(int(facts.memlock_bytes))}, less than "
            f"the arena's {format_size(int(arena))}, which GPUs then cannot read in place: raise "
            "the limit of GPU clients (ulimit -l, or LimitMEMLOCK=)",
            {"memlock_bytes": facts.memlock_bytes, "arena_bytes": arena},
        )


def memory_limit(facts: Facts) -> _Found:
    """A RAM tier that leaves the rest of the sidecar no memory."""
    if facts.reading is None or facts.allowed_bytes is None:
        return
    capacity = facts.reading.total("engram_tier_capacity_bytes", tier="ram")
    spare = facts.allowed_bytes - capacity
    if capacity and spare < SPARE_BYTES_MIN:
        yield (
            f"the sidecar may have {format_size(facts.allowed_bytes)}, of which its RAM tier takes "
            f"{format_size(int(capacity))}: raise the limit of its cgroup to "
            f"{format_size(int(capacity) + SPARE_BYTES_MIN)} at least, or lower --ram",
            {"allowed_bytes": facts.allowed_bytes, "capacity_bytes": capacity},
        )


def swap(facts: Facts) -> _Found:
    """Memory that was written to disk, as the RAM tier may be."""
    if facts.swap_used_bytes > SWAP_BYTES_MAX:
        yield (
            f"{format_size(facts.swap_used_bytes)} of swap are in use, and the RAM tier is slower "
            "than disk if it is there: lower --ram, or switch swap off (swapoff, MemorySwapMax=0)",
            {"swap_used_bytes": facts.swap_used_bytes},
        )


def numa(facts: Facts) -> _Found:
    """An arena on whatever node first wrote it."""
    if facts.numa_nodes > 1 and facts.arena_policy == "default":
        yield (
            f"this machine has {facts.numa_nodes} NUMA nodes, and the arena is wherever it was "
            "first written: start the sidecar with 'numactl --interleave=all', or it and its "
            "clients with '--cpunodebind=0 --membind=0'",
            {"numa_nodes": facts.numa_nodes},
        )


def slow_files(facts: Facts) -> _Found:
    """Tables that are not on a local SSD."""
    from engram.store.destination import NETWORK_FILE_SYSTEMS

    for table in facts.tables:
        kind = table.file_system
        if NETWORK_FILE_SYSTEMS.fullmatch(kind):
            yield (
                f"{table.path} lies on a network file system ({kind}): move it to a local SSD",
                {"path": str(table.path), "file_system": kind},
            )
        elif kind.startswith("fuse"):
            yield (
                f"{table.path} lies on {kind}, which asks a process for every read: move it to a "
                "file system of the kernel's own, on a local SSD",
                {"path": str(table.path), "file_system": kind},
            )
        elif table.rotates:
            yield (
                f"{table.path} lies on a disk that says it rotates, which reads some hundred rows "
                "a second: move it to an SSD",
                {"path": str(table.path), "file_system": kind},
            )


def slow_reads(facts: Facts) -> _Found:
    """Reads that take longer than an SSD's."""
    for table in _tables(facts.reading):
        assert facts.reading is not None
        name = "engram_ssd_read_duration_seconds"
        reads = facts.reading.total(f"{name}_count", table=table)
        seconds = facts.reading.total(f"{name}_sum", table=table)
        if reads >= READS_MIN and seconds > READ_SECONDS_MAX * reads:
            yield (
                f"a read from {table} takes {1000 * seconds / reads:.1f} ms on average of "
                f"{reads:,.0f}, an SSD some 0.1 ms: move it to a local SSD, and look who else "
                "uses that disk",
                {"table": table, "reads": reads, "mean_seconds": seconds / reads},
            )


def cached_twice(facts: Facts) -> _Found:
    """What the RAM tier holds, in the page cache as well, where memory is short."""
    if facts.reading is None or facts.free_bytes >= FREE_SHARE_MIN * facts.memory_bytes:
        return
    used = facts.reading.total("engram_tier_used_bytes", tier="ram")
    cached = sum(table.cached_bytes or 0 for table in facts.tables)
    if used and cached > CACHED_SHARE_MAX * used:
        yield (
            f"the page cache holds {format_size(cached)} of tables of which the RAM tier holds "
            f"{format_size(int(used))}, and only {format_size(facts.free_bytes)} are free: lower "
            "--ram and leave reads to the page cache, or make it large enough for all that is hot",
            {"cached_bytes": cached, "used_bytes": used, "free_bytes": facts.free_bytes},
        )


CHECKS: tuple[Callable[[Facts], _Found], ...] = (
    damage,
    failed_rows,
    rejected,
    leases_at_limit,
    ram_too_small,
    prefetches,
    no_room,
    held_memory,
    memory_limit,
    swap,
    cached_twice,
    slow_files,
    slow_reads,
    small_pages,
    numa,
    open_files,
    locked_memory,
)
