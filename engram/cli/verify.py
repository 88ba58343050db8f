"""`engram verify`: read every byte of a table and say what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def verify(
        path: Path = typer.Argument(help="The table's directory.", metavar="PATH"),
        as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
    ) -> None:
        """Check every row, every block's slack, LMDB's own pages and the manifest.

        Exits 1 and lists exactly the damaged blocks when anything is not as it was written.

        Example: engram verify /srv/engram/qwen --json
        """
        from engram.cli._output import progress_bar
        from engram.store.verify import verify_table

        with progress_bar(f"verifying {path.name}") as progress:
            report = verify_table(path, progress=progress)
        if as_json:
            typer.echo(json.dumps(report.to_dict(), indent=1))
        else:
            # Plain lines, whatever their length: they are searched and cut by other programs.
            for line in report.lines():
                typer.echo(line)
        raise typer.Exit(0 if report.sound else 1)
