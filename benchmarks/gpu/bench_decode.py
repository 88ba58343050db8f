"""What a table in host memory or on disk costs a decoder: `bench_decode.py --help`.

(a) the decoder without Engram, (b) with a small table in the GPU's own memory, (c) with engram,
the stream's n-grams in the RAM tier, (d) with engram, a RAM tier of a tenth of the table, warmed by
an earlier part of the same text, and the rest on disk with its pages dropped. Sequences go through
real text, and ids are known only after the step before has ended, as if they were sampled.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_gather import device_facts
from decoder import Decoder, Shape, Step
from report import Line, Samples, save, show
from run import _table as make_table

import engram
from engram.bench import drop_cache
from engram.demo.corpus import source_tokens
from engram.nn import EngramLookup
from engram.store.manifest import DATA_FILE

SMALL_BAR, NONE_BAR, HISTORY = 0.99, 0.98, 3
_SMALL_ROWS = 1 << 16
cuda: Any = torch.cuda  # parts of it have no types


def main(arguments: list[str]) -> None:
    """Parse the command line, run, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/gpu/bench_decode.py --sequences 256 8 1 --out results/x",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", type=int, nargs="+", default=[256, 8, 1])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=320_000, help="of a head, about")
    parser.add_argument("--hbm", default="2GiB")
    parser.add_argument("--place", type=Path, help="for the table; default: temp")
    parser.add_argument("--out", type=Path, help="directory for results.json and results.md")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.sequences, options.steps, options.rows, options.hbm = [4, 1], 4, 2_000, "1MiB"
    lines = run(options)
    show(lines)
    if options.out:
        command = "python benchmarks/gpu/bench_decode.py " + " ".join(arguments)
        save(options.out, command, lines, device_facts(torch.device(options.device)))


class _Streams:
    """Sequences that go through real text, each from a place of its own."""

    def __init__(self, text: np.ndarray, sequences: int, steps: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        places = rng.integers(HISTORY, len(text) - steps, sequences)
        self.steps = [
            (text[places + at].astype(np.int32), self._before(text, places + at))
            for at in range(steps)
        ]

    @staticmethod
    def _before(text: np.ndarray, places: np.ndarray) -> np.ndarray:
        history = np.stack([text[places - back] for back in range(HISTORY, 0, -1)], axis=1)
        return history.astype(np.int32)


class _Loop:
    """Decodes and measures.

    Args:
        step: captured.
        lookup: brings embeddings to `out`; None where the graphs do it.
    """

    def __init__(self, step: Step, lookup: EngramLookup | None, out: torch.Tensor | None) -> None:
        self._step, self._lookup, self._out = step, lookup, out
        self._on_cuda = step.ids.device.type == "cuda"
        self._starts = torch.arange(len(step.ids) + 1, dtype=torch.int32)
        self._free: Any = None

    def run(self, streams: _Streams) -> list[float]:
        """Milliseconds of each step, from ids on the host to the next ones there."""
        return [self._one(ids, history) for ids, history in streams.steps]

    def _one(self, ids: np.ndarray, history: np.ndarray) -> float:
        began = time.perf_counter()
        step, tokens = self._step, torch.from_numpy(ids)
        step.ids.copy_(tokens, non_blocking=True)
        step.first()
        if self._lookup is not None:
            prepared = self._lookup.prepare(
                tokens, self._starts, torch.from_numpy(history), out=self._out, after=self._free
            )
            prepared.wait()
        step.rest()
        if self._on_cuda and self._lookup is not None:
            self._free = cuda.Event()
            self._free.record()
        step.next.cpu()
        return (time.perf_counter() - began) * 1e3


class _Small:
    """A table of few rows in the device's own memory; which row, the ids say."""

    def __init__(self, shape: Shape, sequences: int, device: torch.device) -> None:
        columns = shape.embed_dim // 256
        self._rows = torch.randn(2, _SMALL_ROWS, 256, device=device, dtype=torch.bfloat16)
        self._factors = torch.arange(1, columns + 1, device=device) * 2_654_435_761
        self.out = torch.empty(2, sequences, shape.embed_dim, device=device, dtype=torch.bfloat16)

    def look_up(self, ids: torch.Tensor) -> None:
        rows = (ids[:, None] * self._factors[None]) % _SMALL_ROWS
        for layer in range(2):
            self.out[layer].copy_(self._rows[layer][rows].flatten(1))

    def memory(self, which: int) -> torch.Tensor:
        return self.out[which]


def run(options: argparse.Namespace) -> list[Line]:
    """All ways, in turns, for each number of sequences."""
    device = torch.device(options.device)
    shape = Shape()
    if options.smoke:
        shape = Shape(4, 128, 4, 2, 256, 129_280, 16, (1, 2))
    text = np.concatenate(source_tokens(8_000 if options.smoke else 300_000))
    decoder = Decoder(shape, max(options.sequences), device)
    print("decoder made", flush=True)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(dir=options.place) as name:
        path = make_table(Path(name) / "table", options.rows)
        size = (path / DATA_FILE).stat().st_size
        enough, tenth = max(8 << 20, 3 * len(text) * 6144), size // 10
        with (
            engram.open(path, ram=enough, guard=True) as warm,
            engram.open(path, ram=tenth, guard=True) as cold,
        ):
            for first in range(HISTORY, len(text) - 2048, 2048):
                some = text[first : first + 2048], None, text[None, first - HISTORY : first]
                warm.lookup(*some)
                if first < len(text) // 2:
                    cold.lookup(*some)
            print("warmed up", flush=True)
            for sequences in options.sequences:
                print(f"{sequences} sequences", flush=True)
                lines += _compare(decoder, sequences, warm, cold, path, text, options)
            for table in (warm, cold):
                for tier in table.stats()["tiers"]:
                    print(tier)
    return lines


def _compare(
    decoder: Decoder,
    sequences: int,
    warm: engram.Table,
    cold: engram.Table,
    path: Path,
    text: np.ndarray,
    options: argparse.Namespace,
) -> list[Line]:
    device, shape = decoder.device, decoder.shape
    wide = (2, sequences, shape.embed_dim)
    out = torch.zeros(wide, device=device, dtype=torch.bfloat16)
    small = _Small(shape, sequences, device)
    lookups = {
        "c": EngramLookup(warm, device=device, hbm=options.hbm),
        "d": EngramLookup(cold, device=device, hbm=options.hbm),
    }
    from_out = Step(decoder, sequences, lambda which: out[which])
    loops = {
        "a": _Loop(Step(decoder, sequences, None), None, None),
        "b": _Loop(Step(decoder, sequences, small.memory, small.look_up), None, None),
        "c": _Loop(from_out, lookups["c"], out),
        "d": _Loop(from_out, lookups["d"], out),
    }
    half = len(text) // 2
    _check_embeddings(lookups["c"], warm, text, device)
    times: dict[str, list[float]] = {way: [] for way in loops}
    rounds = 2 if options.smoke else 4
    for number in range(rounds):
        for way in "abc":
            streams = _Streams(text, sequences, options.steps, 17 * number + sequences)
            times[way] += loops[way].run(streams)[5 if not options.smoke else 0 :]
    drop_cache(path / DATA_FILE)
    before = cold.stats()["tiers"]
    streams = _Streams(text[half:], sequences, max(3, options.steps // 3), sequences)
    times["d"] = loops["d"].run(streams)
    return _lines(times, sequences, shape, before, cold.stats()["tiers"])


def _check_embeddings(
    lookup: EngramLookup, table: engram.Table, text: np.ndarray, device: torch.device
) -> None:
    ids = text[100:164].astype(np.int32)
    found = lookup(torch.from_numpy(ids).to(device))
    host = EngramLookup(table)(torch.from_numpy(ids))
    for layer in lookup.layers:
        if not torch.equal(found[layer].cpu(), host[layer]):
            raise SystemExit(f"layer {layer}: the device's embeddings differ from the host's")


def _lines(
    times: dict[str, list[float]],
    sequences: int,
    shape: Shape,
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
) -> list[Line]:
    per_second = {way: [sequences / ms * 1e3 for ms in some] for way, some in times.items()}
    median = {way: float(np.median(some)) for way, some in per_second.items()}
    rate = shape.bytes_of_step(sequences) / (float(np.median(times["a"])) * 1e-3) / 1e12
    names = {
        "a": f"(a) decoding, {sequences} sequences, no Engram: reads {rate:.2f} TB/s",
        "b": f"(b) decoding, {sequences} sequences, a small table on the device",
        "c": f"(c) decoding, {sequences} sequences, engram, all n-grams in RAM or HBM",
        "d": f"(d) decoding, {sequences} sequences, engram, RAM tier of a tenth, disk cold: "
        + _told(before, after),
    }
    lines = []
    for way, what in names.items():
        bar, reached, ratio, beside, beside_name = "", None, None, None, ""
        if way == "c":
            ratio = median["c"] / median["b"]
            beside, beside_name = Samples.of(per_second["b"]), "(b)"
            to_none = median["c"] / median["a"]
            bar = f"at least {SMALL_BAR} of (b) and {NONE_BAR} of (a) (it is {to_none:.3f})"
            reached = ratio >= SMALL_BAR and to_none >= NONE_BAR
        elif way == "d":
            ratio = median["d"] / median["b"]
            beside, beside_name = Samples.of(per_second["b"]), "(b)"
        lines.append(
            Line(
                what,
                "tokens/s",
                Samples.of(per_second[way]),
                beside_name,
                beside,
                ratio,
                bar,
                reached,
            )
        )
    return lines


def _told(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    grown = {
        name: after[0].get(name, 0) - before[0].get(name, 0)
        for name in ("ngrams_on_device", "ngrams_in_place", "ngrams_staged")
    }
    total = max(1, sum(grown.values()))
    return ", ".join(f"{count / total:.1%} {name[7:]}" for name, count in grown.items())


if __name__ == "__main__":
    main(sys.argv[1:])
