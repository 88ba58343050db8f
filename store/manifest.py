"""The manifest: what a table is, and what its file must look like.

It is kept twice: without the physical part inside the LMDB environment (key `MANIFEST_KEY`), and
whole, with a digest of itself, in `table.json` beside the data file. The second one is what
proves the LMDB pages sound before LMDB looks at them.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import numpy.typing as npt

from engram.errors import CorruptTableError, EngramError, StoreError
from engram.rows import RowFormat
from engram.store.checks import digest
from engram.store.files import read_regular
from engram.store.layout import PAGE_BYTES, PAGE_HEADER_BYTES, BlockLayout

FORMAT_VERSION = 1
DATA_FILE = "data.mdb"
MANIFEST_FILE = "table.json"
MANIFEST_KEY = b"\xff\xff\xff\xff" + b"manifest"
TOKEN_MAP_KEY = b"\xff\xff\xff\xff" + b"token_map"

_EXTENT_KEY = struct.Struct(">IQ")
_LAYER_LIMIT = 2**31
_ROW_LIMIT = 2**62
_BLOCK_LIMIT = 2**31
_BYTE_LIMIT = 2**63
_TOKEN_MAP_LIMIT = 2**33
_DEPTH_MAX = 16
_DIGEST = re.compile("[0-9a-f]{32}")


def extent_key(layer: int, first_row: int) -> bytes:
    """LMDB key of an extent: sorts by layer, then by row."""
    return _EXTENT_KEY.pack(layer, first_row)


@dataclass(frozen=True)
class Schema:
    """What a table is to hold, before any byte of it exists.

    Attributes:
        spec: canonical JSON of the `NgramSpec`; opaque to the store.
        row_format: format of every row.
        layers: (model layer index, number of rows), ascending by layer.
        token_map: int32 `[vocab]`, or None for families without tokenizer compression.
    """

    spec: str
    row_format: RowFormat
    layers: tuple[tuple[int, int], ...]
    token_map: npt.NDArray[np.int32] | None = None

    @property
    def token_map_digest(self) -> str | None:
        return None if self.token_map is None else digest(self.token_map)


@dataclass(frozen=True)
class Extent:
    """Consecutive rows of one layer in one LMDB value.

    `digest` covers the packed rows only, so it is the same wherever and however they are stored.
    """

    layer: int
    first_row: int
    rows: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """Identity and content of a table, independent of where its bytes lie.

    Attributes:
        source: where the rows came from, for people: kind, names, sizes, digest.
        table_seed: seeds the row checks; see `engram.store.checks`.
        extent_blocks: blocks of a full extent.
    """

    spec: str
    row_format: RowFormat
    layers: tuple[tuple[int, int], ...]
    token_map_digest: str | None
    table_seed: int
    extent_blocks: int
    extents: tuple[Extent, ...]
    source: dict[str, Any]

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout(self.row_format.row_bytes, self.extent_blocks)

    @property
    def fingerprint(self) -> str:
        """xxh3-128 of spec, row format, token map and rows: equal for equal content."""
        return digest(
            self.spec.encode(),
            json.dumps(self.row_format.to_dict(), sort_keys=True).encode(),
            (self.token_map_digest or "").encode(),
            "".join(extent.digest for extent in self.extents).encode(),
        )

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        fields["row_format"] = self.row_format.to_dict()
        return {
            "format_version": FORMAT_VERSION,
            **fields,
            "extents": [[e.layer, e.first_row, e.rows, e.digest] for e in self.extents],
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_dict(cls, fields: Any) -> Manifest:
        """Rebuild from `to_dict`.

        Raises:
            StoreError: another format version.
            CorruptTableError: a field is missing or malformed, or the fingerprint disagrees.
        """
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if type(version) is int and version != FORMAT_VERSION:
            raise StoreError(
                f"table format version {short(version)} cannot be read; this engram reads version "
                f"{FORMAT_VERSION}: import the table again or use a matching engram"
            )
        try:
            manifest = cls._parsed(fields)
        except (ValueError, OverflowError, EngramError) as error:
            raise CorruptTableError(f"the manifest is malformed ({error}); import again") from None
        if manifest.fingerprint != fields["fingerprint"]:
            raise CorruptTableError("the manifest's fingerprint disagrees with its content")
        return manifest

    @classmethod
    def _parsed(cls, fields: Any) -> Manifest:
        names = {"format_version", "fingerprint", *cls.__dataclass_fields__}
        _object(fields, names)
        _integer(fields["format_version"], FORMAT_VERSION, FORMAT_VERSION + 1)
        _shallow(fields["source"])
        layers = tuple(_layer(each) for each in _list(fields["layers"]))
        mapped = fields["token_map_digest"]
        seen = [layer for layer, _ in layers]
        if not seen or seen != sorted(set(seen)):
            raise ValueError("its layers are not in ascending order")
        manifest = cls(
            spec=_text(fields["spec"]),
            row_format=_row_format(fields["row_format"]),
            layers=layers,
            token_map_digest=None if mapped is None else _digest(mapped),
            table_seed=_integer(fields["table_seed"], 0, 2**64),
            extent_blocks=_integer(fields["extent_blocks"], 1, _BLOCK_LIMIT),
            extents=tuple(_extent(each) for each in _list(fields["extents"])),
            source=_object(fields["source"]),
        )
        # Before anybody lists them: a layer can claim more than fit any memory.
        if sum(manifest.layout.extents(rows) for _, rows in layers) != len(manifest.extents):
            raise ValueError("its extents do not add up to its layers")
        return manifest


@dataclass(frozen=True)
class Physical:
    """Where the bytes lie in the data file.

    Attributes:
        file_bytes: size of the data file.
        extent_pages: first page of each extent's value, in the manifest's order.
        token_map_page: first page of the token map's value, or None.
        token_map_bytes: its length, 0 without one.
        tree_digest: digest of every page that holds no rows.
    """

    file_bytes: int
    extent_pages: tuple[int, ...]
    token_map_page: int | None
    token_map_bytes: int
    tree_digest: str

    @classmethod
    def from_dict(cls, fields: Any) -> Physical:
        """Rebuild from a dictionary of the attributes.

        Raises:
            CorruptTableError: one is missing, malformed or outside the file.
        """
        try:
            return cls._parsed(fields)
        except ValueError as error:
            raise CorruptTableError(
                f"{MANIFEST_FILE} is malformed ({error}); import the table again"
            ) from None

    @classmethod
    def _parsed(cls, fields: Any) -> Physical:
        _object(fields, set(cls.__dataclass_fields__))
        size = _integer(fields["file_bytes"], 0, _BYTE_LIMIT)
        pages = size // PAGE_BYTES + 1
        place, length = fields["token_map_page"], fields["token_map_bytes"]
        found = cls(
            file_bytes=size,
            extent_pages=tuple(_integer(each, 0, pages) for each in _list(fields["extent_pages"])),
            token_map_page=None if place is None else _integer(place, 0, pages),
            token_map_bytes=_integer(length, 0, _TOKEN_MAP_LIMIT),
            tree_digest=_digest(fields["tree_digest"]),
        )
        if place is not None and place * PAGE_BYTES + PAGE_HEADER_BYTES + length > size:
            raise ValueError("the token map leaves the file")
        return found


def _object(value: Any, names: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{short(value)} is not an object")
    if names is not None and set(value) != names:
        raise ValueError(f"missing or unknown: {short(sorted(set(value) ^ names))}")
    return value


def _list(value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ValueError(f"{short(value)} is not a list of {length or 'any'} entries")
    return value


def _integer(value: Any, low: int, limit: int) -> int:
    if type(value) is not int or not low <= value < limit:
        raise ValueError(f"{short(value)} is not an integer from {low} to {limit - 1}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{short(value)} is not a text")
    value.encode()  # A lone surrogate is a ValueError, too.
    return value


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{short(value)} is not a digest")
    return value


def _shallow(value: Any, depth: int = 0) -> None:
    """Refuse what is nested so deep that copying it could exhaust the stack."""
    if depth > _DEPTH_MAX:
        raise ValueError("it is nested too deep")
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _shallow(each, depth + 1)


def _layer(value: Any) -> tuple[int, int]:
    layer, rows = _list(value, 2)
    return _integer(layer, 0, _LAYER_LIMIT), _integer(rows, 1, _ROW_LIMIT)


def _extent(value: Any) -> Extent:
    layer, first_row, rows, found = _list(value, 4)
    return Extent(
        _integer(layer, 0, _LAYER_LIMIT),
        _integer(first_row, 0, _ROW_LIMIT),
        _integer(rows, 1, _ROW_LIMIT),
        _digest(found),
    )


def _row_format(value: Any) -> RowFormat:
    fields = _object(value, {"name", "dim", "global_scale"})
    scale = fields["global_scale"]
    if scale is not None and type(scale) not in (int, float):
        raise ValueError(f"{short(scale)} is not a scale")
    _integer(fields["dim"], 1, _BLOCK_LIMIT)
    return RowFormat(_text(fields["name"]), fields["dim"], scale)


def write_manifest(directory: Path, manifest: Manifest, physical: Physical) -> None:
    """Write `table.json`; the caller syncs the directory."""
    body = {"manifest": manifest.to_dict(), "physical": asdict(physical)}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    whole = json.dumps({"digest": digest(text.encode()), **body}, sort_keys=True, indent=1)
    (directory / MANIFEST_FILE).write_text(whole + "\n")


def read_manifest(directory: Path) -> tuple[Manifest, Physical]:
    """Read and verify `table.json`.

    Raises:
        StoreError: no table there, or one of another format version.
        CorruptTableError: damaged.
    """
    return parse_manifest(manifest_text(directory), str(directory / MANIFEST_FILE))


def manifest_text(directory: Path) -> bytes:
    """What `table.json` holds, unverified.

    Raises:
        StoreError: no table there, or one that cannot be read.
    """
    path = directory / MANIFEST_FILE
    try:
        return read_regular(path)
    except FileNotFoundError:
        raise StoreError(
            f"{directory} is not a table: it has no {MANIFEST_FILE}; "
            "make one with 'engram import' or 'engram synth'"
        ) from None
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error.strerror}; check its permissions"
        ) from None


def parse_manifest(text: bytes, name: str) -> tuple[Manifest, Physical]:
    """Verify the content of a `table.json`, which messages call `name`.

    Raises:
        StoreError: of another format version.
        CorruptTableError: damaged.
    """
    try:
        whole = json.loads(text)
        found = whole.pop("digest")
        body = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CorruptTableError(f"{name} is damaged; import the table again") from None
    if found != digest(body.encode()):
        raise CorruptTableError(f"{name} does not match its own digest; import the table again")
    return Manifest.from_dict(whole.get("manifest")), Physical.from_dict(whole.get("physical"))
