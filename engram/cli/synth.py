"""`engram synth`: a table whose every byte can be recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from engram.rows import RowFormat
    from engram.spec import NgramSpec


def _family_names() -> list[str]:
    """Spellings of all families, without importing what they compute with."""
    folder = Path(__file__).resolve().parent.parent / "spec" / "families"
    names = (path.stem for path in folder.glob("*.py"))
    return sorted(name.replace("_", "-") for name in names if not name.startswith("_"))


def spec_of(name: str, vocab_size: int | None, tokenizer: Path | None) -> NgramSpec:
    """The published geometry of a family, with another n-gram vocabulary size.

    Raises:
        ConfigError: no such family, or a tokenizer is missing, superfluous or not there.
    """
    from engram.errors import ConfigError
    from engram.spec.families import families

    family = families().get(name.replace("-", "_"))
    if family is None:
        raise ConfigError(f"no family {name!r}; choose one of {', '.join(_family_names())}")
    parameters: dict[str, Any] = {}
    if vocab_size is not None:
        parameters[family.size_parameter] = vocab_size
    if family.needs_tokenizer:
        if tokenizer is None:
            raise ConfigError(
                f"{name} needs the model's tokenizer: add --tokenizer path/to/tokenizer.json"
            )
        if not tokenizer.exists():
            raise ConfigError(f"--tokenizer {tokenizer} does not exist")
        parameters["tokenizer"] = tokenizer
    elif tokenizer is not None:
        raise ConfigError(f"{name} hashes raw token ids: leave --tokenizer out")
    return family.build(**parameters)


def row_format_of(spec: NgramSpec, name: str | None) -> RowFormat:
    """The row format asked for, or the family's own; a global scale of 1 where one is needed."""
    from engram.errors import ConfigError
    from engram.rows import ROW_FORMATS, RowFormat
    from engram.spec.families import family

    name = name or family(spec.family).row_format
    if name not in ROW_FORMATS:
        raise ConfigError(f"no row format {name!r}; choose one of {', '.join(ROW_FORMATS)}")
    return RowFormat(name, spec.dim, 1.0 if name in ("fp8", "nvfp4") else None)


def register(app: typer.Typer) -> None:
    @app.command()
    def synth(
        destination: Path = typer.Argument(
            help="Directory to create for the table.", metavar="DEST"
        ),
        family: str = typer.Option(
            help=f"Whose geometry and hashing to use: {', '.join(_family_names())}.",
            metavar="FAMILY",
        ),
        vocab_size: int | None = typer.Option(
            None, min=2, help="Rows per head, about; the published size when left out."
        ),
        tokenizer: Path | None = typer.Option(
            None, help="The model's tokenizer.json (DeepSeek families).", metavar="FILE"
        ),
        row_format: str | None = typer.Option(
            None,
            help="bf16, fp16, fp32, fp8-ue8m0, fp8, nvfp4 or nf4; the family's own if left out.",
            metavar="FORMAT",
        ),
        seed: int = typer.Option(0, min=0, help="Seed of the row bytes."),
        as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    ) -> None:
        """Make a synthetic table: every row byte is a function of seed, layer and row id.

        Any reader can check any byte without a copy, so benchmarks and fault tests stand on it.

        Example: engram synth /tmp/t --family qwen4-exp --vocab-size 100000
        """
        from engram.cli._output import TO_GO_ON, print_facts, progress_bar
        from engram.cli.inspect import facts_of
        from engram.ssd import schema_of
        from engram.store.synth import SyntheticSource
        from engram.store.writer import build_table

        spec = spec_of(family, vocab_size, tokenizer)
        schema = schema_of(spec, row_format_of(spec, row_format))
        with progress_bar(f"writing {destination.name}", TO_GO_ON) as progress:
            build_table(destination, schema, SyntheticSource(schema, seed), progress=progress)
        print_facts(facts_of(destination), as_json)
