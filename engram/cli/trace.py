"""`engram trace`: which n-grams were asked for, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from engram.sizing.curve import Curve
    from engram.sizing.trace import Trace
    from engram.spec import NgramSpec

LOOKUP_TOKENS = 512
DEMO_TOKENS = 500_000


def register(app: typer.Typer) -> None:
    """The group and its commands."""
    group = typer.Typer(
        help="Record which n-grams are asked for, and replay them into the simulator.\n\n"
        "Example: engram trace record qwen.trace --table /srv/engram/qwen --tokens ids.npy",
        no_args_is_help=True,
    )
    app.add_typer(group, name="trace")
    _add_record(group)
    _add_readers(group)


def _add_record(group: typer.Typer) -> None:
    @group.command()
    def record(
        out: Path = typer.Argument(help="File to create.", metavar="OUT"),
        table: Path = typer.Option(help="The table's directory.", metavar="PATH"),
        tokens: Path | None = typer.Option(
            None, help="Token ids: an integer array [T], one document.", metavar="FILE.npy"
        ),
        text: Path | None = typer.Option(
            None, help="Text, one document; needs --tokenizer.", metavar="FILE"
        ),
        tokenizer: Path | None = typer.Option(
            None, help="The model's tokenizer.json.", metavar="FILE"
        ),
        demo: bool = typer.Option(False, "--demo", help="The standard library's sources."),
        lookup_tokens: int = typer.Option(LOOKUP_TOKENS, min=1, help="Tokens of one lookup."),
        rate: str = typer.Option(
            "1", help="Part of all n-grams to record: 1 or 1/N, N a power of two.", metavar="PART"
        ),
        samples_max: int = typer.Option(
            1 << 20, min=1 << 10, help="N-grams to keep; beyond, the part is halved."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print what was recorded as JSON."),
    ) -> None:
        """Record what tokens would ask of a table: canonical ids of sampled n-grams, no text.

        Where every n-gram is recorded (--rate 1), the text can be read out of the ids again.

        Example: engram trace record qwen.trace --table /srv/engram/qwen --tokens ids.npy
        """
        from engram.cli._output import print_facts, progress_bar
        from engram.errors import TraceError
        from engram.sizing.record import Recorder, record_documents
        from engram.sizing.trace import write_trace
        from engram.ssd import SsdTier

        level = _level(rate)
        if out.exists():
            raise TraceError(f"{out} exists; remove it, or name another file")
        source = _source(tokens, text, tokenizer, demo)
        tier = SsdTier(table)
        try:
            spec, fingerprint = tier.spec, tier.fingerprint
        finally:
            tier.close()
        recorder = Recorder(spec, fingerprint, level, samples_max)
        with progress_bar("recording", unit="tokens") as progress:
            record_documents(recorder, spec, source(spec), lookup_tokens, progress)
        trace = recorder.finish()
        write_trace(out, trace)
        print_facts(_facts(out, trace), as_json)


def _add_readers(group: typer.Typer) -> None:
    @group.command()
    def info(
        path: Path = typer.Argument(help="The trace.", metavar="TRACE"),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Show what a trace holds: of which table, how much of how many tokens.

        Example: engram trace info qwen.trace
        """
        from engram.cli._output import print_facts
        from engram.sizing.trace import read_trace

        print_facts(_facts(path, read_trace(path)), as_json)

    @group.command()
    def replay(
        path: Path = typer.Argument(help="The trace.", metavar="TRACE"),
        as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
    ) -> None:
        """Simulate RAM tiers of many sizes: hits by the number of n-grams they have room for.

        The first half of the trace, by tokens, only fills them. 'engram plan' says it in bytes.

        Example: engram trace replay qwen.trace
        """
        import json
        from dataclasses import asdict

        from engram.cli._output import progress_bar
        from engram.sizing.replay import replay as simulate
        from engram.sizing.trace import read_trace

        trace = read_trace(path)
        with progress_bar("simulating", unit="n-grams") as progress:
            curve = simulate(trace, progress=progress)
        if as_json:
            typer.echo(json.dumps([asdict(point) for point in curve.points], indent=1))
        else:
            _show(curve)


def _level(rate: str) -> int:
    from engram.errors import ConfigError

    one, _, many = rate.partition("/")
    parts = int(many) if many.isascii() and many.isdigit() else 1 if rate == "1" else 0
    if one != "1" or parts.bit_count() != 1 or parts >= 1 << 32:
        raise ConfigError(f"--rate {rate}: use 1 or 1/N, where N is a power of two")
    return parts.bit_length() - 1


def _source(
    tokens: Path | None, text: Path | None, tokenizer: Path | None, demo: bool
) -> Callable[[NgramSpec], list[npt.NDArray[np.int32]]]:
    """What to record, checked before a table is opened; a function of the table's spec."""
    from engram.errors import ConfigError

    if sum((tokens is not None, text is not None, demo)) != 1:
        raise ConfigError("name one source of tokens: --tokens, --text or --demo")
    if (text is None) != (tokenizer is None):
        raise ConfigError("--text and --tokenizer go together")
    if tokens is not None:
        array = _load(tokens)
        return lambda _: [array]
    if text is not None and tokenizer is not None:
        written, at = text.read_text(encoding="utf-8", errors="replace"), tokenizer
        return lambda spec: [_encode(written, at, spec)]
    from engram.demo.corpus import source_tokens

    return lambda _: source_tokens(DEMO_TOKENS)


def _load(path: Path) -> npt.NDArray[np.int32]:
    import numpy as np

    from engram.errors import ConfigError

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ConfigError(f"--tokens {path} is no .npy file: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(
            f"--tokens {path}: save an integer array of one dimension with numpy.save"
        )
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**31:
        raise ConfigError(f"--tokens {path} holds numbers that are no token ids")
    return array.astype(np.int32)


def _encode(text: str, path: Path, spec: NgramSpec) -> npt.NDArray[np.int32]:
    import numpy as np
    from tokenizers import Tokenizer

    from engram.errors import ConfigError
    from engram.spec._compression import compress
    from engram.store.checks import digest

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ConfigError(f"--tokenizer {path} cannot be read: {error}") from None
    if spec.token_map is not None and digest(compress(tokenizer, str(path))) != (
        spec.token_map_digest
    ):
        raise ConfigError(f"--tokenizer {path} is not the one that the table was made with")
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def _facts(path: Path, trace: Trace) -> dict[str, Any]:
    from engram.sizing.trace import VERSION

    return {
        "trace": str(path),
        "format_version": VERSION,
        "fingerprint": trace.fingerprint,
        "spec_digest": trace.spec_digest,
        "orders": list(range(trace.min_order, trace.max_order + 1)),
        "sampled_one_in": 2**trace.level,
        "samples": len(trace.orders),
        "lookups_sampled": len(trace.lookups),
        "ngrams": trace.accesses,
        "tokens": trace.tokens,
        "file_bytes": path.stat().st_size,
    }


def _show(curve: Curve) -> None:
    from rich.table import Table as Grid

    from engram.cli._output import console

    grid = Grid("n-grams", "hits", "by chance", "reads a hundred", "samples")
    for point in curve.points:
        grid.add_row(
            f"{point.slots:,}",
            f"{point.hits:.1%}",
            f"+/- {point.error:.1%}",
            f"{100 * point.reads:.1f}",
            f"{point.samples:,}",
        )
    console.print(grid)
    if curve.enough is not None:
        console.print(f"{curve.enough:,} hold every n-gram that was asked for")
