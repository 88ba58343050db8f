"""One client process of the demo: real-text batches, every byte of every answer checked."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engram.demo.corpus import source_tokens
from engram.rows import Rows
from engram.sizing.record import Recorder
from engram.sizing.trace import Trace
from engram.ssd import SsdTier
from engram.store.synth import synthetic_rows
from engram.table import Table

PREFILL_TOKENS = 2048
DECODE_SEQUENCES = 64
PASSES = 2
"""Over the same text: the first finds what others left in memory, the second what it left."""


@dataclass
class Pass:
    """What one client did in one pass over its text.

    Attributes:
        hits: n-grams that were in the RAM tier, of all tokens.
        misses: n-grams that were not.
        shapes: for each batch shape, seconds of each lookup.
    """

    rows_checked: int = 0
    rows_wrong: int = 0
    hits: int = 0
    misses: int = 0
    shapes: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Arguments of one lookup."""

    shape: str
    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    history: npt.NDArray[np.int32]


def batches(
    documents: list[npt.NDArray[np.int32]], context: int, steps: int, seed: int
) -> Iterator[Batch]:
    """Prefill chunks over all documents, then decode steps that continue 64 random places.

    Args:
        context: ids of history that a lookup wants, `max_order - 1`.
        steps: number of decode steps.
    """
    for document in documents:
        padded = np.concatenate([np.full(context, -1, np.int32), document])
        for at in range(0, len(document), PREFILL_TOKENS):
            chunk = document[at : at + PREFILL_TOKENS]
            starts = np.array([0, len(chunk)], np.int32)
            yield Batch("prefill", chunk, starts, padded[None, at : at + context])
    text = np.concatenate(documents)
    places = np.random.default_rng(seed).integers(context, len(text) - steps, DECODE_SEQUENCES)
    starts = np.arange(DECODE_SEQUENCES + 1, dtype=np.int32)
    for newest in (places + step for step in range(steps)):
        history = np.stack([text[newest - context + k] for k in range(context)], axis=1)
        yield Batch("decode", text[newest], starts, history)


def recorded(table: Path, clients: int, tokens: int, steps: int) -> Trace:
    """A trace of what all clients together ask of a table, in turns; see `run`.

    Args:
        table: its directory.
        clients: how many, with seeds from 0 on.
        tokens, steps: of each.
    """
    tier = SsdTier(table)
    try:
        spec, fingerprint = tier.spec, tier.fingerprint
    finally:
        tier.close()
    recorder = Recorder(spec, fingerprint)
    texts = [source_tokens(tokens, seed) for seed in range(clients)]
    for _ in range(PASSES):
        sent = (batches(text, spec.max_order - 1, steps, n) for n, text in enumerate(texts))
        for together in zip_longest(*sent):
            for batch in filter(None, together):
                recorder.add(spec.windows(batch.tokens, batch.starts, batch.history))
    return recorder.finish()


def check_rows(table: Table, table_seed: int, batch: Batch, rows: Rows) -> int:
    """Number of rows of a synthetic table that are not what the rule says."""
    ids = table.spec.row_ids(batch.tokens, batch.starts, batch.history)
    packed = rows.packed()
    wrong = 0
    for position, layer in enumerate(table.layers):
        expected = synthetic_rows(
            table_seed, table.row_format, layer, ids[:, position].reshape(-1)
        ).reshape(packed[:, position].shape)
        wrong += int((packed[:, position] != expected).any(axis=-1).sum())
    return wrong


def run(target: str, name: str, table_seed: int, tokens: int, steps: int, seed: int) -> list[Pass]:
    """Send the traffic of one client, see `batches`, `PASSES` times."""
    import engram

    with engram.connect(target, name) as table:
        documents = source_tokens(tokens, seed)
        table.lookup(documents[0][:1])  # compiles what is compiled on first use
        return [_pass_over(table, table_seed, documents, steps, seed) for _ in range(PASSES)]


def _pass_over(
    table: Table,
    table_seed: int,
    documents: list[npt.NDArray[np.int32]],
    steps: int,
    seed: int,
) -> Pass:
    done, before = Pass(), _counts(table)
    for batch in batches(documents, table.spec.max_order - 1, steps, seed):
        began = time.perf_counter()
        rows = table.lookup(batch.tokens, batch.starts, batch.history)
        done.shapes.setdefault(batch.shape, []).append(time.perf_counter() - began)
        done.rows_checked += rows.values[..., 0].size
        done.rows_wrong += check_rows(table, table_seed, batch, rows)
    hits, misses = _counts(table)
    done.hits, done.misses = hits - before[0], misses - before[1]
    return done


def _counts(table: Table) -> tuple[int, int]:
    tier = table.stats()["tiers"][0]
    return tier["hits"], tier["misses"]


def main(arguments: list[str]) -> None:
    """`python -m engram.demo.traffic JSON`: keyword arguments of `run`; prints its passes."""
    keywords: dict[str, Any] = json.loads(arguments[0])
    print(json.dumps([asdict(done) for done in run(**keywords)]))


if __name__ == "__main__":
    main(sys.argv[1:])
