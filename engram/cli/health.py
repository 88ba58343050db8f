"""`engram health`: whether a sidecar serves, for probes that run a command."""

from __future__ import annotations

import json
import os

import typer

_DEFAULT = "unix:/run/engram/engram.sock"
WHOLE = "sidecar"
"""How the health of all is named beside that of the tables."""


def register(app: typer.Typer) -> None:
    @app.command()
    def health(
        target: str | None = typer.Argument(
            None,
            help="The sidecar: unix:PATH, or HOST:PORT on this host. If left out, the first "
            f"address of ENGRAM_LISTEN, else {_DEFAULT}.",
            metavar="[TARGET]",
        ),
        table: str | None = typer.Option(
            None, help="Ask for one table only.", metavar="NAME", show_default=False
        ),
        timeout: float = typer.Option(5.0, min=0.01, help="Seconds to wait for an answer."),
        as_json: bool = typer.Option(False, "--json", help="Print the answers as JSON."),
    ) -> None:
        """Ask a sidecar whether it serves, by the standard gRPC health service.

        Exits 0 if all that was asked for is SERVING, else 1: while it starts, drains, or is gone.

        Example: engram health unix:/run/engram/engram.sock --table qwen
        """
        states = ask(target or _listening(), table, timeout)
        if as_json:
            typer.echo(json.dumps(states, indent=1))
        else:
            for name, state in states.items():
                typer.echo(f"{name} {state}")
        raise typer.Exit(0 if set(states.values()) == {"SERVING"} else 1)


def _listening() -> str:
    first = os.environ.get("ENGRAM_LISTEN", "").partition(",")[0].strip()
    return first.removeprefix("tcp:") or _DEFAULT


def ask(target: str, table: str | None, timeout_s: float) -> dict[str, str]:
    """States by table, or of one table alone; that of the whole is named `WHOLE`.

    Raises:
        ConfigError: a target of another form.
        UnavailableError: nobody answers there in time, or what answers is not engram.
        UnknownTableError: no such table is served.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from engram._channel import Tls, absolute_target, open_channel
    from engram._wire import error_of_call
    from engram.errors import UnknownTableError
    from engram.proto.v1 import engram_pb2 as pb
    from engram.proto.v1.engram_pb2_grpc import EngramStub

    target = absolute_target(target)
    with open_channel(target, Tls()) as channel:
        health, engram = health_pb2_grpc.HealthStub(channel), EngramStub(channel)  # type: ignore[no-untyped-call]
        try:
            names = [table]
            if table is None:
                listed = engram.ListTables(pb.ListTablesRequest(), timeout=timeout_s)
                names = ["", *(each.name for each in listed.tables)]
            states = {}
            for name in names:
                asked = health_pb2.HealthCheckRequest(service=name)
                answer = health.Check(asked, timeout=timeout_s)
                state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
                states[name or WHOLE] = state
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise UnknownTableError(
                    f"no table {name!r} is served at {target}; 'engram health {target}' lists them"
                ) from None
            raise error_of_call(error, target) from None
    return states
