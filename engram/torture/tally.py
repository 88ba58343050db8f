"""What happened in a run, added up as it is reported, and what of it is wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from engram.torture.plan import Plan

_COUNTS = ("hits", "misses", "fetches", "read_directly", "dropped")
_GPU_COUNTS = ("ngrams_on_device", "ngrams_in_place", "ngrams_staged")
_MESSAGES_KEPT = 10
_EXPECTED = {"fail": ("UnavailableError", "StreamLostError")}
_REPORTS_MIN = 10
_DESCRIPTORS_SPARE = 3
_NEVER_GROWING = ("descriptors", "private_bytes", "shared_bytes")
_BYTES_SPARE = 48 << 20
_SHARE_SPARE = 0.02


@dataclass
class Tally:
    """Figures of a run.

    Attributes:
        lookups: pieces of work that ended well; each is one to three lookups.
        rows, wrong: checked, and not as they must be.
        failed: work that raised, by class.
        slowest_s: of any piece of work.
        counts: of each client: n-grams found and missed, lookups that fetched and that read
            directly, readings in place that turned out void.
        gpu: of clients of the GPU tier alone: lookups, rows checked and wrong, lookups failed.
        gpu_counts: of each of them: its steps' n-grams by where they were.
        gpu_devices: which they used.
        starts_s, recoveries_s, fetches_s: of sidecars: start to ready, ready to attached, ready
            to the first Fetch, one for each client.
        faults: what was done, how often.
        problems: sentences; none if all is well.
        gathered: resources of the client that is never killed, at each report.
        sidecar_before, sidecar_after: resources of a sidecar all of whose clients have left, near
            its start and after the last ones left.
        sidecar_most: largest seen just before a kill.
    """

    lookups: int = 0
    rows: int = 0
    wrong: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    work: Counter[str] = field(default_factory=Counter)
    counts: dict[int, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    gpu: Counter[str] = field(default_factory=Counter)
    gpu_counts: dict[int, dict[str, int]] = field(default_factory=dict)
    gpu_devices: set[str] = field(default_factory=set)
    starts_s: list[float] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    fetches_s: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    gathered: list[dict[str, int]] = field(default_factory=list)
    sidecar_before: dict[str, int] = field(default_factory=dict)
    sidecar_after: dict[str, int] = field(default_factory=dict)
    sidecar_most: dict[str, int] = field(default_factory=dict)
    shared_memory: tuple[int, int] = (0, 0)

    def worked(self, told: dict[str, Any]) -> None:
        """Add a client's report of one piece of work."""
        self.rows += told["rows"]
        self.wrong += told["wrong"]
        self.slowest_s = max(self.slowest_s, told["seconds"])
        self.work[told["what"]] += 1
        self.counts[told["client"]] = {name: told.get(name, 0) for name in _COUNTS}
        if "device" in told:
            self._worked_on_device(told)
        if failed := told.get("failed"):
            self.failed[failed.partition(":")[0]] += 1
            if len(self.messages) < _MESSAGES_KEPT:
                self.messages.append(f"{told['what']}: {failed}")
        else:
            self.lookups += 1

    def _worked_on_device(self, told: dict[str, Any]) -> None:
        self.gpu_devices.add(told["device"])
        self.gpu_counts[told["client"]] = {name: told[name] for name in _GPU_COUNTS}
        self.gpu["rows_checked"] += told["rows"]
        self.gpu["rows_wrong"] += told["wrong"]
        self.gpu["lookups_failed" if "failed" in told else "lookups"] += 1

    def forget(self) -> None:
        """After a rehearsal: what was wrong stays, what took long does not count."""
        self.slowest_s = 0.0
        self.faults.clear()
        for times in (self.gathered, self.starts_s, self.recoveries_s, self.fetches_s):
            times.clear()

    def at_most(self, resources: dict[str, int]) -> None:
        """Note what a sidecar had just before it was killed."""
        for name, amount in resources.items():
            self.sidecar_most[name] = max(amount, self.sidecar_most.get(name, 0))

    def judge(self, plan: Plan) -> None:
        """Add what is wrong with the figures to `problems`."""
        if self.wrong:
            self.problems.append(f"{self.wrong:,} rows were wrong")
        if not self.rows:
            self.problems.append("no row was checked")
        if plan.gpu_clients and not self.gpu["rows_checked"]:
            self.problems.append("no row of the GPU tier was checked")
        for name, count in self.failed.items():
            if name not in _EXPECTED.get(plan.on_unavailable, ()):
                self.problems.append(f"{count:,} lookups failed with {name}")
        late = [each for each in self.recoveries_s if each > plan.recovery_s_max]
        if late:
            self.problems.append(
                f"{len(late)} clients were attached only {max(late):.2f} s after the sidecar "
                f"was ready; {plan.recovery_s_max} s are allowed"
            )
        self._judge_growth("a sidecar", self.sidecar_before, self.sidecar_after)
        first, last = self._quarters()
        if first:
            self._judge_growth("a client", first, last)

    def _quarters(self) -> tuple[dict[str, int], dict[str, int]]:
        """The least that the longest client had, in its second and last quarter: at equal points
        of its work, since it renews its attachment and grows and shrinks in between."""
        quarter = len(self.gathered) // 4
        if quarter < _REPORTS_MIN:
            return {}, {}
        return _least(self.gathered[quarter : 2 * quarter]), _least(self.gathered[-quarter:])

    def _judge_growth(self, who: str, before: dict[str, int], after: dict[str, int]) -> None:
        for name in _NEVER_GROWING:
            spare = _BYTES_SPARE if name.endswith("bytes") else _DESCRIPTORS_SPARE
            if after.get(name, 0) > before.get(name, 0) * (1 + _SHARE_SPARE) + spare:
                self.problems.append(
                    f"{who} gathered {name.replace('_', ' ')}: {before[name]:,} at first, "
                    f"{after[name]:,} in the end"
                )

    def facts(self, plan: Plan) -> dict[str, Any]:
        """Everything, for printing."""
        first, last = self._quarters()
        return {
            "sound": not self.problems,
            "plan": {name: value for name, value in asdict(plan).items() if name != "table"},
            "problems": self.problems,
            "rows_checked": self.rows,
            "rows_wrong": self.wrong,
            "lookups": self.lookups,
            "lookups_failed": dict(self.failed),
            "messages": self.messages,
            "work": dict(self.work.most_common()),
            "counts": _total(self.counts),
            "gpu": self._gpu_facts(),
            "slowest_s": round(self.slowest_s, 3),
            "faults": dict(self.faults),
            "sidecar_start_s": _spread(self.starts_s),
            "recovery_s": _spread(self.recoveries_s),
            "first_fetch_s": _spread(self.fetches_s),
            "sidecar_first": self.sidecar_before,
            "sidecar_last": self.sidecar_after,
            "sidecar_most": self.sidecar_most,
            "client_early": first,
            "client_late": last,
            "shared_memory_bytes": list(self.shared_memory),
        }

    def _gpu_facts(self) -> dict[str, Any]:
        if not self.gpu_devices:
            return {}
        return {"devices": sorted(self.gpu_devices), **self.gpu, **_total(self.gpu_counts)}


def _total(counts: dict[int, dict[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for each in counts.values():
        total.update(each)
    return dict(total)


def _least(reports: list[dict[str, int]]) -> dict[str, int]:
    return {name: min(report[name] for report in reports) for name in reports[0]}


def _spread(times: list[float]) -> dict[str, float]:
    if not times:
        return {"count": 0}
    return {
        "count": len(times),
        "median": round(float(np.median(times)), 3),
        "p99": round(float(np.quantile(times, 0.99)), 3),
        "worst": round(max(times), 3),
    }
