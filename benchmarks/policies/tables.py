"""The simulation's figures as tables, and as a plot where matplotlib is installed."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

Figures = list[dict[str, Any]]


def _table(found: Figures, value: str, digits: int) -> list[str]:
    """Policies down, capacities across."""
    sizes = sorted({each["gib"] for each in found})
    names = list(dict.fromkeys(each["policy"] for each in found))
    cells = {(each["policy"], each["gib"]): each[value] for each in found}
    lines = [
        "| | " + " | ".join(f"{size * 1024:g} MiB" for size in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for name in names:
        row = " | ".join(f"{cells[name, size]:.{digits}f}" for size in sizes)
        lines.append(f"| {name} | {row} |")
    return [*lines, ""]


def _by_trace(found: Figures) -> dict[str, Figures]:
    names = dict.fromkeys(each["trace"] for each in found)
    return {name: [each for each in found if each["trace"] == name] for name in names}


def _texts(body: dict[str, Any]) -> list[str]:
    lines = []
    for kind, facts in body["texts"].items():
        lines.append(f"- {kind}: {facts['documents']:,} documents of " + ", ".join(facts["places"]))
    lines += [
        "",
        "| trace | tokens | batches | accesses | n-grams | never seen before, second half |",
        "|---|---|---|---|---|---|",
    ]
    for name, facts in body["traces"].items():
        lines.append(
            f"| {name} | {facts['tokens']:,} | {facts['batches']:,} | {facts['accesses']:,} "
            f"| {facts['ngrams']:,} | {facts['ngrams_late_first']:.4f} |"
        )
    return [*lines, ""]


def _costs(found: Figures) -> list[str]:
    lines = ["| | touched counts suffice | bytes a slot |", "|---|---|---|"]
    for each in found:
        possible = "yes" if each["possible"] else "no: every hit, in order"
        lines.append(f"| {each['policy']} | {possible} | {each['slot_bytes']:.3g} |")
    return [*lines, ""]


def _page_cache(found: Figures) -> list[str]:
    lines = [
        "| trace | page cache | its rows missed | chosen policy needs | LRU needs | less |",
        "|---|---|---|---|---|---|",
    ]
    for each in found:
        less = each["page_cache_gib"] / each["least_gib"]
        lines.append(
            f"| {each['trace']} | {each['page_cache_gib']:g} GiB | {each['miss']:.4f} "
            f"| {each['least_gib']:.3f} GiB | {each['lru_gib']:.3f} GiB | {less:.1f}x |"
        )
    return [*lines, ""]


def markdown(body: dict[str, Any]) -> str:
    """All figures, as text."""
    facts = body["environment"]
    lines = [
        f"Command: `{body['command']}`",
        "",
        *(f"- {name}: {facts[name]}" for name in facts),
        "",
    ]
    lines += ["## Texts", "", *_texts(body)]
    lines += [
        "## Policies",
        "",
        "What each needs: whether a count of touches, read when a slot is up for eviction, is all",
        "it must see of hits; and its own memory, ghosts as fingerprints included.",
        "",
        *_costs(body["costs"]),
        "Misses of n-gram accesses in the second half of the batches, each n-gram once a batch.",
        "",
    ]
    for name, found in _by_trace(body["policies"]).items():
        lines += [f"### {name}", "", *_table(found, "late", 4)]
    lines += ["Rows missed per token, of 48, over the same half.", ""]
    for name, found in _by_trace(body["policies"]).items():
        lines += [f"### {name}, rows", "", *_table(found, "rows_late", 2)]
    lines += [
        "## Beside the OS page cache",
        "",
        "Pages of 4 KiB with 15 rows each, exact LRU; RAM for bundles and their slot heads at",
        "which no more rows are missed, second half of the batches.",
        "",
        *_page_cache(body["page_cache"]),
    ]
    titles = {
        "variants": "Parameters",
        "circumstances": "Hits noted in part, and everything prefetched",
        "batches": "Batch sizes",
    }
    for part, title in titles.items():
        for name, found in _by_trace(body[part]).items():
            lines += [f"## {title}: {name}", "", *_table(found, "late", 4)]
    return "\n".join(lines)


def save(folder: Path, body: dict[str, Any]) -> None:
    """Write `results.json`, `results.md`, and `curves.svg` where it can be drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(body, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(body) + "\n")
    try:
        import_module("matplotlib").use("svg")
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed")
        return
    _plot(folder / "curves.svg", body["policies"])


def _plot(path: Path, found: Figures) -> None:
    """Miss ratio curves, one panel a trace."""
    pyplot = import_module("matplotlib.pyplot")
    runs = _by_trace(found)
    figure, panels = pyplot.subplots(1, len(runs), figsize=(5 * len(runs), 5), squeeze=False)
    for panel, (name, outcomes) in zip(panels[0], runs.items(), strict=True):
        for policy in dict.fromkeys(each["policy"] for each in outcomes):
            points = [(each["gib"], each["late"]) for each in outcomes if each["policy"] == policy]
            panel.plot(*zip(*points, strict=True), label=policy, marker=".")
        panel.set_xscale("log", base=2)
        panel.set(title=name, xlabel="GiB", ylabel="misses, second half")
    panels[0][-1].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path)
