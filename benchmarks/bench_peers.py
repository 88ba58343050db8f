"""Hits, taking turns with other ways to get the same rows, all of them warm.

Peers are given their row ids, engram only the tokens. Every round looks up text that none of them
has just looked up, and every one's rows are compared.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import peers
from machine import microseconds
from report import Line, Samples
from texts import Text

import engram
from engram.bench import checksum
from engram.demo.corpus import tokenizer_file
from engram.rows import RowFormat
from engram.spec import NgramSpec
from engram.ssd import schema_of
from engram.store.synth import SyntheticSource
from engram.store.writer import build_table

RAM = "1GiB"


def run(place: Path, smoke: bool) -> list[Line]:
    """64 and 2,048 tokens by each, from a table of its own below `place`."""
    vocab_size, text_tokens = (2_000, 4096) if smoke else (80_000, 32_768)
    runs = {64: 3, 2048: 2} if smoke else {64: 201, 2048: 15}
    spec = NgramSpec.deepseek_v41(tokenizer=tokenizer_file(), engram_vocab_size=vocab_size)
    schema = schema_of(spec, RowFormat("fp8-ue8m0", spec.dim))
    text = Text(text_tokens, spec.max_order - 1)
    folder = Path(tempfile.mkdtemp(prefix="peers-", dir=place))
    try:
        source = SyntheticSource(schema)
        build_table(folder / "table", schema, source)
        with ExitStack() as stack:
            table = stack.enter_context(engram.open(folder / "table", ram=RAM, guard=True))
            others, absent = peers.all_but_engram(stack, folder, table, source)
            ours = peers.Engram("engram, hits", table)
            lines = []
            for count, rounds in runs.items():
                lines += _take_turns(ours, others, text, count, rounds)
            lines[0] = replace(lines[0], what="; ".join([lines[0].what, *absent]))
    finally:
        shutil.rmtree(folder)
    return lines


def _take_turns(
    ours: peers.Engram, others: list[peers.Peer], text: Text, count: int, rounds: int
) -> list[Line]:
    everyone: list[peers.Peer] = [ours, *others]
    for peer in everyone:
        peer.make_room(count)
        for piece in text.pieces(count)[: 1 if peer.dear else None]:
            peer.read(peer.prepare(piece))
    misses = ours.misses()
    times: dict[str, list[float]] = {peer.name: [] for peer in everyone}
    sums: dict[str, list[str]] = {peer.name: [] for peer in everyone}
    for number in range(rounds):
        piece = text.piece(number * count, count)
        for turn in range(len(everyone)):
            peer = everyone[(number + turn) % len(everyone)]
            prepared = peer.prepare(piece)
            times[peer.name].append(microseconds(lambda p=peer, x=prepared: p.read(x)))  # type: ignore[misc]
            sums[peer.name].append(checksum(peer.packed()))
    if ours.misses() != misses:
        raise SystemExit("some n-grams were not in the RAM tier; give it more")
    for name, found in sums.items():
        if found != sums[ours.name]:
            raise SystemExit(f"the rows of {name} differ from engram's")
    rows = ours.rows(count)
    return [_line(name, ours.name, times, count, rows, sums) for name in times]


def _line(
    name: str,
    ours: str,
    times: dict[str, list[float]],
    count: int,
    rows: int,
    sums: dict[str, list[str]],
) -> Line:
    each_ns = float(np.median(times[name])) * 1000 / rows
    what = f"{count:,} tokens, {rows:,} rows, warm: {name} ({each_ns:,.0f} ns a row)"
    measured, total = Samples.of(times[name]), checksum(*sums[name])
    if name == ours:
        return Line(what, "us", measured, checksum=total)
    ratio = float(np.median(np.array(times[name]) / np.array(times[ours])))
    return Line(what, "us", measured, ours, Samples.of(times[ours]), ratio, checksum=total)
