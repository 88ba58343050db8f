"""`engram torture`: is every row right, whatever is killed meanwhile?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from engram.torture.plan import Plan


def register(app: typer.Typer) -> None:
    @app.command()
    def torture(
        minutes: float = typer.Option(10.0, min=0.05, help="How long."),
        clients: int = typer.Option(4, min=1, max=64, help="Client processes at once."),
        gpu_clients: int = typer.Option(
            0, min=0, max=64, help="How many of them take steps through the GPU tier."
        ),
        gpu_device: str | None = typer.Option(
            None, help="Where: cuda or cpu; cuda if there is one, when left out."
        ),
        ram_percent: float = typer.Option(
            5.0, min=0.0, max=100.0, help="Size of the RAM tier, of the table's."
        ),
        kill_sidecar_every: float = typer.Option(
            8.0, min=0.0, help="Seconds between kills of the sidecar; 0 for none."
        ),
        kill_client_every: float = typer.Option(
            1.0, min=0.0, help="Seconds between kills of a client; 0 for none."
        ),
        stop_client_every: float = typer.Option(
            7.0, min=0.0, help="Seconds between halts of a client; 0 for none."
        ),
        on_unavailable: str = typer.Option(
            "direct", help="What clients do without a sidecar: direct, wait or fail."
        ),
        seed: int = typer.Option(0, min=0, help="Of every random choice."),
        table: Path | None = typer.Option(
            None,
            help="Use the synthetic table there, or make it there; temporary if left out.",
            metavar="DIR",
        ),
        size: str = typer.Option("192MiB", help="Size of a table that is made.", metavar="SIZE"),
        row_format: str = typer.Option(
            "fp8-ue8m0",
            help="Of a table that is made: bf16, fp16, fp32, fp8-ue8m0, fp8, nvfp4 or nf4.",
            metavar="FORMAT",
        ),
        recovery_max: float = typer.Option(
            1.0, min=0.0, help="Seconds that clients may take to attach to a new sidecar."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    ) -> None:
        """Kill the sidecar and its clients again and again while clients check every byte.

        Clients look up, prefetch, cancel and read in place, and compare every row with what the
        rule of a synthetic table says; those of the GPU tier, every bit of every embedding. Exits
        1 if a row is wrong, a lookup fails, a process hangs or dies by itself, or something is
        left behind.

        Example: engram torture --minutes 1 --clients 4 --seed 7
        """
        from engram.sizes import parse_size
        from engram.torture.plan import Plan

        plan = Plan(
            seconds=60 * minutes,
            clients=clients,
            gpu_clients=gpu_clients,
            gpu_device=gpu_device,
            ram_percent=ram_percent,
            kill_sidecar_every_s=kill_sidecar_every,
            kill_client_every_s=kill_client_every,
            stop_client_every_s=stop_client_every,
            on_unavailable=on_unavailable,
            seed=seed,
            table=table,
            size=parse_size(size),
            row_format=row_format,
            recovery_s_max=recovery_max,
        )
        _refuse_impossible(plan)
        raise typer.Exit(_run(plan, as_json))


def _refuse_impossible(plan: Plan) -> None:
    from importlib.util import find_spec

    from engram.errors import ConfigError
    from engram.rows import ROW_FORMATS

    if plan.on_unavailable not in ("direct", "wait", "fail"):
        raise ConfigError(f"--on-unavailable {plan.on_unavailable}: use direct, wait or fail")
    if plan.row_format not in ROW_FORMATS:
        raise ConfigError(f"--row-format {plan.row_format}: use one of {', '.join(ROW_FORMATS)}")
    if plan.gpu_clients > plan.clients:
        raise ConfigError(
            f"--gpu-clients {plan.gpu_clients}: there are only {plan.clients} clients; "
            "give --clients as many"
        )
    if plan.gpu_clients and find_spec("torch") is None:
        raise ConfigError("--gpu-clients needs PyTorch: pip install 'engram-offload[torch]'")


def _run(plan: Plan, as_json: bool) -> int:
    import json

    from rich.console import Console

    from engram.cli._output import announce_compilation, print_facts
    from engram.torture.supervisor import torture
    from engram.torture.tally import Tally

    announce_compilation()
    errors = Console(stderr=True)
    with errors.status("making the table") as status:

        def progress(seconds: float, tally: Tally) -> None:
            status.update(
                f"{seconds:.0f} of {plan.seconds:.0f} s: {tally.rows:,} rows checked, "
                f"{tally.wrong:,} wrong, {tally.failed.total():,} lookups failed"
            )

        tally = torture(plan, progress)
    facts = tally.facts(plan)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        print_facts(_for_people(facts), as_json=False)
    return 0 if facts["sound"] else 1


def _for_people(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without what is empty; the verdict last."""
    shown = {name: value for name, value in facts.items() if value not in ([], {}, None)}
    shown.pop("sound")
    shown["verdict"] = "sound" if facts["sound"] else "NOT SOUND"
    return shown
