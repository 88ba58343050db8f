"""`engram stats`: the figures of a running sidecar."""

from __future__ import annotations

import json
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from prometheus_client import Metric

TIMEOUT_S = 10.0
_DEFAULT = "127.0.0.1:9471"
_ANSWER_BYTES_MAX = 64 << 20


def register(app: typer.Typer) -> None:
    @app.command()
    def stats(
        target: str = typer.Argument(
            _DEFAULT,
            help="Where the sidecar answers HTTP: what serve was told with --http.",
            metavar="[HOST:PORT]",
            envvar="ENGRAM_HTTP",
            show_envvar=True,
        ),
        as_json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    ) -> None:
        """Show the counters and sizes of a running sidecar: those that /metrics gives.

        docs/operations.md says what each of them means. Counters begin with the sidecar.

        Example: engram stats 127.0.0.1:9471 --json
        """
        figures = [figure for metric in read_metrics(target) for figure in _figures(metric)]
        if as_json:
            typer.echo(json.dumps(figures, indent=1))
            return
        from rich.table import Table as Grid

        from engram.cli._output import console

        grid = Grid.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_column(justify="right", no_wrap=True)
        for figure in figures:
            if not figure["name"].endswith("_bucket"):
                labels = ", ".join(f"{name} {value}" for name, value in figure["labels"].items())
                grid.add_row(figure["name"], labels, _plain(figure["value"]))
        console.print(grid, markup=False)


def read_metrics(target: str) -> list[Metric]:
    """The metrics of the sidecar that answers HTTP at `target`, `HOST:PORT`.

    Raises:
        ConfigError: no such address.
        UnavailableError: nobody answers there in time, the sidecar is not ready, or it is none.
    """
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    from engram._channel import split_port
    from engram.errors import ConfigError, UnavailableError

    if target == "off" or target.startswith("unix:"):
        raise ConfigError(
            f"{target} answers no HTTP; name the HOST:PORT that 'engram serve' was told with --http"
        )
    host, port = split_port(target)
    connection = HTTPConnection(host.strip("[]"), port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/metrics", headers={"Accept": "application/openmetrics-text"})
        answer = connection.getresponse()
        said = answer.read(_ANSWER_BYTES_MAX).decode()
        if answer.status != 200:
            raise UnavailableError(f"the sidecar at {target} has no figures now: {said.strip()}")
        return list(text_string_to_metric_families(said))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UnavailableError(
            f"no sidecar answers HTTP at {target} ({error.strerror or error}); is 'engram serve' "
            "running, and with this --http?"
        ) from None
    except (HTTPException, ValueError):
        raise UnavailableError(
            f"what answers at {target} is not engram; check the address"
        ) from None
    finally:
        connection.close()


def _figures(metric: Metric) -> list[dict[str, Any]]:
    return [
        {"name": sample.name, "labels": sample.labels, "value": _number(sample.value)}
        for sample in metric.samples
        if sample.name.startswith(("engram_", "process_"))
    ]


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _plain(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
