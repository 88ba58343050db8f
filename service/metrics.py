"""The metrics of a sidecar in OpenMetrics' words, read from its counters when somebody asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from math import isinf
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from engram import __version__
from engram._counters import SECONDS, Histogram
from engram.proto.v1 import engram_pb2 as pb
from engram.ram.layout import ABI
from engram.ram.tier import RamTier
from engram.service._families import FAMILIES, STATES, Family
from engram.service.attach import AttachServer
from engram.service.servicer import Servicer
from engram.ssd import SsdTier

_Labels = tuple[str, ...]
_Samples = dict[str, dict[_Labels, Any]]
_FOUND_AT_START = ("engram_rows_failed_total", "engram_integrity_errors_total")
"""Counters that do not begin at 0 where the first reads, which warm tables up, found damage."""


class Metrics:
    """Reads everything at every scrape. Safe to use from several threads.

    Args:
        tiers: by the name under which each is served, warmed up: what that read counts for nobody.
        attach: whose leases are counted.
        servicer: whose requests are counted.
    """

    def __init__(
        self, tiers: Mapping[str, RamTier], attach: AttachServer, servicer: Servicer
    ) -> None:
        self._tiers = dict(tiers)
        self._caches = {id(tier.cache): tier.cache for tier in tiers.values()}.values()
        self._attach = attach
        self._servicer = servicer
        self._versions = (__version__, pb.DESCRIPTOR.package, str(ABI), version("lmdb"))
        before = self._samples()
        counted = [each.name for each in FAMILIES if each.kind in ("counter", "histogram")]
        self._before = {name: before[name] for name in counted if name not in _FOUND_AT_START}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self, accept: str) -> tuple[bytes, str]:
        """All metrics, and their media type.

        Args:
            accept: what the client takes, as its header says.
        """
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind

    def collect(self) -> Iterator[Metric]:
        """As `prometheus_client.registry.Collector`."""
        samples = self._samples()
        for family in FAMILIES:
            before = self._before.get(family.name, {})
            yield _metric(family, samples[family.name], before)

    def _samples(self) -> _Samples:
        samples: _Samples = {family.name: {} for family in FAMILIES}

        def put(name: str, value: Any, *labels: str) -> None:
            samples[f"engram_{name}"][labels] = value

        put("build_info", 1, *self._versions)
        for name, tier in self._tiers.items():
            put("table_info", 1, name, tier.fingerprint)
            now = STATES[self._servicer.draining]
            for state in STATES:
                put("table_state", int(state == now), name, state)
            _put_readers(put, name, tier)
            _put_misses(put, name, tier)
            _put_cache(put, name, tier)
            _put_store(put, name, tier)
        for (name, method), sizes in self._servicer.traffic.sizes.items():
            put("request_ngrams", sizes.read(), name, method)
        for reason, count in self._servicer.traffic.rejected.read().items():
            put("requests_rejected_total", count, reason)
        self._put_memory(put)
        put("clients", self._servicer.clients)
        leases = self._attach.stats()
        put("leases", leases["leases"])
        put("leases_max", self._attach.leases_max)
        for reason in ("closed", "protocol", "stopped"):
            put("lease_ends_total", leases[f"ended_{reason}"], reason)
        return samples

    def _put_memory(self, put: Any) -> None:
        found = [(cache, cache.memory_stats()) for cache in self._caches]
        total = {name: sum(stats[name] for _, stats in found) for name in found[0][1]}
        shared = [stats for cache, stats in found if cache.shared]
        put("tier_capacity_bytes", total["slab_bytes"] + total["directory_bytes"], "ram")
        put("tier_pinned_bytes", total["limbo_bytes"], "ram")
        put("oldest_epoch_age_seconds", max(stats["oldest_epoch_age_s"] for _, stats in found))
        for purpose in ("slab", "directory"):
            size = sum(stats[f"{purpose}_bytes"] for stats in shared)
            put("shm_segment_bytes", size, purpose)
        for purpose, size in self._attach.memory_stats().items():
            put("shm_segment_bytes", size, purpose)


def _put_readers(put: Any, name: str, tier: RamTier) -> None:
    counts = tier.cache.counts(tier.number)
    lacked = counts["misses"] + counts["staged"]
    put("ngrams_served_total", counts["on_device"], name, "gpu")
    put("ngrams_served_total", counts["hits"] + counts["in_place"], name, "ram")
    put("ngrams_served_total", lacked, name, "ssd")
    put("ngrams_requested_total", lacked, name, "raw")
    put("gpu_ngrams_total", counts["on_device"], name, "device")
    put("gpu_ngrams_total", counts["in_place"], name, "arena")
    put("gpu_ngrams_total", counts["staged"], name, "staging")


def _put_misses(put: Any, name: str, tier: RamTier) -> None:
    counts = tier.misses.counters.read()
    rows = tier.bundle.layers * tier.bundle.heads
    put("ngrams_requested_total", counts["ngrams_asked"], name, "unique")
    put("lookup_duration_seconds", tier.misses.seconds.read(), name, "ssd")
    put("prefetch_ngrams_total", counts["prefetched_present"], name, "hit")
    put("prefetch_ngrams_total", counts["prefetched_late"], name, "late")
    put("rows_failed_total", counts["ngrams_late"] * rows, name, "deadline")
    put("rows_failed_total", counts["ngrams_refused"] * rows, name, "overload")


def _put_cache(put: Any, name: str, tier: RamTier) -> None:
    counts = tier.cache.table_stats(tier.number)
    put("prefetch_ngrams_total", counts["prefetched_useful"], name, "useful")
    put("prefetch_ngrams_total", counts["prefetched_wasted"], name, "wasted")
    put("promotions_total", counts["admitted"], name, "ram", "kept")
    put("promotions_total", counts["not_admitted"], name, "ram", "refused")
    put("tier_used_bytes", counts["held_bytes"], name, "ram")
    for reason in ("unused", "once", "cold"):
        put("evictions_total", counts[f"evicted_{reason}"], name, "ram", reason)


def _put_store(put: Any, name: str, tier: RamTier) -> None:
    """Zeros where a table is not one on disk."""
    failed, store, seconds = dict[str, int](), dict[str, int](), Histogram(SECONDS)
    if isinstance(tier.backing, SsdTier):
        failed, store = tier.backing.rows_failed(), tier.backing.store_stats()
        seconds = tier.backing.read_seconds
    kinds = {kind: failed.get(kind, 0) for kind in ("damaged", "short", "hole", "io")}
    put("rows_failed_total", kinds["io"] + kinds["short"] + kinds["hole"], name, "io")
    put("rows_failed_total", kinds["damaged"], name, "check")
    for kind in ("damaged", "short", "hole"):
        put("integrity_errors_total", kinds[kind], name, kind)
    put("ssd_read_duration_seconds", seconds.read(), name)
    put("ssd_read_bytes_total", store.get("read_bytes", 0), name)
    put("tier_used_bytes", store.get("file_bytes", 0), name, "ssd")
    put("store_free_bytes", store.get("free_bytes", 0), name)


def _metric(
    family: Family, samples: Mapping[_Labels, Any], before: Mapping[_Labels, Any]
) -> Metric:
    labels = tuple(family.labels)
    if family.kind == "info":
        info = InfoMetricFamily(family.name.removesuffix("_info"), family.meaning)
        for values in samples:
            info.add_metric([], dict(zip(labels, values, strict=True)))
        return info
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(
            family.name, family.meaning, labels=labels, unit=_unit(family.name)
        )
        for values, (buckets, total) in samples.items():
            buckets_before, total_before = before.get(values, ([], 0.0))
            less = [count for _, count in buckets_before] or [0] * len(buckets)
            counted = [
                (_bound(bound), count - was)
                for (bound, count), was in zip(buckets, less, strict=True)
            ]
            histogram.add_metric(values, counted, total - total_before)
        return histogram
    if family.kind == "counter":
        name = family.name.removesuffix("_total")
        counter = CounterMetricFamily(name, family.meaning, labels=labels, unit=_unit(name))
        for values, count in samples.items():
            counter.add_metric(values, count - before.get(values, 0))
        return counter
    gauge = GaugeMetricFamily(family.name, family.meaning, labels=labels, unit=_unit(family.name))
    for values, value in samples.items():
        gauge.add_metric(values, value)
    return gauge


def _bound(bound: float) -> str:
    return "+Inf" if isinf(bound) else str(float(bound))


def _unit(name: str) -> str:
    last = name.rpartition("_")[2]
    return last if last in ("bytes", "seconds") else ""
