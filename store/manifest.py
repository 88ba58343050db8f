"""The manifest: what a table is, and what its file must look like.

It is kept twice: without the physical part inside the LMDB environment (key `MANIFEST_KEY`), and
whole, with a digest of itself, in `table.json` beside the data file. The second one is what
proves the LMDB pages sound before LMDB looks at them.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engram.errors import CorruptTableError, EngramError, StoreError
from engram.rows import RowFormat
from engram.store.checks import digest
from engram.store.layout import BlockLayout

FORMAT_VERSION = 1
DATA_FILE = "data.mdb"
MANIFEST_FILE = "table.json"
MANIFEST_KEY = b"\xff\xff\xff\xff" + b"manifest"
TOKEN_MAP_KEY = b"\xff\xff\xff\xff" + b"token_map"

_EXTENT_KEY = struct.Struct(">IQ")


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
    def from_dict(cls, fields: dict[str, Any]) -> Manifest:
        """Rebuild from `to_dict`.

        Raises:
            StoreError: another format version.
            CorruptTableError: a field is missing or malformed, or the fingerprint disagrees.
        """
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise StoreError(
                f"table format version {version} cannot be read; this engram reads version "
                f"{FORMAT_VERSION}: import the table again or use a matching engram"
            )
        try:
            manifest = cls(
                spec=str(fields["spec"]),
                row_format=RowFormat.from_dict(fields["row_format"]),
                layers=tuple((int(layer), int(rows)) for layer, rows in fields["layers"]),
                token_map_digest=fields["token_map_digest"],
                table_seed=int(fields["table_seed"]),
                extent_blocks=int(fields["extent_blocks"]),
                extents=tuple(Extent(*extent) for extent in fields["extents"]),
                source=dict(fields["source"]),
            )
        except (KeyError, TypeError, ValueError, EngramError) as error:
            raise CorruptTableError(f"the manifest is malformed ({error}); import again") from None
        if manifest.fingerprint != fields.get("fingerprint"):
            raise CorruptTableError("the manifest's fingerprint disagrees with its content")
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
    path = directory / MANIFEST_FILE
    try:
        whole = json.loads(path.read_bytes())
        found = whole.pop("digest")
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    except FileNotFoundError:
        raise StoreError(
            f"{directory} is not a table: it has no {MANIFEST_FILE}; "
            "make one with 'engram import' or 'engram synth'"
        ) from None
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error.strerror}; check its permissions"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CorruptTableError(f"{path} is damaged; import the table again") from None
    if found != digest(text.encode()):
        raise CorruptTableError(f"{path} does not match its own digest; import the table again")
    manifest = Manifest.from_dict(whole["manifest"])
    fields = dict(whole["physical"])
    fields["extent_pages"] = tuple(fields["extent_pages"])
    return manifest, Physical(**fields)
