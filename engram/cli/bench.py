"""`engram bench`: what this machine does with a table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def bench(
        path: Path = typer.Argument(help="The table's directory.", metavar="PATH"),
        guard: bool = typer.Option(
            True, help="Read through the map, as the sidecar does; else with pread."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    ) -> None:
        """Measure hashing, hits, warm and cold lookups of a table: medians, least and greatest.

        Hits repeat n-grams that are in the RAM tier, warm lookups such as are in the page cache;
        cold ones read fresh n-grams after the file was dropped from it. Tokens are uniform: the
        worst case for any cache.

        Example: engram bench /srv/engram/qwen
        """
        from rich.table import Table as Grid

        from engram import bench as measure
        from engram.cli._output import console
        from engram.table import open

        with open(path, guard=guard) as table:
            figures = [measure.hash_cost(table.spec)]
            figures += [measure.repeated_lookup(table, tokens, "hits") for tokens in (1, 64, 2048)]
        with open(path, ram=0, guard=guard) as table:
            figures += [
                measure.repeated_lookup(table, tokens, "warm lookup") for tokens in (1, 64, 2048)
            ]
        for batch in (64, 2048):
            runs = [
                measure.cold_rate(path, max(batch, 2048), batch, run, guard=guard)
                for run in range(5)
            ]
            figures.append(
                measure.Figure.of(
                    f"cold lookups, {batch:,} tokens each",
                    "rows/s",
                    [rate for rate, _ in runs],
                    measure.checksum(*(found for _, found in runs)),
                )
            )
        if as_json:
            import json

            typer.echo(json.dumps([asdict(figure) for figure in figures], indent=1))
            return
        grid = Grid("", "median", "least", "greatest", "unit")
        for figure in figures:
            grid.add_row(
                figure.what,
                f"{figure.median:,.1f}",
                f"{figure.least:,.1f}",
                f"{figure.greatest:,.1f}",
                figure.unit,
            )
        console.print(grid)
        for figure in figures:
            typer.echo(f"checksum {figure.checksum}  {figure.what}")
