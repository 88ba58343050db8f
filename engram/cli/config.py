"""`engram config`: what a sidecar would be told, and by whom."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from engram.cli.serve import CONFIG, HTTP, HTTP_PUBLIC, LISTEN, RAM, TABLE

if TYPE_CHECKING:
    from engram.service.config import Config

_RAM_BY_ITSELF = "# ram: a quarter of what the process may have, or the tables' size if less"


def register(app: typer.Typer) -> None:
    config_app = typer.Typer(no_args_is_help=True)
    # Without a callback a lone command would take the place of the group.
    config_app.callback()(_config)
    config_app.command()(show)
    app.add_typer(config_app, name="config")


def _config() -> None:
    """Say how a sidecar is configured.

    Example: engram config show --origin
    """


def show(
    file: Path | None = typer.Argument(
        None, help="TOML file, as with --config.", metavar="[FILE]", show_default=False
    ),
    origin: bool = typer.Option(
        False, "--origin", help="Say of each value where it comes from, as a comment."
    ),
    config: Path | None = CONFIG,
    table: list[str] = TABLE,
    listen: list[str] = LISTEN,
    ram: str | None = RAM,
    http: str | None = HTTP,
    http_public: bool = HTTP_PUBLIC,
) -> None:
    """Show all that 'engram serve' would use, defaults included, as a file it can be given.

    Flags and variables are those of 'engram serve', and so are the errors.

    Example: engram config show /etc/engram.toml --origin --ram 8GiB
    """
    from engram.errors import ConfigError
    from engram.service.config import load_config

    if file is not None and config is not None:
        raise ConfigError(f"two files are given, {file} and {config}; leave one out")
    origins: dict[str, str] = {}
    settings = load_config(
        file or config,
        tables=table,
        listen=listen,
        ram=ram,
        http=http,
        http_public=http_public,
        origins=origins,
    )
    for line in toml_lines(settings, origins if origin else None):
        typer.echo(line)


def toml_lines(config: Config, origins: Mapping[str, str] | None = None) -> Iterator[str]:
    """`config` as lines of a file that gives the same one.

    Args:
        origins: as `load_config` fills it; None to say nothing of them.
    """

    def line(key: str, value: Any, shown: str = "") -> str:
        said = "" if origins is None else f"  # {origins.get(key, 'default')}"
        return f"{shown or key.rpartition('.')[2]} = {_toml(value)}{said}"

    yield line("listen", [str(address) for address in config.listen])
    yield line("ram", _size(config.ram)) if config.ram is not None else _RAM_BY_ITSELF
    yield line("attach_uids", list(config.attach_uids))
    http = config.http
    yield line("http", "off" if http is None else f"{http.host}:{http.port}")
    yield line("http_public", config.http_public)
    for table in config.table:
        yield from ("", "[[table]]", line(f"table.{table.name}", table.name, "name"))
        yield line(f"table.{table.name}", str(table.path), "path")
    if config.tls is not None:
        yield from ("", "[tls]")
        for name, path in config.tls:
            yield line(f"tls.{name}", str(path))
    if config.hotset is not None:
        yield from ("", "[hotset]")
        for name, value in config.hotset:
            yield line(f"hotset.{name}", str(value) if isinstance(value, Path) else value)
    yield from ("", "[limits]")
    for name, value in config.limits:
        yield line(f"limits.{name}", _size(value) if name.endswith("_bytes") else value)


def _size(size: int) -> str | int:
    """Exactly, in the largest unit of which it is a whole number."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return size


def _toml(value: Any) -> str:
    # JSON's strings, numbers and lists are TOML's as well, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
