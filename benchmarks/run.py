"""Run all benchmarks in one go: `python benchmarks/run.py --help`."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bench_hash
import bench_hits
import bench_import
import bench_long
import bench_lookup
import bench_misses
import bench_peers
import bench_running
import bench_sizing
from report import Line, save, show

from engram.demo.corpus import tokenizer_file
from engram.rows import RowFormat
from engram.spec import NgramSpec
from engram.ssd import schema_of
from engram.store.synth import SyntheticSource
from engram.store.writer import build_table

PARTS = (
    "hash",
    "hits",
    "peers",
    "misses",
    "long",
    "sizing",
    "running",
    "warm",
    "cold",
    "grpc",
    "import",
)

ON_ONE_TABLE = {
    "hits": bench_hits,
    "peers": bench_peers,
    "misses": bench_misses,
    "long": bench_long,
    "sizing": bench_sizing,
    "running": bench_running,
}


def main(arguments: list[str]) -> None:
    """Parse the command line, run the parts asked for, print and save their lines."""
    parser = argparse.ArgumentParser(
        description="Figures beside their limits and peers, measured in one run.",
        epilog="example: python benchmarks/run.py --out benchmarks/results/mine --place /mnt/nvme",
    )
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(PARTS)}; all if none")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--place", type=Path, help="where to put tables (10 GB); default: temp")
    parser.add_argument("--out", type=Path, help="directory for results.json and results.md")
    options = parser.parse_args(arguments)
    parts = options.parts or list(PARTS)
    if set(parts) - set(PARTS):
        parser.error(f"unknown part; choose of {', '.join(PARTS)}")
    place = Path(tempfile.mkdtemp(prefix="engram-bench-", dir=options.place))
    lines: list[Line] = []
    try:
        for measured in _run(parts, place, options.smoke):
            show(measured)
            lines += measured
            if options.out:  # after each part, so that one which fails costs only itself
                save(options.out, "python benchmarks/run.py " + " ".join(sys.argv[1:]), lines)
    finally:
        shutil.rmtree(place)


def _run(parts: list[str], place: Path, smoke: bool) -> Iterator[list[Line]]:
    """The lines of each part, once it has run."""
    if "hash" in parts:
        yield bench_hash.run(smoke)
    if {*ON_ONE_TABLE, "warm", "cold", "grpc"} & set(parts):
        table = _table(place / "table", 2_000 if smoke else 320_000)
        for part, module in ON_ONE_TABLE.items():
            if part in parts:
                yield module.run(table, smoke)
        if "warm" in parts:
            yield bench_lookup.warm(table, smoke)
        if "grpc" in parts:
            from bench_grpc import run as run_grpc

            yield run_grpc(table, smoke)
        if "cold" in parts:
            yield bench_lookup.cold(table, smoke)
        shutil.rmtree(table)
    if "import" in parts:
        yield bench_import.run(place, smoke)


def _table(path: Path, vocab_size: int, row_format: str = "fp8-ue8m0") -> Path:
    spec = NgramSpec.deepseek_v41(tokenizer=tokenizer_file(), engram_vocab_size=vocab_size)
    schema = schema_of(spec, RowFormat(row_format, spec.dim))
    build_table(path, schema, SyntheticSource(schema))
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
