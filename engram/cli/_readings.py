"""Readings of a sidecar's metrics, and what happened between two of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isinf
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import Metric

_Key = tuple[str, tuple[tuple[str, str], ...]]
TIERS = ("gpu", "ram", "ssd")


@dataclass(frozen=True)
class Reading:
    """All samples of one moment.

    Attributes:
        at: when, of the monotonic clock.
        samples: by name and sorted labels.
    """

    at: float
    samples: Mapping[_Key, float]

    @classmethod
    def of(cls, metrics: Iterable[Metric], at: float | None = None) -> Reading:
        """What `read_metrics` gave."""
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
            for metric in metrics
            for sample in metric.samples
        }
        return cls(time.monotonic() if at is None else at, samples)

    def total(self, name: str, **labels: str) -> float:
        """Sum of all samples of that name with these labels, whatever others they have."""
        wanted = labels.items()
        return sum(
            value
            for (other, pairs), value in self.samples.items()
            if other == name and wanted <= dict(pairs).items()
        )

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """As `total`, by the values of one label."""
        found: dict[str, float] = {}
        for (other, pairs), value in self.samples.items():
            given = dict(pairs)
            if other == name and label in given and labels.items() <= given.items():
                found[given[label]] = found.get(given[label], 0.0) + value
        return found

    @property
    def life(self) -> float:
        """The same in all readings of one life of the sidecar."""
        return self.total("process_start_time_seconds")


def between(before: Reading, now: Reading) -> Reading:
    """What was counted from `before` to `now`, never less than nothing.

    A counter that is smaller than it was, or of another life of the sidecar, began again at 0, so
    all that it shows was counted since.
    """
    again = before.life != now.life
    counted = {}
    for key, value in now.samples.items():
        was = 0.0 if again else before.samples.get(key, 0.0)
        counted[key] = value - was if value >= was else value
    return Reading(now.at, counted)


def quantile(buckets: Mapping[str, float], part: float) -> float | None:
    """The bound that at least `part` of what a histogram counted is within; None of nothing.

    Args:
        buckets: cumulative counts by bound.
    """
    bounds = sorted((float(bound), count) for bound, count in buckets.items())
    counted = bounds[-1][1] if bounds else 0.0
    if not counted:
        return None
    bound = next(bound for bound, count in bounds if count >= part * counted)
    return None if isinf(bound) else bound


def share(part: float, whole: float) -> float | None:
    """None of nothing."""
    return part / whole if whole else None


def view(before: Reading, now: Reading) -> dict[str, Any]:
    """What `engram top` shows: what is, and what happened a second between two readings."""
    seconds = max(now.at - before.at, 1e-9)
    counted = between(before, now)
    capacity = now.by("engram_tier_capacity_bytes", "tier")
    used = now.by("engram_tier_used_bytes", "tier")
    pinned = now.by("engram_tier_pinned_bytes", "tier")
    rejected = counted.by("engram_requests_rejected_total", "reason")
    tables = [_table(name, counted, now, seconds) for name in _names(now)]
    return {
        "interval_seconds": seconds,
        "restarted": before.life != now.life,
        "version": _label(now, "engram_build_info", "version"),
        "tables": sorted(tables, key=lambda table: -sum(table["ngrams_per_second"].values())),
        "tiers": {
            tier: {
                "capacity_bytes": capacity.get(tier),
                "used_bytes": used.get(tier, 0.0),
                "pinned_bytes": pinned.get(tier, 0.0),
            }
            for tier in ("ram", "ssd")
        },
        "clients": now.total("engram_clients"),
        "leases": now.total("engram_leases"),
        "lease_ends_per_second": counted.total("engram_lease_ends_total") / seconds,
        "rejected_per_second": {reason: count / seconds for reason, count in rejected.items()},
        "oldest_epoch_age_seconds": now.total("engram_oldest_epoch_age_seconds"),
    }


def _names(now: Reading) -> list[str]:
    return list(now.by("engram_table_info", "table"))


def _label(now: Reading, name: str, label: str, **labels: str) -> str:
    return next(iter(now.by(name, label, **labels)), "")


def _table(name: str, counted: Reading, now: Reading, seconds: float) -> dict[str, Any]:
    def rates(metric: str, label: str) -> dict[str, float]:
        found = counted.by(metric, label, table=name)
        return {value: count / seconds for value, count in found.items()}

    served = rates("engram_ngrams_served_total", "tier")
    states = now.by("engram_table_state", "state", table=name)
    lookup, read = "engram_lookup_duration_seconds", "engram_ssd_read_duration_seconds"
    buckets = counted.by(f"{lookup}_bucket", "le", table=name)
    read_s = counted.total(f"{read}_sum", table=name)
    prefetched = rates("engram_prefetch_ngrams_total", "result")
    used = prefetched.get("useful", 0.0)
    ended = used + prefetched.get("late", 0.0) + prefetched.get("wasted", 0.0)
    return {
        "name": name,
        "fingerprint": _label(now, "engram_table_info", "fingerprint", table=name),
        "state": max(states, key=lambda state: states[state], default=""),
        "used_bytes": now.by("engram_tier_used_bytes", "tier", table=name),
        "ngrams_per_second": served,
        "share": {tier: share(rate, sum(served.values())) for tier, rate in served.items()},
        "miss_seconds": {
            "mean": share(
                counted.total(f"{lookup}_sum", table=name),
                counted.total(f"{lookup}_count", table=name),
            ),
            "half_within": quantile(buckets, 0.5),
            "99_percent_within": quantile(buckets, 0.99),
        },
        "ssd_reads_per_second": counted.total(f"{read}_count", table=name) / seconds,
        # All that reads took, by the time in which they did, is how many there were at once.
        "ssd_reads_in_flight": read_s / seconds,
        "ssd_read_bytes_per_second": counted.total("engram_ssd_read_bytes_total", table=name)
        / seconds,
        "prefetch_ngrams_per_second": prefetched,
        "prefetch_useful_share": share(used, ended),
        "evictions_per_second": rates("engram_evictions_total", "reason"),
        "failed_rows_per_second": rates("engram_rows_failed_total", "reason"),
        "integrity_errors": now.total("engram_integrity_errors_total", table=name),
    }
