"""Import of a V4.1 checkpoint beside `cp` and `sync` of the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from report import Line, Samples

from engram.demo.corpus import tokenizer_file
from engram.rows import RowFormat
from engram.spec import NgramSpec
from engram.ssd import schema_of
from engram.store.manifest import read_manifest
from engram.store.synth import SyntheticSource

SPEED_BAR = 0.5
MEMORY_BAR_MIB = 512


def run(place: Path, smoke: bool) -> list[Line]:
    """Alternate `cp` + `sync` and `engram import`, each a process of its own."""
    vocab_size, runs = (2_000, 1) if smoke else (360_000, 5)
    checkpoint = place / "checkpoint"
    total = write_checkpoint(checkpoint, vocab_size)
    ours, peers, peaks = [], [], []
    for _ in range(runs):
        peers.append(_timed(["sh", "-c", f"cp -r {checkpoint} {place}/copy && sync"]))
        shutil.rmtree(place / "copy")
        os.sync()
        seconds, peak = _timed_import(
            [sys.executable, "-m", "engram", "import", str(checkpoint), str(place / "imported")]
        )
        ours.append(seconds)
        peaks.append(peak)
        fingerprint = read_manifest(place / "imported")[0].fingerprint
        shutil.rmtree(place / "imported")
        os.sync()
    shutil.rmtree(checkpoint)
    ratio = float(np.median(np.array(peers) / np.array(ours)))
    rate, peer = ([total / 2**20 / s for s in seconds] for seconds in (ours, peers))
    memory = Samples.of(peaks)
    return [
        Line(
            f"import of {total / 2**30:.1f} GiB, read back and verified",
            "MiB/s",
            Samples.of(rate),
            "cp + sync",
            Samples.of(peer),
            ratio,
            f"at least {SPEED_BAR} of cp + sync",
            ratio >= SPEED_BAR,
            fingerprint,
        ),
        Line(
            "peak memory of the import's largest process",
            "MiB",
            memory,
            bar=f"at most {MEMORY_BAR_MIB} MiB",
            reached=memory.greatest <= MEMORY_BAR_MIB,
        ),
    ]


def write_checkpoint(directory: Path, vocab_size: int) -> int:
    """A V4.1 checkpoint of synthetic rows: two tensors a layer in one file; returns its bytes."""
    directory.mkdir(parents=True)
    spec = NgramSpec.deepseek_v41(tokenizer=tokenizer_file(), engram_vocab_size=vocab_size)
    schema = schema_of(spec, RowFormat("fp8-ue8m0", spec.dim))
    source = SyntheticSource(schema)
    header, at = {}, 0
    for layer, rows in schema.layers:
        for name, dtype, width in (("weight", "F8_E4M3", 256), ("scale", "F8_E8M0", 8)):
            header[f"layers.{layer}.engram.embed.{name}"] = {
                "dtype": dtype,
                "shape": [rows, width],
                "data_offsets": [at, at + rows * width],
            }
            at += rows * width
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for layer, rows in schema.layers:
            for part in (slice(0, 256), slice(256, 264)):
                for first in range(0, rows, 100_000):
                    block = np.empty((min(100_000, rows - first), 264), np.uint8)
                    source.read(layer, first, block)
                    file.write(np.ascontiguousarray(block[:, part]).data)
        os.fsync(file.fileno())
    shutil.copy(tokenizer_file(), directory / "tokenizer.json")
    config = {
        "model_type": "deepseek_v41",
        "engram_layer_ids": [layer for layer, _ in schema.layers],
        "engram_vocab_size": vocab_size,
        "engram_max_ngram_size": 4,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_num_embeddings": [rows for _, rows in schema.layers],
        "engram_compressed_vocab_size": spec.canonical_vocab_size,
        "engram_pad_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return at


def _timed(command: list[str]) -> float:
    """Seconds that a process takes."""
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def _timed_import(command: list[str]) -> tuple[float, float]:
    """Seconds of a process, and peak MiB of the largest in its process group.

    Peaks are read while it runs, from the kernel's own high-water marks: what `wait4` reports of a
    child begins with the memory of the parent it was forked from.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, process_group=0)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, *_peaks_mib(process.pid), 0.0)
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return seconds, peak


def _peaks_mib(group: int) -> list[float]:
    found = [0.0]
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getpgid(int(status.parent.name)) != group:
                continue
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except (OSError, ValueError):
            continue
        found.append(int(lines.get("VmHWM", "0").split()[0]) / 1024)
    return found
