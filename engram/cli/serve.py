"""`engram serve`: the sidecar."""

from __future__ import annotations

from pathlib import Path

import typer

CONFIG = typer.Option(None, help="TOML file; flags add to it and win over it.", metavar="FILE")
TABLE = typer.Option(
    [], help="Serve the table at PATH as NAME; may be repeated.", metavar="NAME=PATH"
)
LISTEN = typer.Option([], help="unix:PATH, or tcp:HOST:PORT; may be repeated.", metavar="ADDRESS")
RAM = typer.Option(
    None,
    help="Memory for what is read often, like 8GiB; 0 for none. If left out, a quarter of "
    "what this process may have, or the tables' size if that is less.",
    metavar="SIZE",
)
HTTP = typer.Option(
    None,
    help="Where /metrics, /livez and /readyz are, 127.0.0.1:9471 if left out; 'off' for none.",
    metavar="HOST:PORT",
)
HTTP_PUBLIC = typer.Option(
    False, "--http-public", help="Allow an --http address that other hosts can reach."
)


def register(app: typer.Typer) -> None:
    @app.command()
    def serve(
        config: Path | None = CONFIG,
        table: list[str] = TABLE,
        listen: list[str] = LISTEN,
        ram: str | None = RAM,
        http: str | None = HTTP,
        http_public: bool = HTTP_PUBLIC,
    ) -> None:
        """Serve tables to the model processes of this host until SIGTERM.

        Example: engram serve --table qwen=/srv/engram/qwen --listen unix:/run/engram/engram.sock
        --ram 8GiB
        """
        from engram.cli._output import announce_compilation
        from engram.service.config import load_config
        from engram.service.server import run

        settings = load_config(
            config, tables=table, listen=listen, ram=ram, http=http, http_public=http_public
        )
        announce_compilation()
        raise typer.Exit(run(settings))
