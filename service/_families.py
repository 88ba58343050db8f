"""The metrics of a sidecar: names, labels, what each says. `docs/operations.md` shows this list."""

from __future__ import annotations

from typing import NamedTuple

from engram.service._traffic import METHODS, REASONS


class Family(NamedTuple):
    """One metric.

    Attributes:
        name: as it is written in rules and dashboards, but for a histogram's suffixes.
        kind: info, gauge, counter or histogram.
        labels: names, with all values that there are, if these are fixed.
        meaning: for people.
    """

    name: str
    kind: str
    labels: dict[str, tuple[str, ...]]
    meaning: str


TABLE: dict[str, tuple[str, ...]] = {"table": ()}
RAM: dict[str, tuple[str, ...]] = {"tier": ("ram",)}
VERSIONS = ("version", "proto", "shm_abi", "lmdb")
STATES = ("serving", "draining")

FAMILIES = (
    Family(
        "engram_build_info",
        "info",
        dict.fromkeys(VERSIONS, ()),
        "Versions of engram, its schema, its shared memory and LMDB.",
    ),
    Family("engram_table_info", "info", TABLE | {"fingerprint": ()}, "What each table holds."),
    Family(
        "engram_table_state",
        "gauge",
        TABLE | {"state": STATES},
        "1 for the state that a table is in, 0 for others.",
    ),
    Family(
        "engram_ngrams_served_total",
        "counter",
        TABLE | {"tier": ("gpu", "ram", "ssd")},
        "N-grams of tokens looked up, by where they were when they were looked for: on a client's "
        "device, in the RAM tier, or in neither.",
    ),
    Family(
        "engram_gpu_ngrams_total",
        "counter",
        TABLE | {"source": ("device", "arena", "staging")},
        "N-grams of tokens of steps on clients' devices, by the memory the device read them from.",
    ),
    Family(
        "engram_ngrams_requested_total",
        "counter",
        TABLE | {"stage": ("raw", "unique")},
        "N-grams that the tiers in memory lacked: of tokens, and each once a request.",
    ),
    Family(
        "engram_request_ngrams",
        "histogram",
        TABLE | {"method": METHODS},
        "N-grams of a request that came to the sidecar.",
    ),
    Family(
        "engram_requests_rejected_total",
        "counter",
        {"reason": REASONS},
        "Requests, and clients that wanted to attach, refused or failed as a whole.",
    ),
    Family(
        "engram_rows_failed_total",
        "counter",
        TABLE | {"reason": ("io", "check", "deadline", "overload")},
        "Rows that could not be read or verified, or were asked for when there was no time or "
        "room, each time.",
    ),
    Family(
        "engram_integrity_errors_total",
        "counter",
        TABLE | {"kind": ("damaged", "short", "hole")},
        "Rows whose bytes are not what was written, lie beyond the end of the file, or lie in an "
        "extent with a hole, each time they were read.",
    ),
    Family(
        "engram_lookup_duration_seconds",
        "histogram",
        TABLE | {"tier": ("ssd",)},
        "Time of a request for n-grams that the RAM tier lacked, with its wait.",
    ),
    Family(
        "engram_ssd_read_duration_seconds",
        "histogram",
        TABLE,
        "Time of a read of some rows together from a table's file, checks included.",
    ),
    Family(
        "engram_ssd_read_bytes_total",
        "counter",
        TABLE,
        "Rows and their checks read from a table's file, from the page cache or the device.",
    ),
    Family(
        "engram_prefetch_ngrams_total",
        "counter",
        TABLE | {"result": ("hit", "useful", "late", "wasted")},
        "Prefetched n-grams: there already; read and then looked up; looked up before they were "
        "read; read and evicted unused.",
    ),
    Family(
        "engram_promotions_total",
        "counter",
        TABLE | {"to": ("ram",), "result": ("kept", "refused")},
        "N-grams that were read, by whether the tier had room for them.",
    ),
    Family(
        "engram_evictions_total",
        "counter",
        TABLE | RAM | {"reason": ("unused", "once", "cold")},
        "N-grams evicted: prefetched and never used; not come back while new; not come back since.",
    ),
    Family("engram_tier_capacity_bytes", "gauge", RAM, "Memory of a tier, directories included."),
    Family(
        "engram_tier_used_bytes",
        "gauge",
        TABLE | {"tier": ("ram", "ssd")},
        "What of a tier holds n-grams of a table; of the SSD, the table's file.",
    ),
    Family(
        "engram_tier_pinned_bytes",
        "gauge",
        RAM,
        "What was evicted and waits until no reader can hold it.",
    ),
    Family(
        "engram_oldest_epoch_age_seconds",
        "gauge",
        {},
        "How long the reader that has held slots longest has kept them from being used again.",
    ),
    Family(
        "engram_shm_segment_bytes",
        "gauge",
        {"purpose": ("slab", "directory", "staging", "reader", "manifest")},
        "Memory shared with clients.",
    ),
    Family(
        "engram_store_free_bytes", "gauge", TABLE, "Free on the file system that a table is on."
    ),
    Family("engram_clients", "gauge", {}, "Connections that lookups come over."),
    Family("engram_leases", "gauge", {}, "Clients that are attached to shared memory."),
    Family("engram_leases_max", "gauge", {}, "Clients that may be attached at once."),
    Family(
        "engram_lease_ends_total",
        "counter",
        {"reason": ("closed", "protocol", "stopped")},
        "Leases that ended: by the client or its death, because it broke the protocol, or with "
        "the sidecar.",
    ),
)
