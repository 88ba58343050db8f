"""Draw the results of `bench_decode.py`: `python draw_decode.py RESULTS_DIRECTORY OUT.svg`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

WIDTH, BAR, GAP, LEFT, TOP = 720, 18, 26, 210, 54
PLOT_HEIGHT, PLOT_LEFT = 220, 60
COLOURS = {"a": "#8a8f98", "b": "#5b8def", "c": "#2a9d62", "d": "#e09f3e"}
SHADES = ("#b5651d", "#2a6f97", "#7b2d8b")
NAMES = {
    "a": "no Engram",
    "b": "small table on the GPU",
    "c": "engram, all in RAM or HBM",
    "d": "engram, a tenth in RAM",
}
Steps = dict[str, list[list[float]]]


def main(arguments: list[str]) -> None:
    """Read, draw, write."""
    if len(arguments) != 2:
        raise SystemExit(__doc__)
    folder = Path(arguments[0])
    results = json.loads((folder / "results.json").read_text())
    steps = json.loads((folder / "steps.json").read_text())
    Path(arguments[1]).write_text(draw(results, steps))


def draw(results: dict[str, Any], steps: Steps) -> str:
    """SVG: bars of tokens a second, relative to (a), and the steps of (d) by their hits."""
    facts = results["environment"]
    heading = f"Decoding with 8 B parameters on an {facts['gpu']}"
    bars, y = _bars(results["lines"], TOP)
    points, y = _steps(steps, _median(results["lines"], "random reads"), y + 20)
    body = [_text(12, 24, heading, weight="700"), *bars, *points]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" '
        f'height="{y}" font-family="system-ui, sans-serif" font-size="13" fill="#30343b">\n'
        f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _median(lines: list[dict[str, Any]], begins: str) -> float:
    found = next(line for line in lines if line["what"].startswith(begins))
    return float(found["measured"]["median"])


def _bars(lines: list[dict[str, Any]], y: float) -> tuple[list[str], float]:
    groups: dict[int, dict[str, float]] = {}
    for line in lines:
        if found := re.match(r"\((.)\) decoding, (\d+)", line["what"]):
            way, sequences = found.groups()
            groups.setdefault(int(sequences), {})[way] = line["measured"]["median"]
    parts = []
    for sequences, ways in groups.items():
        parts.append(_text(12, y + 13, _title(sequences), weight="600"))
        for way, rate in ways.items():
            y += 22
            share = rate / ways["a"]
            wide = (WIDTH - LEFT - 170) * share
            parts.append(_text(LEFT - 10, y + 13, NAMES[way], anchor="end"))
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{wide:.1f}" height="{BAR}" rx="2" '
                f'fill="{COLOURS[way]}"/>'
            )
            parts.append(_text(LEFT + wide + 8, y + 13, f"{rate:,.0f} tokens/s, {share:.0%}"))
        y += BAR + GAP
    return parts, y


def _steps(steps: Steps, rate: float, y: float) -> tuple[list[str], float]:
    """Points, and as small dashes what the step's reads take at the disk's rate."""
    parts = [
        _text(12, y, "Steps with a tenth in RAM: milliseconds, by the part of n-grams not on disk"),
        _text(12, y + 18, "points measured; dashes are the step's reads at the disk's own rate"),
    ]
    bottom = y + 36 + PLOT_HEIGHT
    most = max(ms for some in steps.values() for _, _, ms in some)
    wide = WIDTH - PLOT_LEFT - 30

    def place(hits: float, ms: float) -> tuple[float, float]:
        return PLOT_LEFT + wide * hits, bottom - PLOT_HEIGHT * min(1.0, ms / most)

    for part in range(5):
        x, _ = place(part / 4, 0)
        _, line = place(0, most * part / 4)
        parts.append(_text(x, bottom + 18, f"{part / 4:.0%}", anchor="middle"))
        parts.append(_text(PLOT_LEFT - 8, line + 4, f"{most * part / 4:,.0f}", anchor="end"))
        parts.append(
            f'<path d="M{PLOT_LEFT} {line:.1f}H{PLOT_LEFT + wide}" stroke="#e3e5e8" fill="none"/>'
        )
    for (sequences, some), shade in zip(steps.items(), SHADES, strict=False):
        for hits, rows, ms in some:
            x, at = place(hits, ms)
            _, floor = place(hits, rows / rate * 1e3)
            parts.append(f'<circle cx="{x:.1f}" cy="{at:.1f}" r="3" fill="{shade}"/>')
            parts.append(f'<path d="M{x - 4:.1f} {floor:.1f}h8" stroke="{shade}"/>')
        number = list(steps).index(sequences)
        x = PLOT_LEFT + 20 + 150 * number
        parts.append(f'<circle cx="{x}" cy="{bottom + 36:.1f}" r="4" fill="{shade}"/>')
        parts.append(_text(x + 10, bottom + 40, _title(int(sequences))))
    return parts, bottom + 56


def _title(sequences: int) -> str:
    return f"{sequences} sequence{'s' if sequences > 1 else ''}"


def _text(x: float, y: float, what: str, *, anchor: str = "start", weight: str = "400") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f"<text {place}>{what}</text>"


if __name__ == "__main__":
    main(sys.argv[1:])
