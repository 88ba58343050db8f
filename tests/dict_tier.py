"""A tier of plain Python over synthetic rows: the model that every real tier must agree with."""

from __future__ import annotations

import numpy as np

from engram.errors import RowIntegrityError, StoreError
from engram.store.synth import synthetic_rows
from engram.tiers import Prefetch, Tier


class DictTier(Tier):
    """Rows of a synthetic table, hashed and written one by one.

    `damaged` holds (model layer, row id) pairs that fail as rows on disk do.
    """

    name = "model"

    def __init__(self, spec, row_format, table_seed, damaged=()):
        self.spec = spec
        self.row_format = row_format
        self.fingerprint = "0" * 32
        self.table_seed = table_seed
        self.damaged = set(damaged)
        self.closed = False
        self.prefetched = []

    def read(self, ngrams, selection, out, places):
        self._require_open()
        wanted = []
        for window, order in zip(ngrams.windows, ngrams.orders, strict=True):
            for position in selection.layers:
                layer = self.spec.layers[position]
                word = 0
                for s in range(int(order)):
                    word ^= int(window[s]) * layer.multipliers[s]
                word = (word + 2**63) % 2**64 - 2**63
                for column in selection.columns:
                    if self.spec.min_order + column // self.spec.heads == order:
                        row = word % layer.primes[column] + layer.offsets[column]
                        wanted.append((layer.layer, row))
        self._write(wanted, out, places)

    def read_rows(self, layer, row_ids, out, places):
        self._require_open()
        self._write([(self.spec.layer_ids[layer], int(row)) for row in row_ids], out, places)

    def _write(self, wanted, out, places):
        assert len(wanted) == len(places)
        failures = {}
        for (layer, row), place in zip(wanted, places, strict=True):
            if (layer, row) in self.damaged:
                failures.setdefault(layer, []).append(row)
                continue
            packed = synthetic_rows(self.table_seed, self.row_format, layer, np.array([row]))[0]
            out.values[place] = packed[: self.row_format.value_bytes]
            if out.scales is not None:
                out.scales[place] = packed[self.row_format.value_bytes :]
        if failures:
            raise RowIntegrityError.of(failures, self.name)

    def prefetch(self, ngrams):
        self._require_open()
        self.prefetched.append(ngrams)
        return Prefetch()

    def _require_open(self):
        if self.closed:
            raise StoreError("the table is closed; open it again")

    def stats(self):
        return {"tier": "model"}

    def close(self):
        self.closed = True
