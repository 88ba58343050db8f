"""`engram stats`: the figures of a running sidecar."""

from __future__ import annotations

import json
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from prometheus_client import Metric

TIMEOUT_S = 10.0
DEFAULT = "127.0.0.1:9471"
TARGET = typer.Argument(
    DEFAULT,
    help="Where the sidecar answers HTTP: what serve was told with --http.",
    metavar="[HOST:PORT]",
    envvar="ENGRAM_HTTP",
    show_envvar=True,
)
_ANSWER_BYTES_MAX = 64 << 20


def register(app: typer.Typer) -> None:
    @app.command()
    def stats(
        target: str = TARGET,
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
        rows = [_row(figure) for figure in figures if not figure["name"].endswith("_bucket")]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        # Plain lines, whatever their length: they are searched and cut by other programs.
        for name, labels, value in rows:
            typer.echo(f"{name:<{widths[0]}}  {labels:<{widths[1]}}  {value:>{widths[2]}}")


def read_metrics(target: str, timeout_s: float = TIMEOUT_S) -> list[Metric]:
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
    connection = HTTPConnection(host.strip("[]"), port, timeout=timeout_s)
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


def _row(figure: dict[str, Any]) -> tuple[str, str, str]:
    value = figure["value"]
    labels = ", ".join(f"{name} {label}" for name, label in figure["labels"].items())
    return figure["name"], labels, f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
