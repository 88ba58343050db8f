"""`engram doctor`: what is wrong with a running sidecar or a table's place, and what to change."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import typer

from engram.cli.stats import DEFAULT


def register(app: typer.Typer) -> None:
    @app.command()
    def doctor(
        target: str | None = typer.Argument(
            None,
            help="Where the sidecar answers HTTP: what serve was told with --http. If left out, "
            f"ENGRAM_HTTP, else {DEFAULT}; with --path, none.",
            metavar="[HOST:PORT]",
            show_default=False,
        ),
        path: Path | None = typer.Option(
            None, help="Look at the table there, whether it is served or not.", metavar="TABLE"
        ),
        as_json: bool = typer.Option(False, "--json", help="Print the findings as JSON."),
    ) -> None:
        """Say what is wrong with a sidecar, its machine and its tables, and what to change.

        Figures are those since the sidecar's start. Exits 1 if anything is wrong.

        Example: engram doctor 127.0.0.1:9471
        """
        from engram.cli._checks import findings
        from engram.cli._facts import facts_of
        from engram.cli._readings import Reading
        from engram.cli.stats import read_metrics

        if target is None and path is None:
            target = os.environ.get("ENGRAM_HTTP") or DEFAULT
        reading = Reading.of(read_metrics(target)) if target is not None else None
        facts = facts_of(reading, target, path)
        found = findings(facts)
        if as_json:
            said = {"findings": [asdict(each) for each in found], "unseen": facts.unseen}
            typer.echo(json.dumps(said, indent=1))
        else:
            # Plain lines, whatever their length: they are searched and cut by other programs.
            for each in found:
                typer.echo(each.says)
            for what in facts.unseen:
                typer.echo(f"not looked at: {what}")
            if not found:
                typer.echo("nothing is wrong")
        raise typer.Exit(1 if found else 0)
