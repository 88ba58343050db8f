"""`engram top`: what a running sidecar does, second by second."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import typer

from engram.cli.stats import TARGET

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engram.cli._readings import Reading

_PATIENCE_S = 2.0
"""How long a sidecar may take to answer before it is shown as gone."""


def register(app: typer.Typer) -> None:
    @app.command()
    def top(
        target: str = TARGET,
        interval: float = typer.Option(2.0, min=0.1, max=3600.0, help="Seconds between readings."),
        once: bool = typer.Option(False, "--once", help="Show one interval, then exit."),
        as_json: bool = typer.Option(
            False, "--json", help="With --once: print what was found as JSON."
        ),
    ) -> None:
        """Watch a running sidecar: hits by tier, disk, prefetches, evictions, clients.

        Rates and shares are those between the last two readings, as far apart as --interval says.
        A sidecar that is gone is waited for. Ends with Ctrl-C.

        Example: engram top 127.0.0.1:9471 --interval 5
        """
        from engram.errors import ConfigError

        if as_json and not once:
            raise ConfigError("--json is for one interval; add --once")
        try:
            if once:
                _show_once(target, interval, as_json)
            else:
                _watch(target, interval)
        except KeyboardInterrupt:
            # The only way to end it, so no failure.
            raise typer.Exit(0) from None


def _read(target: str) -> Reading:
    from engram.cli._readings import Reading
    from engram.cli.stats import read_metrics

    return Reading.of(read_metrics(target, _PATIENCE_S))


def _show_once(target: str, interval_s: float, as_json: bool) -> None:
    from engram.cli._output import console
    from engram.cli._readings import view
    from engram.cli._screen import screen

    before = _read(target)
    time.sleep(interval_s)
    shown = view(before, _read(target))
    if as_json:
        typer.echo(json.dumps({"target": target, **shown}, indent=1))
    else:
        console.print(screen(target, shown))


def _watch(target: str, interval_s: float) -> None:
    from rich.live import Live

    from engram.cli._output import console
    from engram.cli._screen import screen

    if not console.is_terminal:
        # A file or another program gets one view after the other.
        for shown, trouble in views(target, interval_s):
            if shown is not None or trouble:
                console.print(screen(target, shown, trouble))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for shown, trouble in views(target, interval_s):
            live.update(screen(target, shown, trouble), refresh=True)


def views(target: str, interval_s: float) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """What to show after each reading, for ever: the last view there is, and what is wrong.

    Raises:
        ConfigError: no such address.
    """
    from engram.cli._readings import view
    from engram.errors import UnavailableError

    before, shown = None, None
    while True:
        began = time.monotonic()
        try:
            now = _read(target)
        except UnavailableError as error:
            yield shown, str(error)
        else:
            shown = view(before, now) if before is not None else None
            before = now
            yield shown, ""
        time.sleep(max(0.0, began + interval_s - time.monotonic()))
