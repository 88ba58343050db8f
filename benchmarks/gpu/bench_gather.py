"""Embeddings on a GPU, from its own memory and from the arena in place: `bench_gather.py --help`.

Beside the rate of plain copies from host to device, and beside the layout and kernel that engines
use today. Every call reads n-grams of other random ids. GPU times are between events on the
stream, behind a kernel that keeps the GPU busy until all is queued; host times end when `prepare`
returns.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report import Line, Samples, save, show
from run import _table as make_table

import engram
from engram.bench import checksum
from engram.demo.sidecar import sidecar
from engram.gpu.launches import Room
from engram.gpu.tier import BLOCK_TOKENS
from engram.nn import EngramLookup
from engram.table import Table

COPY_BAR, PEER_BAR, STEP_BAR_US, HBM_BAR_US = 0.88, 6.0, 40, 75
HOST_BARS_US = {1: 40, 64: 100}
ROWS, BUNDLE_BYTES = 48, 16 * 264
_BUSY_CYCLES = 40_000_000
cuda: Any = torch.cuda  # parts of it have no types


def main(arguments: list[str]) -> None:
    """Parse the command line, run, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/gpu/bench_gather.py --ram 8GiB --out results/h200",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ram", default="8GiB", help="of the arena; filled before")
    parser.add_argument("--hbm", default="2GiB", help="n-grams kept on the device")
    parser.add_argument("--how", choices=("embedded", "sidecar"), default="sidecar")
    parser.add_argument("--place", type=Path, help="for the table; default: temp")
    parser.add_argument("--out", type=Path, help="directory for results.json and results.md")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.ram, options.hbm = "4MiB", "2MiB"
    lines = run(options)
    show(lines)
    if options.out:
        command = "python benchmarks/gpu/bench_gather.py " + " ".join(arguments)
        save(options.out, command, lines, device_facts(torch.device(options.device)))


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beyond the host."""
    facts: dict[str, Any] = {"torch": torch.__version__}
    if device.type == "cuda":
        import triton  # type: ignore[import-untyped, unused-ignore]

        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "triton": triton.__version__,
        }
    return facts


def _driver() -> str:
    text = Path("/proc/driver/nvidia/version")
    return text.read_text().split("  ")[1].strip() if text.exists() else "unknown"


@contextmanager
def _opened(options: argparse.Namespace, path: Path, folder: Path) -> Iterator[Table]:
    if options.how == "embedded":
        with engram.open(path, ram=options.ram, guard=True) as table:
            yield table
        return
    with (
        sidecar(folder / "engram.sock", {"table": path}, options.ram) as target,
        engram.connect(target) as table,
    ):
        yield table


def run(options: argparse.Namespace) -> list[Line]:
    """All lines, one arena for all."""
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory(dir=options.place) as name:
        folder = Path(name)
        path = make_table(folder / "table", 2_000 if options.smoke else 20_000)
        with _opened(options, path, folder) as table:
            return _measure(table, options, device)


class _Steps(Protocol):
    def step(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, starts and history of one decode step of `count` sequences."""


class _Ids:
    """Random tokens whose n-grams are all in the arena, and steps of them."""

    def __init__(self, table: Table, share: float) -> None:
        slots = self._slots(table)
        count = int(slots * share) // table.spec.num_orders
        self._rng = np.random.default_rng(1)
        size = table.spec.vocab_size
        self.ids = self._rng.integers(0, size, count).astype(np.int32)
        for _ in range(3):
            before = self._misses(table)
            for first in range(3, count, BLOCK_TOKENS):
                last = min(count, first + BLOCK_TOKENS)
                table.lookup(self.ids[first:last], None, self.ids[None, first - 3 : first])
            if self._misses(table) == before:
                break

    @staticmethod
    def _slots(table: Table) -> int:
        tier: Any = table._tier
        cache = getattr(tier, "cache", None)
        return int((cache or tier._attachments.now.lease).layout.slots)

    @staticmethod
    def _misses(table: Table) -> int:
        return (
            int(table.stats()["tiers"][-2]["misses"])
            if len(table.stats()["tiers"]) > 1
            else (int(table.stats()["tiers"][0]["misses"]))
        )

    def step(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, starts and history of one decode step of `count` sequences."""
        places = self._rng.integers(3, len(self.ids), count)
        history = np.stack([self.ids[places - back] for back in (3, 2, 1)], axis=1)
        return (
            torch.from_numpy(self.ids[places]),
            torch.arange(count + 1, dtype=torch.int32),
            torch.from_numpy(history),
        )


def _measure(table: Table, options: argparse.Namespace, device: torch.device) -> list[Line]:
    smoke = options.smoke
    ids = _Ids(table, 0.5)
    plain = EngramLookup(table, device=device, hbm=0 if device.type == "cuda" else "64KiB")
    began = time.perf_counter()
    plain(*ids.step(1))
    tier = table.on_devices[0]
    if not tier._reach.wait(120) or tier._reach.failure:
        raise SystemExit(f"the arena cannot be read in place: {tier._reach.failure}")
    lines = [
        Line(
            f"arena of {options.ram} registered, from the first call on",
            "ms",
            Samples.of([(time.perf_counter() - began) * 1e3]),
        )
    ]
    copy = _copy_rate(device, smoke)
    lines.append(Line("plain copy, host to device", "GB/s", Samples.of(copy)))
    peer = _peer(device, smoke)
    for count in (8, 64) if smoke else (64, 2048, 8192):
        lines += _in_place(tier, ids, count, copy, peer, device, 3 if smoke else 40)
    staged = tier.stats()["ngrams_staged"]
    lines += _host(plain, ids, smoke)
    lines += _hbm(table, ids, options, device)
    if table.on_devices[0].stats()["ngrams_staged"] > staged + 3:
        raise SystemExit("n-grams went through staging that should have been in the arena")
    return lines


def _copy_rate(device: torch.device, smoke: bool) -> list[float]:
    size = 1 << (20 if smoke else 28)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda").random_(0, 255)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    times = gpu_times([lambda: there.copy_(host, non_blocking=True)] * 12, device)
    return [size / us / 1e3 for us in times[2:]]


def _peer(device: torch.device, smoke: bool) -> Callable[[int, int], list[float]] | None:
    if device.type != "cuda":
        return None
    from peer_kernel import DIM, RowTables

    tables = RowTables(1 << (16 if smoke else 24), device)

    def times(count: int, runs: int) -> list[float]:
        ids = [
            torch.randint(0, tables.rows, (count * ROWS,), device=device) for _ in range(runs + 3)
        ]
        out = torch.empty((count * ROWS, DIM), dtype=torch.bfloat16, device=device)
        return gpu_times([partial(tables.read, some, out) for some in ids], device)[3:]

    return times


def gpu_times(calls: list[Callable[[], Any]], device: torch.device) -> list[float]:
    """Microseconds of each call on the current stream, all queued before the first one starts."""
    if device.type != "cuda":
        return [_host_us(call) for call in calls]
    torch.cuda.synchronize()
    cuda._sleep(_BUSY_CYCLES)
    events = [cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    events[0].record()
    for call, event in zip(calls, events[1:], strict=True):
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)]


def _host_us(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


def _gathers(tier: Any, ids: _Steps, count: int, runs: int, out: torch.Tensor) -> list[Any]:
    """Calls that gather steps whose n-grams have their addresses already."""
    calls = []
    stream = cuda.current_stream() if tier.device.type == "cuda" else None
    for _ in range(runs):
        tokens, starts, history = ids.step(count)
        windows = tier.tier.spec.batch(tokens.numpy(), starts.numpy(), history.numpy()).windows
        parts = []
        for first in range(0, count, BLOCK_TOKENS):
            block = windows[first : first + BLOCK_TOKENS]
            shape = (2, len(block), tier.plan.orders)
            pinned = tier.device.type == "cuda"
            room = torch.zeros(shape, dtype=torch.int64, pin_memory=pinned)
            in_place, reach = tier._arena()
            tier._finder.find(block, in_place, reach, Room(room, room, *room.numpy()))
            parts.append((room, out[:, first : first + len(block)]))
        calls.append(
            lambda parts=parts: [tier._gather(*part, stream, kept=False) for part in parts]
        )
    return calls


def _in_place(
    tier: Any,
    ids: _Ids,
    count: int,
    copy: list[float],
    peer: Callable[[int, int], list[float]] | None,
    device: torch.device,
    runs: int,
) -> list[Line]:
    shape = (tier.plan.layers, count, tier.plan.columns, tier.tier.row_format.dim)
    out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    epoch = tier._in_place.epochs.enter()
    try:
        calls = _gathers(tier, ids, count, runs + 3, out)
        times = gpu_times(calls, device)[3:]
    finally:
        tier._in_place.epochs.leave(epoch)
    rate = float(np.median([count * 3 * BUNDLE_BYTES / us / 1e3 for us in times]))
    share = rate / float(np.median(copy))
    beside = peer(count, runs) if peer else None
    faster = float(np.median(beside) / np.median(times)) if beside else None
    found = checksum(out.float().cpu().numpy().view(np.uint8))
    if count == 64:
        bar, reached = f"at most {STEP_BAR_US} us", float(np.median(times)) <= STEP_BAR_US
    else:
        bar = f"at least {COPY_BAR} of plain copies (it is {share:.2f}, {rate:.1f} GB/s), and "
        bar += f"{PEER_BAR} times as fast as the peer"
        reached = share >= COPY_BAR and (faster or 0) >= PEER_BAR
    return [
        Line(
            f"gathered from the arena in place, {count:,} tokens, to bf16",
            "us",
            Samples.of(times),
            "rows one by one from two pinned tables",
            Samples.of(beside) if beside else None,
            faster,
            bar,
            reached,
            found,
        )
    ]


def _host(lookup: EngramLookup, ids: _Steps, smoke: bool) -> list[Line]:
    lines = []
    for count, bar in HOST_BARS_US.items():
        times = []
        cuda_there = lookup.device is not None and lookup.device.type == "cuda"
        wide = (len(lookup.layers), count, lookup.embedding_dim)
        out = torch.empty(wide, dtype=torch.bfloat16, device=lookup.device)
        free = cuda.Event() if cuda_there else None
        if free is not None:
            free.record()
        for _ in range(20 if smoke else 300):
            step = ids.step(count)
            prepared: Any = None

            def prepare(step: Any = step, out: Any = out, free: Any = free) -> None:
                nonlocal prepared
                tokens, starts, history = step
                prepared = lookup.prepare(tokens, starts, history, out=out, after=free)

            times.append(_host_us(prepare))
            prepared.wait()
            if cuda_there:
                torch.cuda.synchronize()
        times = times[len(times) // 5 :]
        median = float(np.median(times))
        lines.append(
            Line(
                f"host time of prepare, {count} tokens, all in the arena",
                "us",
                Samples.of(times),
                bar=f"at most {bar} us",
                reached=median <= bar,
            )
        )
    return lines


def _hbm(table: Table, ids: _Ids, options: argparse.Namespace, device: torch.device) -> list[Line]:
    count, runs = (8, 3) if options.smoke else (8192, 40)
    lookup = EngramLookup(table, device=device, hbm=options.hbm)
    few = _few(ids, table, options)
    for _ in range(3):
        for step in few:
            lookup(*step)
    tier = table.on_devices[-1]
    shape = (tier.plan.layers, count, tier.plan.columns, tier.tier.row_format.dim)
    out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    before = tier.stats()
    times = gpu_times(_gathers(tier, _Again(few, count), count, runs + 3, out), device)[3:]
    after = tier.stats()
    asked = (runs + 3) * count * 3
    found = after["ngrams_on_device"] - before["ngrams_on_device"]
    median = float(np.median(times))
    lines = [
        Line(
            f"gathered from HBM, {count:,} tokens, to bf16 ({found / asked:.1%} there)",
            "us",
            Samples.of(times),
            bar=f"at most {HBM_BAR_US} us",
            reached=median <= HBM_BAR_US,
            checksum=checksum(out.float().cpu().numpy().view(np.uint8)),
        )
    ]
    lines += [
        Line(
            f"{line.what}, kept in HBM".replace("all in the arena, ", ""),
            line.unit,
            line.measured,
            bar=line.bar,
            reached=line.reached,
        )
        for line in _host(lookup, _Again(few, 64), options.smoke)
    ]
    return lines


def _few(ids: _Ids, table: Table, options: argparse.Namespace) -> list[Any]:
    """Steps whose n-grams all fit into the device's share."""
    return [ids.step(8 if options.smoke else 8192) for _ in range(2 if options.smoke else 8)]


class _Again:
    """Steps made of tokens that were seen in some steps before."""

    def __init__(self, steps: list[Any], count: int) -> None:
        self._tokens = torch.cat([step[0] for step in steps])
        self._history = torch.cat([step[2] for step in steps])
        self._rng = np.random.default_rng(count)

    def step(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        places = torch.from_numpy(self._rng.integers(0, len(self._tokens), count))
        starts = torch.arange(count + 1, dtype=torch.int32)
        return self._tokens[places], starts, self._history[places]


if __name__ == "__main__":
    main(sys.argv[1:])
