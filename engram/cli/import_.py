"""`engram import`: a checkpoint's tables into a directory of their own."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    @app.command("import")
    def import_(
        source: Path = typer.Argument(
            help="Checkpoint directory: config.json, *.safetensors, tokenizer.json.", metavar="SRC"
        ),
        destination: Path = typer.Argument(
            help="Directory to create for the table.", metavar="DEST"
        ),
        as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    ) -> None:
        """Import the n-gram tables of a checkpoint.

        Works on DeepSeek-V4.1, Qwen4Exp (published, or saved with save_pretrained) and the
        DeepSeek Engram demo. Nothing is visible at DEST before every byte was read back and
        verified; after a kill, the same command goes on where it stopped.

        Example: engram import ./Qwen3.8-Flash-Next /srv/engram/qwen
        """
        from engram.checkpoint import open_checkpoint
        from engram.cli._output import TO_GO_ON, print_facts, progress_bar
        from engram.cli.inspect import facts_of
        from engram.spec import NgramSpec
        from engram.store.readback import warm_up
        from engram.store.writer import build_table

        warm_up()
        spec = NgramSpec.from_pretrained(source)
        schema, rows = open_checkpoint(source, spec)
        with progress_bar(f"importing {destination.name}", TO_GO_ON) as progress:
            build_table(destination, schema, rows, progress=progress)
        print_facts(facts_of(destination), as_json)
