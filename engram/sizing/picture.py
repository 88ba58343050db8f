"""The curve of a plan as a picture: SVG, drawn by hand, to be pasted anywhere."""

from __future__ import annotations

import math
from html import escape

from engram.sizes import format_size
from engram.sizing.plan import Plan

WIDTH, HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 76, 64
_OURS, _PAGES, _MARK, _GRID = "#2a6f97", "#b5651d", "#2a9d62", "#e3e5e8"
_Y_PARTS = 5


def draw(plan: Plan) -> str:
    """SVG: hits by memory, of the RAM tier and of a page cache; targets, and the size now."""
    sizes = [step.ram_bytes for step in plan.steps]
    now = plan.choices[0]
    low = math.log2(min([*sizes, now.ram_bytes]))
    high = max(math.log2(max([*sizes, now.ram_bytes])), low + 1)

    def place(size: int, hits: float) -> tuple[float, float]:
        part = (math.log2(size) - low) / (high - low)
        x = _LEFT + part * (WIDTH - _LEFT - _RIGHT)
        return x, HEIGHT - _BOTTOM - hits * (HEIGHT - _TOP - _BOTTOM)

    ours = [place(step.ram_bytes, step.hits) for step in plan.steps]
    pages = [place(step.ram_bytes, step.page_cache_hits) for step in plan.steps]
    parts = [
        _text(12, 24, f"Hits by memory: {escape(plan.table)}", weight="700"),
        _text(12, 44, f"{plan.tokens:,} tokens; at most {plan.most_hits:.1%} of n-grams come back"),
        *_grid(low, high),
        _line(pages, _PAGES),
        _line(ours, _OURS),
    ]
    for target in plan.targets:
        if target.ram_bytes:
            x, y = place(max(target.ram_bytes, round(2**low)), target.hits)
            label = f"{target.hits:.0%}: {format_size(target.ram_bytes)}"
            parts += [_dot(x, y, _OURS), _text(x + 8, y + 16, label)]
    x, y = place(now.ram_bytes, now.hits)
    beyond = x > WIDTH * 0.7
    label = f"now: {format_size(now.ram_bytes)}, {now.hits:.1%}"
    parts += [_dot(x, y, _MARK), _text(x - 8 if beyond else x + 8, y + 16, label, "end" * beyond)]
    parts += _legend()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="13" fill="#30343b">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _grid(low: float, high: float) -> list[str]:
    parts = []
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for part in range(_Y_PARTS + 1):
        y = bottom - part / _Y_PARTS * (bottom - _TOP)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="{_GRID}" fill="none"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{part / _Y_PARTS:.0%}", "end"))
    every = max(1, math.ceil((high - low) / 8))
    for power in range(math.ceil(low), math.floor(high) + 1, every):
        x = _LEFT + (power - low) / (high - low) * (right - _LEFT)
        parts.append(f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="{_GRID}" fill="none"/>')
        parts.append(_text(x, bottom + 18, format_size(2**power), "middle"))
    return parts


def _legend() -> list[str]:
    y = HEIGHT - 16
    return [
        f'<path d="M{_LEFT} {y - 4}h24" stroke="{_OURS}" stroke-width="2"/>',
        _text(_LEFT + 30, y, "RAM tier"),
        f'<path d="M{_LEFT + 120} {y - 4}h24" stroke="{_PAGES}" stroke-width="2"/>',
        _text(_LEFT + 150, y, "page cache of that size"),
    ]


def _line(points: list[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'


def _text(x: float, y: float, what: str, anchor: str = "", weight: str = "400") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor or "start"}" font-weight="{weight}"'
    return f"<text {place}>{what}</text>"
