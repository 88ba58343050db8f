"""What a sidecar says about a table, turned into what lookups need."""

from __future__ import annotations

import numpy as np

from engram.errors import SpecMismatchError
from engram.proto.v1 import engram_pb2 as pb
from engram.rows import RowFormat
from engram.spec import NgramSpec
from engram.store.checks import digest

REQUEST_ROWS_MAX = 1 << 14
"""Rows asked for at once: enough to read at depth, few enough that several requests overlap."""


def items_per_request(limits: pb.Limits, rows_each: int, bytes_each: int) -> int:
    """How many items one request may name, each of at most so many rows and bytes."""
    rows = min(limits.max_rows, REQUEST_ROWS_MAX)
    # What is not items: table name, fingerprint, selection.
    room = limits.max_message_bytes - 65536
    return max(1, min(rows // max(1, rows_each), room // bytes_each))


def spec_of(table: pb.GetTableResponse) -> NgramSpec:
    """The spec of a table, as it is understood here.

    Raises:
        SpecMismatchError: it means something else to this version of engram.
    """
    if len(table.token_map) % 4:
        raise SpecMismatchError(
            f"the token map of {table.name} came as {len(table.token_map)} bytes, which are not "
            "whole ids of 4; use versions of engram that match",
            "token_map",
        )
    token_map = np.frombuffer(table.token_map, "<i4").astype(np.int32) if table.token_map else None
    spec = NgramSpec.from_json(table.spec, token_map)
    if spec.digest != digest(table.spec.encode()):
        raise SpecMismatchError(
            f"the spec of {table.name} means something else here than at the sidecar; "
            "use versions of engram that match",
            "digest",
        )
    ours = [(layer.layer, layer.rows) for layer in spec.layers]
    if ours != [(layer.layer, layer.rows) for layer in table.layers]:
        raise SpecMismatchError(
            f"the layers of {table.name} are not those of its spec; import the table again",
            "layers",
        )
    return spec


def row_format_of(table: pb.GetTableResponse, spec: NgramSpec) -> RowFormat:
    """The row format of a table of `spec`.

    Raises:
        SpecMismatchError: rows of another width than the spec's.
    """
    packed = table.row_format
    scale = packed.global_scale if packed.HasField("global_scale") else None
    if packed.dim != spec.dim:
        raise SpecMismatchError(
            f"the rows of {table.name} have {packed.dim} values, those of its spec {spec.dim}; "
            "import the table again",
            "dim",
        )
    return RowFormat(packed.name, packed.dim, scale)
