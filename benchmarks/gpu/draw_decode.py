"""Draw the results of `bench_decode.py`: `python draw_decode.py RESULTS_DIRECTORY OUT.svg`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

WIDTH, BAR, GAP, LEFT, TOP = 720, 18, 26, 210, 54
COLOURS = {"a": "#8a8f98", "b": "#5b8def", "c": "#2a9d62", "d": "#e09f3e"}
NAMES = {
    "a": "no Engram",
    "b": "small table on the GPU",
    "c": "engram, all in RAM or HBM",
    "d": "engram, a tenth in RAM",
}


def main(arguments: list[str]) -> None:
    """Read, draw, write."""
    if len(arguments) != 2:
        raise SystemExit(__doc__)
    results = json.loads((Path(arguments[0]) / "results.json").read_text())
    Path(arguments[1]).write_text(draw(results))


def draw(results: dict[str, Any]) -> str:
    """SVG: a group of bars for each number of sequences, relative to (a)."""
    groups: dict[int, dict[str, float]] = {}
    for line in results["lines"]:
        way, sequences = re.match(r"\((.)\) decoding, (\d+)", line["what"]).groups()  # type: ignore[union-attr]
        groups.setdefault(int(sequences), {})[way] = line["measured"]["median"]
    facts = results["environment"]
    parts, y = [], TOP
    for sequences, ways in groups.items():
        title = f"{sequences} sequence{'s' if sequences > 1 else ''}"
        parts.append(_text(12, y + 13, title, weight="600"))
        for way, rate in ways.items():
            y += 22
            share = rate / ways["a"]
            wide = (WIDTH - LEFT - 150) * share
            parts.append(_text(LEFT - 10, y + 13, NAMES[way], anchor="end"))
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{wide:.1f}" height="{BAR}" rx="2" '
                f'fill="{COLOURS[way]}"/>'
            )
            parts.append(_text(LEFT + wide + 8, y + 13, f"{rate:,.0f} tokens/s, {share:.0%}"))
        y += BAR + GAP
    heading = f"Decoding with 8 B parameters on an {facts['gpu']}"
    body = [_text(12, 24, heading, weight="700"), *parts]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" '
        f'height="{y}" font-family="system-ui, sans-serif" font-size="13" fill="#30343b">\n'
        f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _text(x: float, y: float, what: str, *, anchor: str = "start", weight: str = "400") -> str:
    place = f'x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}"'
    return f"<text {place}>{what}</text>"


if __name__ == "__main__":
    main(sys.argv[1:])
