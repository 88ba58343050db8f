"""What `engram top` shows, for a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_NAME_WIDTH_MAX = 18
_NOTHING = "-"


def screen(target: str, shown: Mapping[str, Any] | None, trouble: str = "") -> RenderableType:
    """All that is known of the sidecar at `target`.

    Args:
        shown: as `engram.cli._readings.view` gives it; None while there is nothing to compare.
        trouble: why this is not the state of now, if it is not.
    """
    lines: list[RenderableType] = [Text(f"engram at {target}", style="bold")]
    if trouble:
        lines.append(Text(trouble, style="bold red"))
    if shown is None:
        return Group(*lines, *([] if trouble else [Text("reading")]))
    if trouble:
        lines.append(Text("what follows is from before:", style="red"))
    elif shown["restarted"]:
        lines.append(Text("the sidecar was restarted; its counters began again", style="yellow"))
    rejected = sum(shown["rejected_per_second"].values())
    said = (
        f"version {shown['version']}   over {shown['interval_seconds']:.1f} s   "
        f"clients {shown['clients']:.0f}   leases {shown['leases']:.0f}   "
        f"rejected {_rate(rejected)}/s"
    )
    lines.append(Text(said))
    if shown["oldest_epoch_age_seconds"] >= 1:
        held = shown["oldest_epoch_age_seconds"]
        lines.append(Text(f"a reader has kept what it reads for {held:.0f} s", style="yellow"))
    tables = shown["tables"]
    lines += [_tiers(shown["tiers"]), _hits(tables), _disk(tables), _prefetch(tables)]
    return Group(*(part for line in lines for part in (line, Text(""))))


def _grid(*columns: str) -> Table:
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    grid.add_column(
        columns[0], no_wrap=True, overflow="ellipsis", max_width=_NAME_WIDTH_MAX, style="bold"
    )
    for column in columns[1:]:
        grid.add_column(column, justify="right", no_wrap=True)
    return grid


def _tiers(tiers: Mapping[str, Any]) -> Table:
    grid = _grid("tier", "capacity", "used", "of it", "waits for readers")
    for name, tier in tiers.items():
        capacity, used = tier["capacity_bytes"], tier["used_bytes"]
        grid.add_row(
            name,
            _bytes(capacity),
            _bytes(used),
            _percent(used / capacity if capacity else None),
            _bytes(tier["pinned_bytes"]) if capacity else _NOTHING,
        )
    return grid


def _hits(tables: list[dict[str, Any]]) -> Table:
    grid = _grid("n-grams/s", "gpu", "ram", "ssd", "gpu %", "ram %", "ssd %", "state")
    for table in tables:
        rates, shares = table["ngrams_per_second"], table["share"]
        grid.add_row(
            Text(table["name"]),
            *(_rate(rates.get(tier, 0.0)) for tier in ("gpu", "ram", "ssd")),
            *(_percent(shares.get(tier)) for tier in ("gpu", "ram", "ssd")),
            table["state"],
        )
    return grid


def _disk(tables: list[dict[str, Any]]) -> Table:
    grid = _grid("disk", "miss mean", "99 % in", "reads/s", "at once", "bytes/s", "wrong rows")
    for table in tables:
        seconds, damaged = table["miss_seconds"], table["integrity_errors"]
        grid.add_row(
            Text(table["name"]),
            _seconds(seconds["mean"]),
            _seconds(seconds["99_percent_within"]),
            _rate(table["ssd_reads_per_second"]),
            f"{table['ssd_reads_in_flight']:.1f}",
            _bytes(table["ssd_read_bytes_per_second"]),
            Text(f"{damaged:.0f}", style="bold red" if damaged else ""),
        )
    return grid


def _prefetch(tables: list[dict[str, Any]]) -> Table:
    grid = _grid("prefetched/s", "useful", "late", "wasted", "useful %", "evicted/s", "in RAM")
    for table in tables:
        rates = table["prefetch_ngrams_per_second"]
        grid.add_row(
            Text(table["name"]),
            *(_rate(rates.get(result, 0.0)) for result in ("useful", "late", "wasted")),
            _percent(table["prefetch_useful_share"]),
            _rate(sum(table["evictions_per_second"].values())),
            _bytes(table["used_bytes"].get("ram", 0.0)),
        )
    return grid


def _rate(rate: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= factor:
            return f"{rate / factor:.1f}{unit}"
    return f"{rate:.0f}" if rate >= 10 or not rate else f"{rate:.1f}"


def _percent(share: float | None) -> str:
    return _NOTHING if share is None else f"{100 * share:.1f}"


def _bytes(size: float | None) -> str:
    from engram.sizes import format_size

    return _NOTHING if size is None else format_size(int(size))


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return _NOTHING
    return f"{1000 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.2g} s"
