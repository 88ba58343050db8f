"""`engram plan`: how much memory is worth having."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from engram.sizing.plan import Drive, Load, Plan


def register(app: typer.Typer) -> None:
    @app.command()
    def plan(
        trace: Path = typer.Argument(
            help="A trace of the table, from 'engram trace record'.", metavar="TRACE"
        ),
        table: Path = typer.Option(help="The table's directory.", metavar="PATH"),
        ram: str | None = typer.Option(
            None,
            help="RAM tier to compare with; a quarter of what this machine allows if left out.",
            metavar="SIZE",
        ),
        hbm: str | None = typer.Option(
            None, help="Say what device memory of this size buys.", metavar="SIZE"
        ),
        iops: float | None = typer.Option(
            None,
            help="4 KiB random reads a second of the drive; if left out, this machine's are "
            "measured on the table for a second.",
        ),
        plot: Path | None = typer.Option(None, help="Draw the curve.", metavar="OUT.svg"),
        as_json: bool = typer.Option(False, "--json", help="Print the plan as JSON."),
    ) -> None:
        """Say how much RAM gives 80, 90 and 95 % hits, and what more of it would buy.

        The RAM tier's own policy is simulated on the trace; its first half only fills the tiers.
        Nothing is prefetched, and rows that are not in a tier are read from disk, one 4 KiB read
        each, as if the page cache had none. Beside it: the page cache that hits as much without a
        RAM tier, and the same if no two rows shared a page.

        Example: engram plan qwen.trace --table /srv/engram/qwen --hbm 2GiB --plot plan.svg
        """
        import json

        from engram.cli._output import progress_bar
        from engram.errors import ConfigError
        from engram.sizing.geometry import Geometry
        from engram.sizing.picture import draw
        from engram.sizing.plan import make_plan
        from engram.sizing.trace import read_trace

        if plot is not None and plot.suffix != ".svg":
            raise ConfigError(
                f"--plot {plot}: only SVG can be drawn; name a file that ends in .svg"
            )
        ram_bytes = _size("--ram", ram) if ram else _default_ram()
        hbm_bytes = _size("--hbm", hbm) if hbm else 0
        recorded, geometry = read_trace(trace), Geometry.of(table)
        recorded.require_table(geometry.fingerprint, str(table))
        drive = drive_of(table, iops)
        with progress_bar("simulating", unit="n-grams") as progress:
            found = make_plan(
                recorded, geometry, drive, ram=ram_bytes, hbm=hbm_bytes, progress=progress
            )
        if plot is not None:
            plot.write_text(draw(found))
        if as_json:
            typer.echo(json.dumps(found.to_dict(), indent=1))
        else:
            show(found)


def _size(option: str, text: str) -> int:
    from engram.errors import ConfigError
    from engram.sizes import parse_size

    if text.strip().replace(".", "").isdigit():
        raise ConfigError(f"{option} {text}: say of what, like {text.strip()}GiB")
    return parse_size(text)


def _default_ram() -> int:
    from engram.ram.limits import DEFAULT_SHARE, memory_allowed

    return memory_allowed() // DEFAULT_SHARE


def drive_of(table: Path, iops: float | None = None) -> Drive:
    """A drive of this rate, or the table's own, measured."""
    from engram.sizing.drive import reads_per_second
    from engram.sizing.plan import Drive
    from engram.store.manifest import DATA_FILE

    if iops is not None:
        return Drive(iops, "as given")
    return Drive(reads_per_second(table / DATA_FILE), "measured here for a second")


def show(plan: Plan) -> None:
    """Print it for people."""
    from rich.table import Column
    from rich.table import Table as Grid

    from engram.cli._output import console, print_facts
    from engram.sizes import format_size

    print_facts(
        {
            "table": f"{plan.table}, {format_size(plan.table_bytes)} of rows",
            "trace": f"{plan.tokens:,} tokens, {plan.accesses:,} n-grams, "
            f"{plan.samples:,} of them sampled (1 in {2**plan.level:,})",
            "drive": f"{plan.drive.reads_per_second:,.0f} reads/s, {plan.drive.source}",
            "at most": f"{plan.most_hits:.1%} hits: the other n-grams are new",
        },
        as_json=False,
    )
    columns = ("reads a token", "tokens a second")
    grid = Grid(Column("hits", no_wrap=True), "RAM", *columns, "page cache", "at worst")
    for target in plan.targets:
        sizes = (target.ram_bytes, target.page_cache_bytes, target.page_cache_worst_bytes)
        ram, pages, worst = ("-" if size is None else format_size(size) for size in sizes)
        if target.load is None:
            ram = "never"
        name = f"{target.hits:.0%}"
        if target.of_most is not None:
            name = f"{target.hits:.1%}, {target.of_most:.0%} of most"
        grid.add_row(name, ram, *_of_load(target.load), pages, worst)
    console.print(grid)
    grid = Grid("", "RAM", "HBM", "hits", "in HBM", *columns)
    for each in plan.choices:
        grid.add_row(
            each.name,
            format_size(each.ram_bytes),
            format_size(each.hbm_bytes) if each.hbm_bytes else "-",
            f"{each.hits:.1%}",
            f"{each.hbm_hits:.1%}" if each.hbm_bytes else "-",
            *_of_load(each.load),
        )
    console.print(grid)


def _of_load(load: Load | None) -> tuple[str, str]:
    if load is None:
        return "-", "-"
    rate = load.tokens_per_second
    return f"{load.reads_per_token:,.2f}", "no limit" if rate is None else f"{rate:,.0f}"
