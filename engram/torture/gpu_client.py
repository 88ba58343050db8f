"""A client of the GPU tier under torture: takes steps, and checks every bit of every embedding.

Only clients of this kind import it, and the nursery before it forks them, since it needs torch.
Importing torch starts no thread and leaves CUDA alone, so a forked client may use both.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engram.nn import EngramLookup, dequantize
from engram.rows import RowFormat
from engram.table import Table
from engram.tiers import Int64s, Prefetch
from engram.torture import client
from engram.torture.checker import CHUNK_ROWS, Checker
from engram.torture.client import Told
from engram.torture.traffic import Batch, Traffic
from engram.torture.works import Work, Works, together

cuda: Any = torch.cuda  # parts of it have no types
_COUNTS = ("ngrams_on_device", "ngrams_in_place", "ngrams_staged")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NGRAMS = ((8, 200), (2000, 6000), (1, 3), (0, 1))
"""For how many there is memory on the device, of each module: from, below."""
_LINE_BYTES = 64
_REPEATS = 20
_STEPS_SAME = 8
_SEQUENCES_SAME = 32
_STEPS_AHEAD = 3
_PREFETCHES_KEPT = 4
_POISON = float("nan")


class EmbeddingChecker:
    """Compares embeddings with what they must be, decoded on the CPU."""

    def __init__(self, table_seed: int, row_format: RowFormat) -> None:
        self._rows = Checker(table_seed, row_format)
        self._row_format = row_format

    def wrong_rows(
        self, layers: Sequence[int], row_ids: Int64s, found: Sequence[torch.Tensor]
    ) -> int:
        """How many rows are not right in some bit.

        Args:
            layers: model layer index of each position on axis 1.
            row_ids: int64 `[T, layers, columns]`.
            found: floating `[T, columns * dim]` of each layer, on any device.
        """
        wrong = 0
        tokens, _, columns = row_ids.shape
        step = max(1, CHUNK_ROWS // columns)
        for position, layer in enumerate(layers):
            # Also waits for what filled it.
            embeddings = found[position].cpu().reshape(tokens, columns, self._row_format.dim)
            for first in range(0, tokens, step):
                some = slice(first, first + step)
                ids = np.ascontiguousarray(row_ids[some, position]).reshape(-1)
                wanted = self._wanted(layer, ids, embeddings.dtype)
                wrong += different(embeddings[some].reshape(wanted.shape), wanted)
        return wrong

    def _wanted(self, layer: int, ids: Int64s, dtype: torch.dtype) -> torch.Tensor:
        rows = self._rows.expected(layer, ids)
        scales = None if rows.scales is None else torch.from_numpy(rows.scales)
        return dequantize(torch.from_numpy(rows.values), scales, self._row_format, dtype)


def different(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """How many rows `[R, dim]` differ in some bit; NaN is NaN, for devices make it differently."""
    bits = torch.int32 if wanted.element_size() == 4 else torch.int16
    if torch.equal(found.view(bits), wanted.view(bits)):
        return 0
    unequal = found.view(bits) != wanted.view(bits)
    unequal &= ~(found.isnan() & wanted.isnan())
    return int(unequal.any(-1).sum())


class GpuClient:
    """The work of one client on an open table, through modules that share it.

    Attributes:
        works: its kinds of work.
    """

    def __init__(self, table: Table, told: Told) -> None:
        torch.set_num_threads(1)  # there are other clients
        self._table = table
        self._told = told
        self._rng = np.random.default_rng([told.seed, told.serial])
        self._traffic = Traffic(table.spec, self._rng, told.traffic_seed)
        self._device = told.gpu_device or ("cuda" if cuda.is_available() else "cpu")
        self._modules = _modules(table, told, self._rng, self._device)
        self._stream = cuda.Stream() if self._device.startswith("cuda") else None
        self._outs: dict[EngramLookup, torch.Tensor] = {}
        self._prefetches: deque[Prefetch] = deque(maxlen=_PREFETCHES_KEPT)
        kinds = (
            (20, self.gpu_prefill),
            (25, self.gpu_decode),
            (8, self.gpu_fresh),
            (5, self.gpu_shaped),
            (3, self.gpu_empty),
            (1, self.gpu_long),
            (8, self.gpu_repeated),
            (10, self.gpu_same_memory),
            (8, self.gpu_ahead),
            (4, self.gpu_everywhere),
            (5, self.gpu_prefetched),
            (3, self.gpu_cancelled),
            (2, self.gpu_together),
        )
        self.works = Works(self._rng, [(n, self._on_some_stream(work)) for n, work in kinds])

    def counts(self) -> dict[str, Any]:
        """The device, and the n-grams of all steps by where they were."""
        tiers = [tier for tier in self._table.stats()["tiers"] if tier["tier"] == "gpu"]
        counts = {name: sum(tier[name] for tier in tiers) for name in _COUNTS}
        return {"device": self._device, **counts}

    def gpu_prefill(self) -> tuple[int, int]:
        """A long step."""
        return self._step(self._any_module(), self._traffic.prefill())

    def gpu_decode(self) -> tuple[int, int]:
        """A short step."""
        return self._step(self._any_module(), self._traffic.decode())

    def gpu_fresh(self) -> tuple[int, int]:
        """N-grams that nobody had before."""
        return self._step(self._any_module(), self._traffic.fresh())

    def gpu_shaped(self) -> tuple[int, int]:
        """Sequences of one length as a matrix of tokens, which are on the device already."""
        lookup, batch = self._any_module(), self._traffic.even()
        tokens = torch.from_numpy(batch.tokens).reshape(len(batch.starts) - 1, -1)
        rows = lookup(tokens.to(self._device), history=torch.from_numpy(batch.history))
        return self._check(lookup, batch, [rows[layer].flatten(0, 1) for layer in lookup.layers])

    def gpu_empty(self) -> tuple[int, int]:
        """No token."""
        lookup = self._any_module()
        done = self._step(lookup, self._traffic.empty())
        return done if self._rng.random() < 0.5 else self._step(lookup, self._traffic.decode())

    def gpu_long(self) -> tuple[int, int]:
        """More than one launch takes."""
        return self._step(self._any_module(), self._traffic.long())

    def gpu_repeated(self) -> tuple[int, int]:
        """What is frequent, again and again: little but the device's own memory, if it suffices."""
        lookup, batch = self._any_module(), self._traffic.frequent()
        first = [each.clone() for each in self._embeddings(lookup, batch)]
        checked, first_wrong = self._check(lookup, batch, [each.clone() for each in first])
        wrong = first_wrong
        for _ in range(_REPEATS):
            again = self._embeddings(lookup, batch)
            unequal = sum(
                different(one.cpu().reshape(-1, self._dim), other.cpu().reshape(-1, self._dim))
                for one, other in zip(first, again, strict=True)
            )
            wrong += min(checked, first_wrong + unequal)
            _poison(again)
        return (1 + _REPEATS) * checked, wrong

    def gpu_same_memory(self) -> tuple[int, int]:
        """Steps into the same memory, as with a captured graph."""
        lookup = self._any_module()
        checked = wrong = 0
        for _ in range(_STEPS_SAME):
            batch = self._traffic.decode(_SEQUENCES_SAME)
            out = self._out(lookup)
            if out is None:
                found = self._embeddings(lookup, batch)
            else:
                _poison([out])
                after = self._poisoned() if self._rng.random() < 0.5 else None
                lookup.prepare(*_tensors(batch), out, after).wait()
                found = list(out)
            rows, not_right = self._check(lookup, batch, found)
            checked, wrong = checked + rows, wrong + not_right
        return checked, wrong

    def gpu_ahead(self) -> tuple[int, int]:
        """Steps of one module under way at once."""
        lookup = self._any_module()
        return self._under_way([lookup] * _STEPS_AHEAD, self._any_batches(_STEPS_AHEAD))

    def gpu_everywhere(self) -> tuple[int, int]:
        """A step of every module, all under way at once; and again, with what is there now."""
        batches = self._any_batches(len(self._modules))
        done = [self._under_way(self._modules, batches) for _ in range(2)]
        return sum(checked for checked, _ in done), sum(wrong for _, wrong in done)

    def gpu_prefetched(self) -> tuple[int, int]:
        """Ask ahead, then take the step: at once, or a moment later."""
        lookup, (batch,) = self._any_module(), self._any_batches(1)
        self._prefetches.append(lookup.prefetch(*_tensors(batch)))
        time.sleep(self._rng.choice([0.0, 0.005, 0.05]))
        return self._step(lookup, batch)

    def gpu_cancelled(self) -> tuple[int, int]:
        """Ask ahead and think better of it; take the step all the same, half of the times."""
        lookup, (batch,) = self._any_module(), self._any_batches(1)
        handle = lookup.prefetch(*_tensors(batch))
        time.sleep(self._rng.choice([0.0, 0.002]))
        handle.cancel()
        return self._step(lookup, batch) if self._rng.random() < 0.5 else (0, 0)

    def gpu_together(self) -> tuple[int, int]:
        """Two steps by two threads at once."""
        lookups = [self._any_module() for _ in range(2)]
        steps = zip(lookups, self._any_batches(2), strict=True)
        return together([functools.partial(self._step, *step) for step in steps])

    @property
    def _dim(self) -> int:
        return self._table.row_format.dim

    def _any_module(self) -> EngramLookup:
        return self._modules[self._rng.integers(len(self._modules))]

    def _any_batches(self, count: int) -> list[Batch]:
        kinds = (self._traffic.decode, self._traffic.fresh, self._traffic.prefill)
        return [kinds[self._rng.choice(3, p=(0.5, 0.3, 0.2))]() for _ in range(count)]

    def _on_some_stream(self, work: Work) -> Work:
        """The same work, half of the times on a stream that is not the default one."""

        @functools.wraps(work)
        def do() -> tuple[int, int]:
            with cuda.stream(self._stream if self._rng.random() < 0.5 else None):
                return work()

        return do

    def _step(self, lookup: EngramLookup, batch: Batch) -> tuple[int, int]:
        found = self._embeddings(lookup, batch)
        done = self._check(lookup, batch, found)
        _poison(found)
        return done

    def _embeddings(self, lookup: EngramLookup, batch: Batch) -> list[torch.Tensor]:
        rows = lookup(*_tensors(batch))
        return [rows[layer] for layer in lookup.layers]

    def _under_way(
        self, lookups: Sequence[EngramLookup], batches: Sequence[Batch]
    ) -> tuple[int, int]:
        """Begin all steps before the first one is waited for."""
        steps = list(zip(lookups, batches, strict=True))
        begun = [lookup.prepare(*_tensors(batch)) for lookup, batch in steps]
        checked = wrong = 0
        for (lookup, batch), rows in zip(steps, begun, strict=True):
            found = [rows[layer] for layer in lookup.layers]
            right_and_wrong = self._check(lookup, batch, found)
            _poison(found)
            checked, wrong = checked + right_and_wrong[0], wrong + right_and_wrong[1]
        return checked, wrong

    def _out(self, lookup: EngramLookup) -> torch.Tensor | None:
        """Always the same; None where there is no GPU tier, which rows of the host's are for."""
        if not (lookup.hbm or self._stream):
            return None
        if lookup not in self._outs:
            shape = (len(lookup.layers), _SEQUENCES_SAME, lookup.embedding_dim)
            self._outs[lookup] = torch.empty(shape, dtype=lookup.dtype, device=self._device)
        return self._outs[lookup]

    def _poisoned(self) -> Any:
        """An event behind what the current stream has queued; None without streams."""
        return cuda.current_stream().record_event() if self._stream else None

    def _check(
        self, lookup: EngramLookup, batch: Batch, found: Sequence[torch.Tensor]
    ) -> tuple[int, int]:
        places = [self._table.layers.index(layer) for layer in lookup.layers]
        row_ids = batch.row_ids(self._table.spec)[:, places][:, :, list(lookup.columns)]
        for each in found:
            assert each.shape == (len(batch.tokens), lookup.embedding_dim)
        checker = EmbeddingChecker(self._told.table_seed, self._table.row_format)
        return row_ids.size, checker.wrong_rows(lookup.layers, row_ids, found)


def _modules(table: Table, told: Told, rng: np.random.Generator, device: str) -> list[EngramLookup]:
    """One of everything, with too little memory; three of any part: with enough memory, with next
    to none, and with none.

    All clients of a run have the same parts, because each is compiled for.
    """
    shared = np.random.default_rng([told.traffic_seed, 1 << 33])

    def some(of: Sequence[int]) -> list[int]:
        chosen: list[int] = shared.permutation(of)[: shared.integers(1, len(of) + 1)].tolist()
        return chosen

    parts = [(list(table.layers), list(table.columns))]
    parts += [(some(table.layers), some(table.columns)) for _ in range(3)]
    first = int(shared.integers(len(_DTYPES)))
    modules = []
    for number, (layers, columns) in enumerate(parts):
        dtype = _DTYPES[(first + number) % len(_DTYPES)]
        # At least as much as an n-gram takes.
        each = len(layers) * len(columns) * table.row_format.row_bytes + _LINE_BYTES
        ngrams = int(rng.integers(*_NGRAMS[number]))
        modules.append(EngramLookup(table, dtype, layers, columns, device, ngrams * each))
    return modules


def _tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As modules take them: tokens, starts, history, dead."""
    dead = None if batch.dead is None else torch.from_numpy(batch.dead)
    tokens, starts, history = map(torch.from_numpy, (batch.tokens, batch.starts, batch.history))
    return tokens, starts, history, dead


def _poison(used: Sequence[torch.Tensor]) -> None:
    """Memory that is used again must not look as if it had been written."""
    for each in used:
        each.fill_(_POISON)


def run(facts: dict[str, Any]) -> None:
    """As `engram.torture.client.run`, with modules."""
    client.run(facts, GpuClient)
