"""`engram warm`: n-grams into a sidecar's RAM tier before anybody asks for them."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def warm(
        target: str = typer.Argument(help="The sidecar: unix:PATH or HOST:PORT."),
        trace: Path = typer.Argument(
            help="A trace, from 'engram trace record', or a hot set of a sidecar.", metavar="TRACE"
        ),
        table: str | None = typer.Option(
            None, help="Of several tables, which.", metavar="NAME", show_default=False
        ),
        rate: float = typer.Option(20_000.0, min=1.0, help="N-grams a second, at most."),
        as_json: bool = typer.Option(False, "--json", help="Print what was done as JSON."),
    ) -> None:
        """Have a sidecar read the n-grams of a trace into its RAM tier.

        They are prefetched: lookups go first, and admission decides what stays.

        Example: engram warm unix:/run/engram/engram.sock qwen.trace
        """
        import time

        import engram
        from engram.cli._output import print_facts, progress_bar
        from engram.service.hot_set import ngrams_of, prefetch_slowly
        from engram.sizing.trace import read_trace

        recorded = read_trace(trace)
        with engram.connect(target, table) as connected:
            recorded.require_table(connected.fingerprint, connected.name)
            ngrams = ngrams_of(recorded)

            def wait(seconds: float) -> bool:
                time.sleep(seconds)
                return False

            with progress_bar("warming up", unit="n-grams") as progress:
                asked = prefetch_slowly(connected._tier, ngrams, rate, wait, progress)
        print_facts({"table": connected.name, "ngrams": asked}, as_json)
