"""`engram inspect`: what a table is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def facts_of(path: Path) -> dict[str, Any]:
    """Facts of the table at `path`, read from its manifest.

    Raises:
        StoreError: no table there, or its manifest is damaged.
    """
    from engram.store.manifest import read_manifest

    manifest, physical = read_manifest(path)
    spec = json.loads(manifest.spec)
    return {
        "table": str(path),
        "family": spec["family"],
        "layers": [layer for layer, _ in manifest.layers],
        "rows": [rows for _, rows in manifest.layers],
        "orders": list(range(spec["min_order"], spec["max_order"] + 1)),
        "heads": spec["heads"],
        "row_format": manifest.row_format.name,
        "dim": manifest.row_format.dim,
        "row_bytes": manifest.row_format.row_bytes,
        "global_scale": manifest.row_format.global_scale,
        "file_bytes": physical.file_bytes,
        "extents": len(manifest.extents),
        "rows_per_block": manifest.layout.rows_per_block,
        "token_map": manifest.token_map_digest,
        "source": manifest.source,
        "fingerprint": manifest.fingerprint,
    }


def register(app: typer.Typer) -> None:
    @app.command()
    def inspect(
        path: Path = typer.Argument(help="The table's directory.", metavar="PATH"),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Show what a table holds: family, layers, rows, format, size, fingerprint.

        Example: engram inspect /srv/engram/qwen --json
        """
        from engram.cli._output import print_facts

        print_facts(facts_of(path), as_json)
