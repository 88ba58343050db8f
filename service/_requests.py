"""Requests turned into reads: every number checked before anything is allocated for it.

A read is served in pieces of bounded size, each whole n-grams or single rows, so that a large
request needs no more memory than a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engram._wire import unpack_ngrams, unpack_row_ids
from engram.errors import RequestError
from engram.proto.v1 import engram_pb2 as pb
from engram.rows import Rows
from engram.tiers import Int64s, Ngrams, Selection, Tier


@dataclass(frozen=True)
class Piece:
    """Some consecutive rows of a request: how many, and how to read them in order."""

    rows: int
    read: Callable[[Rows, Int64s], None]


@dataclass(frozen=True)
class Read:
    """A valid request.

    Attributes:
        rows: of the whole request.
        pieces: all of them, in order.
    """

    rows: int
    pieces: Iterator[Piece]


def read_of(request: pb.LookupRequest, tier: Tier, rows_max: int, piece_rows: int) -> Read:
    """Check a request.

    Args:
        rows_max: most rows a request may ask for.
        piece_rows: rows in a piece, if one n-gram does not already have more.

    Raises:
        RequestError: it is malformed, or asks for too much.
    """
    if request.request_id == 0:
        raise RequestError("the request has no request_id; number requests from 1")
    match request.WhichOneof("rows_of"):
        case "ngrams":
            return _read_ngrams(request.ngrams, tier, rows_max, piece_rows)
        case "rows":
            return _read_rows(request.rows, tier, rows_max, piece_rows)
        case _:
            raise RequestError("the request names neither n-grams nor rows")


def prefetch_of(packed: pb.Ngrams, tier: Tier, rows_max: int) -> Ngrams:
    """Check n-grams whose rows of all layers and columns are wanted.

    Raises:
        RequestError: they are malformed, or have more rows than `rows_max`.
    """
    ngrams = _ngrams(packed, tier)
    _limit(ngrams.row_count(Selection.of(tier.spec)), rows_max)
    return ngrams


def _ngrams(packed: pb.Ngrams, tier: Tier) -> Ngrams:
    spec = tier.spec
    return unpack_ngrams(packed, spec.min_order, spec.max_order, spec.canonical_vocab_size)


def _read_ngrams(packed: pb.NgramLookup, tier: Tier, rows_max: int, piece_rows: int) -> Read:
    spec = tier.spec
    selection = Selection(
        _positions("layer", packed.layers, len(spec.layers)),
        _positions("column", packed.columns, spec.num_columns),
        spec.heads,
        spec.min_order,
        spec.num_orders,
    )
    ngrams = _ngrams(packed.ngrams, tier)
    rows = ngrams.row_count(selection)
    _limit(rows, rows_max)
    widest = len(selection.layers) * int(np.diff(selection.order_bounds).max())
    step = max(1, piece_rows // widest)

    def pieces() -> Iterator[Piece]:
        for at in range(0, len(ngrams), step):
            some = Ngrams(ngrams.windows[at : at + step], ngrams.orders[at : at + step])

            def read(out: Rows, places: Int64s, some: Ngrams = some) -> None:
                tier.read(some, selection, out, places)

            yield Piece(some.row_count(selection), read)

    return Read(rows, pieces())


def _read_rows(packed: pb.RowLookup, tier: Tier, rows_max: int, piece_rows: int) -> Read:
    (layer,) = _positions("layer", [packed.layer], len(tier.spec.layers))
    _limit(len(packed.row_ids) // 8, rows_max)
    row_ids = unpack_row_ids(packed.row_ids, tier.spec.layers[layer].rows)

    def pieces() -> Iterator[Piece]:
        for at in range(0, len(row_ids), piece_rows):
            some = row_ids[at : at + piece_rows]

            def read(out: Rows, places: Int64s, some: Int64s = some) -> None:
                tier.read_rows(layer, some, out, places)

            yield Piece(len(some), read)

    return Read(len(row_ids), pieces())


def _positions(what: str, asked: Sequence[int], count: int) -> tuple[int, ...]:
    if not 0 < len(asked) <= count or len(set(asked)) < len(asked) or max(asked) >= count:
        raise RequestError(
            f"the request must name {what}s of this table, each once, as 0 to {count - 1}"
        )
    return tuple(asked)


def _limit(rows: int, rows_max: int) -> None:
    if rows > rows_max:
        raise RequestError(
            f"the request asks for {rows} rows, but at most {rows_max} are served at once; split it"
        )
