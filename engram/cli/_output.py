"""What commands print: facts as a table or JSON, long work as a bar."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

console = Console(highlight=False)


def announce_compilation() -> None:
    """Say why the first command after an installation is slow."""
    from engram._jit import CACHED, COMPILES

    if not CACHED:
        typer.echo(
            "engram: compiling, at every start, because no cache directory is writable; "
            "set ENGRAM_CACHE_DIR",
            err=True,
        )
    elif COMPILES:
        typer.echo("engram: compiling for this machine, once; up to a minute", err=True)


TO_GO_ON = "; run the same command to go on where it stopped"


@contextmanager
def progress_bar(
    what: str, if_interrupted: str = "", unit: str = ""
) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; silent when that is not a terminal.

    Args:
        what: a few words on the work.
        if_interrupted: what to tell someone who stops it.
        unit: of what is counted; bytes if empty.

    Yields a function of (units done, units in all).
    """
    columns: tuple[ProgressColumn, ...] = (
        (MofNCompleteColumn(), TextColumn(unit))
        if unit
        else (DownloadColumn(binary_units=True), TransferSpeedColumn())
    )
    errors = Console(stderr=True)
    if errors.is_terminal:
        announce_compilation()
    with Progress(
        TextColumn("{task.description:.30}", markup=False),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=None)
        try:
            yield lambda done, total: bar.update(task, completed=done, total=total)
        except KeyboardInterrupt:
            bar.stop()
            typer.echo(f"engram: interrupted{if_interrupted}", err=True)
            raise typer.Exit(130) from None


def print_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print names and values: aligned for people, or as one JSON object."""
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name.replace("_", " "), Text(_plain(value)))
    console.print(grid)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
