"""`engram synth`: a table whose every byte can be recomputed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from engram.rows import RowFormat
    from engram.spec import NgramSpec


class Family(StrEnum):
    """Families by their spelling on the command line."""

    DEEPSEEK_V41 = "deepseek-v41"
    DEEPSEEK_DEMO = "deepseek-demo"
    QWEN4_EXP = "qwen4-exp"


_ROW_FORMAT = {
    Family.DEEPSEEK_V41: "fp8-ue8m0",
    Family.DEEPSEEK_DEMO: "bf16",
    Family.QWEN4_EXP: "bf16",
}


def spec_of(family: Family, vocab_size: int | None, tokenizer: Path | None) -> NgramSpec:
    """The published geometry of `family`, with another n-gram vocabulary size.

    Raises:
        ConfigError: a tokenizer is missing, or one was given where none is used.
    """
    from engram.errors import ConfigError
    from engram.spec import NgramSpec

    if (tokenizer is None) != (family is Family.QWEN4_EXP):
        raise ConfigError(
            f"{family} hashes raw token ids: leave --tokenizer out"
            if tokenizer is not None
            else f"{family} needs the model's tokenizer: add --tokenizer path/to/tokenizer.json"
        )
    sizes: dict[str, Any] = {}
    if vocab_size is not None:
        name = "ngram_vocab_size_base" if family is Family.QWEN4_EXP else "engram_vocab_size"
        sizes[name] = vocab_size
    if family is Family.QWEN4_EXP:
        return NgramSpec.qwen4_exp(**sizes)
    if family is Family.DEEPSEEK_DEMO:
        return NgramSpec.deepseek_demo(tokenizer=tokenizer, **sizes)
    return NgramSpec.deepseek_v41(tokenizer=tokenizer, **sizes)


def row_format_of(family: Family, name: str | None, dim: int) -> RowFormat:
    """The row format asked for, or the family's own; a global scale of 1 where one is needed."""
    from engram.rows import RowFormat

    name = name or _ROW_FORMAT[family]
    return RowFormat(name, dim, 1.0 if name in ("fp8", "nvfp4") else None)


def register(app: typer.Typer) -> None:
    @app.command()
    def synth(
        destination: Path = typer.Argument(
            help="Directory to create for the table.", metavar="DEST"
        ),
        family: Family = typer.Option(help="Whose geometry and hashing to use."),
        vocab_size: int | None = typer.Option(
            None, min=2, help="Rows per head, about; the published size when left out."
        ),
        tokenizer: Path | None = typer.Option(
            None, help="The model's tokenizer.json (DeepSeek families)."
        ),
        row_format: str | None = typer.Option(
            None,
            help="bf16, fp16, fp32, fp8-ue8m0, fp8, nvfp4 or nf4; the family's own if left out.",
        ),
        seed: int = typer.Option(0, min=0, help="Seed of the row bytes."),
        as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    ) -> None:
        """Make a synthetic table: every row byte is a function of seed, layer and row id.

        Any reader can check any byte without a copy, so benchmarks and fault tests stand on it.

        Example: engram synth /tmp/t --family qwen4-exp --vocab-size 100000
        """
        from engram.cli._output import print_facts, progress_bar
        from engram.cli.inspect import facts_of
        from engram.ssd import schema_of
        from engram.store.synth import SyntheticSource
        from engram.store.writer import build_table

        spec = spec_of(family, vocab_size, tokenizer)
        schema = schema_of(spec, row_format_of(family, row_format, spec.dim))
        with progress_bar(f"writing {destination.name}") as progress:
            build_table(destination, schema, SyntheticSource(schema, seed), progress=progress)
        print_facts(facts_of(destination), as_json)
