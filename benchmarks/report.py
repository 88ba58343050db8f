"""What every benchmark gives back: figures beside a limit or a peer of the same run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing."""

    median: float
    least: float
    greatest: float
    runs: int

    @classmethod
    def of(cls, values: list[float]) -> Samples:
        return cls(float(np.median(values)), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{_number(self.median)} ({_number(self.least)}-{_number(self.greatest)})"


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        bar: what must be reached, in words; empty where a line only informs.
        reached: whether it was; None where there is no bar.
        checksum: of what was computed, so that nobody wins by computing less.
    """

    what: str
    unit: str
    measured: Samples
    peer: str = ""
    peer_measured: Samples | None = None
    ratio: float | None = None
    bar: str = ""
    reached: bool | None = None
    checksum: str = ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def environment() -> dict[str, Any]:
    """What the figures depend on: processor, memory, kernel, versions, commit."""
    import grpc
    import lmdb
    import numba

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "engram", "store", "service", "proto", "benchmarks"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": commit.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "huge_pages": _huge_pages(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "lmdb": ".".join(map(str, lmdb.version())),
        "grpcio": grpc.__version__,
    }


def _huge_pages() -> str:
    """For private and for shared memory, as the kernel is set."""
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    chosen = []
    for name in ("enabled", "shmem_enabled"):
        file = folder / name
        words = file.read_text() if file.exists() else "[unknown]"
        chosen.append(f"{name} {words.split('[')[1].split(']')[0]}")
    return ", ".join(chosen)


def show(lines: list[Line]) -> None:
    """Print one paragraph a line: what, measured, beside it, verdict, checksum."""
    for line in lines:
        print(f"\n{line.what}")
        print(f"  measured  {line.measured} {line.unit}, {line.measured.runs} runs")
        if line.peer_measured:
            print(f"  beside    {line.peer}: {line.peer_measured} {line.unit}")
        if line.ratio is not None:
            print(f"  ratio     {line.ratio:.2f}")
        if line.bar:
            print(f"  bar       {line.bar}: {'reached' if line.reached else 'MISSED'}")
        if line.checksum:
            print(f"  checksum  {line.checksum}")
    sys.stdout.flush()


def save(
    directory: Path, command: str, lines: list[Line], facts: dict[str, Any] | None = None
) -> None:
    """Write `results.json` and `results.md` into `directory`; `facts` go beside the environment."""
    directory.mkdir(parents=True, exist_ok=True)
    facts = environment() | (facts or {})
    body = {"command": command, "environment": facts, "lines": [asdict(line) for line in lines]}
    (directory / "results.json").write_text(json.dumps(body, indent=1) + "\n")
    text = [f"Command: `{command}`", "", *(f"- {name}: {facts[name]}" for name in facts), ""]
    text += [
        "Median (least-greatest). Ratios are medians of the ratios of runs that took turns.",
        "",
    ]
    text += [
        "| what | measured | unit | beside it | ratio | bar | |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        beside = f"{line.peer}: {line.peer_measured}" if line.peer_measured else line.peer
        verdict = {None: "", True: "reached", False: "missed"}[line.reached]
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
        text.append(
            f"| {line.what} | {line.measured} | {line.unit} | {beside} | {ratio} | {line.bar} "
            f"| {verdict} |"
        )
    text += ["", *(f"- checksum `{x.checksum}`: {x.what}" for x in lines if x.checksum)]
    (directory / "results.md").write_text("\n".join(text) + "\n")
