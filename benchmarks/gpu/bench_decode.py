"""What a table in host memory or on disk costs a decoder: `bench_decode.py --help`.

(a) the decoder without Engram, (b) with a small table in the GPU's own memory, (c) with engram,
the stream's n-grams in the RAM tier, (d) with engram, a RAM tier of a tenth of the table, warmed by
an earlier part of the same text, and the rest on disk with its pages dropped. Sequences go through
real text, and ids are known only after the step before has ended, as if they were sampled.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_gather import device_facts, gpu_times
from bench_prefill import Prefill
from decode_loop import HISTORY, Loop, Small, Streams
from decoder import Decoder, Shape, Step
from machine import read_rate
from report import Line, Samples, save, show
from run import _table as make_table

import engram
from engram.bench import checksum, drop_cache
from engram.demo.corpus import source_tokens
from engram.nn import EngramLookup
from engram.store.manifest import DATA_FILE

SMALL_BAR, NONE_BAR = 0.99, 0.98
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
    parser.add_argument("--rows", type=int, default=320_000, help="of each of the 48 heads, about")
    parser.add_argument("--row-format", default="nf4", help="of the table")
    parser.add_argument(
        "--tokens", type=int, default=200_000, help="of text; a quarter for prompts"
    )
    parser.add_argument("--hbm", default="2GiB")
    parser.add_argument("--place", type=Path, help="for the table; default: temp")
    parser.add_argument(
        "--table", type=Path, help="use the one there, or make it there and keep it"
    )
    parser.add_argument("--out", type=Path, help="directory for results.json and results.md")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.sequences, options.steps, options.rows, options.hbm = [4, 1], 4, 2_000, "1MiB"
    place = Path(tempfile.mkdtemp(prefix="engram-bench-", dir=options.place))
    lines: list[Line] = []
    steps: dict[int, list[_ColdStep]] = {}
    try:
        for measured in run(options, options.table or place / "table", steps):
            show(measured)
            lines += measured
            if options.out:  # after each part, so that one which fails costs only itself
                command = "python benchmarks/gpu/bench_decode.py " + " ".join(arguments)
                save(options.out, command, lines, device_facts(torch.device(options.device)))
                (options.out / "steps.json").write_text(json.dumps(steps) + "\n")
    finally:
        shutil.rmtree(place)


def run(
    options: argparse.Namespace, path: Path, steps: dict[int, list[_ColdStep]]
) -> Iterator[list[Line]]:
    """All ways, in turns, for a long prompt and for each number of sequences.

    Args:
        path: the table, made there if it is not there.
        steps: those of (d) are put there.
    """
    device = torch.device(options.device)
    shape = Shape(4, 128, 4, 2, 256, 129_280, 16, (1, 2)) if options.smoke else Shape()
    text = np.concatenate(source_tokens(8_000 if options.smoke else options.tokens))
    if not path.exists():
        began = time.perf_counter()
        make_table(path, options.rows, options.row_format)
        note(f"table made in {time.perf_counter() - began:.0f} s")
    data = path / DATA_FILE
    size = data.stat().st_size
    drop_cache(data)
    rate, by = read_rate(data, 1 if options.smoke else 3)
    decoder = Decoder(shape, max(options.sequences), device)
    bench = _Bench(options, decoder, text, rate, steps)
    yield [
        Line(f"random reads of 4 KiB, direct, by {by}", "reads/s", Samples.of([rate])),
        Line("table", "GB", Samples.of([size / 1e9])),
        Line("copy on the device", "TB/s", Samples.of([bench.copy_rate])),
    ]
    with (
        engram.open(path, ram=max(8 << 20, 3 * len(bench.stream) * 6144), guard=True) as warm,
        engram.open(path, ram=max(4 << 20, size // 10), guard=True) as cold,
    ):
        bench.warm_up(warm, cold, data)
        yield from bench.compare(warm, cold, data)
        for table in (warm, cold):
            for tier in table.stats()["tiers"]:
                print(tier)


def note(what: str) -> None:
    """Tell how far it is."""
    print(what, flush=True)


class _ColdStep(NamedTuple):
    """A step of (d): the part of n-grams that were in RAM or HBM, rows read, how long it took."""

    hits: float
    rows: int
    ms: float


class _Bench:
    """What all comparisons share.

    Args:
        rate: reads a second that the disk can do.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        decoder: Decoder,
        text: np.ndarray,
        rate: float,
        steps: dict[int, list[_ColdStep]],
    ) -> None:
        self._options, self._decoder, self._rate = options, decoder, rate
        # The cold table is warmed by the earlier part; later ones are for decoding and prefill.
        known, decoded = len(text) * 5 // 8, len(text) * 6 // 8
        self.stream, self._known = text[: known // 2], text[:known]
        self._decoded, self._prompts = text[known:decoded], text[decoded:]
        self.copy_rate = _copy_rate(decoder.device, options.smoke)
        self._steps = steps

    def warm_up(self, warm: engram.Table, cold: engram.Table, data: Path) -> None:
        """Look the stream up in one table, and all that is to be known in the other.

        Pages are dropped between them: what is found in the page cache is read through a map, and
        what is mapped cannot be dropped.
        """
        for table, text in ((warm, self.stream), (cold, self._known)):
            drop_cache(data)
            for first in range(HISTORY, len(text), 2048):
                table.lookup(text[first : first + 2048], None, text[None, first - HISTORY : first])
        note("warmed up")

    def compare(self, warm: engram.Table, cold: engram.Table, data: Path) -> Iterator[list[Line]]:
        """Prefill and decoding."""
        options, device = self._options, self._decoder.device
        before = _allocated(device)
        lookups = {
            "c": EngramLookup(warm, device=device, hbm=options.hbm),
            "d": EngramLookup(cold, device=device, hbm=options.hbm),
        }
        for lookup, table in zip(lookups.values(), (warm, cold), strict=True):
            found = _check_embeddings(lookup, table, self.stream, device)
        taken = (_allocated(device) - before) / 2 / 2**20
        what = f"HBM of one lookup, {options.hbm} configured"
        yield [Line(what, "MiB", Samples.of([taken]), checksum=found)]
        tokens, rounds = (256, 1) if options.smoke else (8192, 3)
        prefill = Prefill(self._decoder, tokens, lookups)
        drop_cache(data)
        yield prefill.lines(self.stream, self._prompts, rounds, self._rate)
        for sequences in options.sequences:
            drop_cache(data)
            yield self._decode(sequences, lookups, cold)

    def _decode(
        self, sequences: int, lookups: dict[str, EngramLookup], cold: engram.Table
    ) -> list[Line]:
        options, decoder = self._options, self._decoder
        device, shape = decoder.device, decoder.shape
        wide = (2, sequences, shape.embed_dim)
        out = torch.zeros(wide, device=device, dtype=torch.bfloat16)
        small = Small(shape, sequences, device)
        from_out = Step(decoder, sequences, lambda which: out[which])
        loops = {
            "a": Loop(Step(decoder, sequences, None), None, None),
            "b": Loop(Step(decoder, sequences, small.memory, small.look_up), None, None),
            "c": Loop(from_out, lookups["c"], out),
        }
        times: dict[str, list[float]] = {way: [] for way in loops}
        for number in range(2 if options.smoke else 5):
            for way, loop in loops.items():
                streams = Streams(self.stream, sequences, options.steps, 17 * number + sequences)
                times[way] += loop.run(streams)[0 if options.smoke else 5 :]
        self._steps[sequences] = self._cold_steps(
            Loop(from_out, lookups["d"], out), sequences, cold
        )
        times["d"] = [step.ms for step in self._steps[sequences]]
        first_ms = gpu_times([from_out.first] * 9, device)
        return self._lines(times, sequences, first_ms)

    def _cold_steps(self, loop: Loop, sequences: int, cold: engram.Table) -> list[_ColdStep]:
        found = []
        streams = Streams(self._decoded, sequences, self._options.steps, sequences)
        for ids, history in streams.steps:
            before = _counts(cold)
            ms = loop.one(ids, history)
            staged, there, rows = (
                now - then for now, then in zip(_counts(cold), before, strict=True)
            )
            found.append(_ColdStep(there / max(1, staged + there), rows, ms))
        return found[2:]

    def _lines(
        self, times: dict[str, list[float]], sequences: int, first_us: list[float]
    ) -> list[Line]:
        per_second = {
            way: Samples.of([sequences / ms * 1e3 for ms in some]) for way, some in times.items()
        }
        compute_ms = float(np.median(times["b"]))
        moved = self._decoder.shape.bytes_of_step(sequences) / np.median(times["a"]) / 1e9
        warm, none = (per_second["c"].median / per_second[way].median for way in "ba")
        steps = self._steps[sequences]
        over = float(
            np.median(
                [
                    step.ms / (1.1 * max(compute_ms, step.rows / self._rate * 1e3) + 0.3)
                    for step in steps
                ]
            )
        )
        hits, rows = np.median([step[:2] for step in steps], axis=0)
        cold = per_second["d"].median / per_second["b"].median
        beside = ("(b)", per_second["b"])
        name = f"decoding, {sequences} sequences"
        told = f"{hits:.0%} of n-grams in RAM or HBM, {rows:,.0f} rows a step read"
        share = f"reads {moved:.2f} TB/s, {moved / self.copy_rate:.0%} of a copy's rate"
        warm_bar = f"at least {SMALL_BAR} of (b), {NONE_BAR} of (a) (it is {none:.3f})"
        cold_bar = (
            f"a step at most 1.1 x max(compute, reads / rate) + 0.3 ms (it is {over:.2f} of that)"
        )
        reached = warm >= SMALL_BAR and none >= NONE_BAR
        return [
            Line(f"(a) {name}, no Engram: {share}", "tokens/s", per_second["a"]),
            Line(f"(b) {name}, a small table on the device", "tokens/s", per_second["b"]),
            Line(
                f"(c) {name}, engram, all n-grams in RAM or HBM",
                "tokens/s",
                per_second["c"],
                *beside,
                warm,
                warm_bar,
                reached,
            ),
            Line(
                f"(d) {name}, engram, RAM tier of a tenth, disk cold: {told}",
                "tokens/s",
                per_second["d"],
                *beside,
                cold,
                cold_bar,
                over <= 1,
            ),
            Line(
                f"(e) {sequences} sequences, before the first Engram layer: as long as "
                f"{np.median(first_us) * self._rate / 1e6:,.0f} reads",
                "us",
                Samples.of(first_us),
            ),
        ]


def _counts(table: engram.Table) -> tuple[int, int, int]:
    """N-grams that were staged, those that were in RAM or HBM, and rows read.

    Not by `stats`, which looks through all slots: the next step would find the host's caches empty.
    """
    tier: Any = table._tier
    found = table.on_devices[0]._finder.counters.read()
    there = found["ngrams_on_device"] + found["ngrams_in_place"]
    return found["ngrams_staged"], there, tier.backing.stats()["rows_read"]


def _copy_rate(device: torch.device, smoke: bool) -> float:
    """Bytes read and written by a copy on the device, TB/s."""
    size = 1 << (20 if smoke else 29)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    times = gpu_times([lambda: target.copy_(source)] * 12, device)
    return 2 * size / float(np.median(times[2:])) / 1e6


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    cuda.synchronize()
    return int(cuda.memory_allocated(device))


def _check_embeddings(
    lookup: EngramLookup, table: engram.Table, text: np.ndarray, device: torch.device
) -> str:
    ids = text[100:164].astype(np.int32)
    found = lookup(torch.from_numpy(ids).to(device))
    host = EngramLookup(table)(torch.from_numpy(ids))
    for layer in lookup.layers:
        if not torch.equal(found[layer].cpu(), host[layer]):
            raise SystemExit(f"layer {layer}: the device's embeddings differ from the host's")
    return checksum(*(host[layer].float().numpy() for layer in lookup.layers))


if __name__ == "__main__":
    main(sys.argv[1:])
