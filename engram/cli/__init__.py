"""The `engram` command."""

from __future__ import annotations

import sys
from importlib import import_module

import typer

from engram import __version__
from engram.errors import ConfigError, EngramError

app = typer.Typer(
    name="engram",
    help="N-gram memory tables of language models: on SSD, verified, served bit-exactly.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

_COMMANDS = (
    "import_",
    "synth",
    "inspect",
    "verify",
    "serve",
    "config",
    "stats",
    "top",
    "health",
    "warm",
    "doctor",
    "bench",
    "demo",
    "torture",
    "trace",
    "plan",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"engram {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False,
        "--version",
        help="Print the version and exit.",
        callback=_show_version,
        is_eager=True,
    ),
) -> None:
    """N-gram memory tables of language models: on SSD, verified, served bit-exactly."""


for _command in _COMMANDS:
    import_module(f"engram.cli.{_command}").register(app)


def main() -> None:
    """Run the command line: exit 0 when fine, 1 when the work failed, 2 when misused."""
    try:
        app()
    except EngramError as error:
        typer.echo(f"engram: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        typer.echo(f"engram: {error}; check the path and its permissions", err=True)
        sys.exit(1)
