"""Long prompts, many clients, and the sidecar's memory meanwhile: all on one sidecar.

The arena holds a text that is larger than the processor's caches, so that every lookup is a hit
and comes from memory. A long prompt is that text again and again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from long_client import CHUNK_TOKENS, slots_of
from machine import children, owned_bytes
from report import Line, Samples
from texts import Text

import engram
from engram.bench import checksum
from engram.demo.sidecar import sidecar
from engram.ram.layout import BundleLayout
from engram.ram.memory import SEALS_OF_READER, Memory

CLIENTS = 4
TIME_BAR, GROWTH_BAR_MIB, BANDWIDTH_BAR = 1.2, 64, 0.9
SIDECAR_SHARE_BAR, SIDECAR_BAR_MIB = 1.05, 256
MISSES_MAX = 0.0
"""The share of n-grams that may miss where all should hit."""
_ROOM = 1.25
_SAMPLED_EVERY_S = 0.05


@dataclass(frozen=True)
class _Sizes:
    text: int
    long: int
    short: int
    shorts: int
    rounds: int
    seconds: float
    churn_seconds: float


_SMOKE = _Sizes(4096, 16_384, 4096, 2, 1, 0.2, 1.0)
_FULL = _Sizes(65_536, 1 << 20, 4096, 32, 5, 2.0, 20.0)


class _Client:
    """A client process."""

    def __init__(self, **keywords: Any) -> None:
        program = Path(__file__).with_name("long_client.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program), json.dumps(keywords)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a client process failed; its last words are above")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **command: Any) -> dict[str, Any]:
        self.send(**command)
        return self.answer()

    def end(self) -> None:
        self._process.communicate()


@dataclass
class _Watched:
    """Memory of the sidecar, in bytes, while something goes on."""

    pid: int
    sampled: list[int] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        over = threading.Event()

        def sample() -> None:
            while not over.wait(_SAMPLED_EVERY_S):
                self.sampled.append(owned_bytes(self.pid))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.sampled.append(owned_bytes(self.pid))


def run(path: Path, smoke: bool) -> list[Line]:
    """All of it, over the table at `path`."""
    sizes = _SMOKE if smoke else _FULL
    with engram.open(path, ram=0) as table, ExitStack() as stack:
        text = Text(sizes.text, table.spec.max_order - 1)
        _, ngrams = slots_of(table, text)
        bundle = BundleLayout.of(table.spec, table.row_format)
        ram = int(_ROOM * ngrams * (bundle.slot_bytes + bundle.head_bytes)) + (1 << 20)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        before = children()
        target = stack.enter_context(
            sidecar(Path(folder) / "engram.sock", {"table": path}, ram=str(ram))
        )
        (pid,) = children() - before
        watched = _Watched(pid)
        sources = _sources(ngrams * bundle.slot_bytes)
        clients = []
        for _ in range(CLIENTS):
            clients.append(
                _Client(
                    target=target,
                    text_tokens=sizes.text,
                    sources=f"/proc/{os.getpid()}/fd/{sources.descriptor}",
                )
            )
            stack.callback(clients[-1].end)
        for client in clients:
            client.answer()
        with watched.watching():
            expected = _expected(table, text, sizes)
            lines = _long_prompt(clients[0], sizes, expected)
            lines += _all_at_once(clients, sizes, 64)
            lines += _all_at_once(clients, sizes, CHUNK_TOKENS)
            for seed, client in enumerate(clients):
                client.send(do="churn", seconds=sizes.churn_seconds, seed=seed)
            lookups = sum(client.answer()["lookups"] for client in clients)
    return [*lines, _sidecar_memory(watched, ram, lookups)]


def _sources(size: int) -> Memory:
    """Memory like the arena's, full of bytes."""
    memory = Memory.shared("bench-bundles", size, SEALS_OF_READER)
    memory.bytes()[:] = 1
    return memory


def _expected(table: engram.Table, text: Text, sizes: _Sizes) -> str:
    """Checksum of the rows that end a prompt from token 0 on, as a client gives it."""
    piece = text.piece(sizes.short - CHUNK_TOKENS, CHUNK_TOKENS)
    rows = table.lookup(piece.tokens, history=piece.history)
    return checksum(checksum(rows.values, rows.scales))


def _long_prompt(client: _Client, sizes: _Sizes, expected: str) -> list[Line]:
    """Short prompts of the text, then one long prompt, in turns."""
    first = client.ask(do="prompt", first=0, tokens=sizes.short)
    if first["checksum"] != expected:
        raise SystemExit("the sidecar's rows differ from the embedded table's")
    _require_hits([client.ask(do="warm")])
    places = np.random.default_rng(0).integers(0, sizes.text, (sizes.rounds, sizes.shorts))
    long, short, growth, misses, sums = [], [], [], [], [expected]
    for round_places in places.tolist():
        some = [client.ask(do="prompt", first=at, tokens=sizes.short) for at in round_places]
        whole = client.ask(do="prompt", first=0, tokens=sizes.long)
        misses.append(_require_hits([whole, *some]))
        short.append(float(np.median([each["ns_per_token"] for each in some])))
        long.append(whole["ns_per_token"])
        growth.append((whole["rss_anon"] - first["rss_anon"]) / 2**20)
        sums.append(whole["checksum"])
    ratio = float(np.median(np.array(long) / np.array(short)))
    return [
        Line(
            f"a prompt of {sizes.long:,} tokens in chunks of {CHUNK_TOKENS:,}, sidecar, at most "
            f"{max(misses):.5%} misses",
            "ns/token",
            Samples.of(long),
            f"prompts of {sizes.short:,} tokens",
            Samples.of(short),
            ratio,
            f"at most {TIME_BAR} of the short ones",
            ratio <= TIME_BAR,
            checksum(*sums),
        ),
        Line(
            "growth of the client's own memory since its first prompt, misses and warm-up included",
            "MiB",
            Samples.of(growth),
            bar=f"under {GROWTH_BAR_MIB} MiB",
            reached=max(growth) < GROWTH_BAR_MIB,
        ),
    ]


def _require_hits(answers: list[dict[str, Any]]) -> float:
    """The largest share of misses."""
    share: float = max(answer["misses"] for answer in answers)
    if share > MISSES_MAX:
        raise SystemExit(f"{share:.2%} of the text's n-grams do not stay in the RAM tier")
    return share


def _all_at_once(clients: list[_Client], sizes: _Sizes, tokens: int) -> list[Line]:
    """All clients look up hits for a while, then all copy as many bundles, in turns."""
    pieces = sizes.text // tokens
    totals: dict[str, list[float]] = {"hits": [], "copy": []}
    sums = set()
    for _ in range(sizes.rounds):
        for what, total in totals.items():
            for number, client in enumerate(clients):
                first = number * pieces // len(clients)
                client.send(do=what, seconds=sizes.seconds, tokens=tokens, first=first)
            answers = [client.answer() for client in clients]
            _require_hits([{"misses": 0, **answer} for answer in answers])
            sums |= {answer["checksum"] for answer in answers if "checksum" in answer}
            total.append(sum(answer["bytes_per_s"] for answer in answers) / 2**30)
    (found,) = sums
    ratio = float(np.median(np.array(totals["hits"]) / np.array(totals["copy"])))
    judged = tokens == CHUNK_TOKENS
    return [
        Line(
            f"hits of {len(clients)} client processes at once, {tokens:,} tokens a lookup",
            "GiB/s",
            Samples.of(totals["hits"]),
            "the same bundles copied from known slots by as many processes",
            Samples.of(totals["copy"]),
            ratio,
            f"at least {BANDWIDTH_BAR} of that" if judged else "",
            ratio >= BANDWIDTH_BAR if judged else None,
            found,
        )
    ]


def _sidecar_memory(watched: _Watched, ram: int, lookups: int) -> Line:
    limit = SIDECAR_SHARE_BAR * ram / 2**20 + SIDECAR_BAR_MIB
    sampled = Samples.of([size / 2**20 for size in watched.sampled])
    return Line(
        f"memory of the sidecar, RAM tier {ram / 2**20:,.0f} MiB, during all that and {lookups:,} "
        f"lookups of {CHUNK_TOKENS:,} new tokens by {CLIENTS} clients",
        "MiB",
        sampled,
        bar=f"at most RAM tier + 5 % + {SIDECAR_BAR_MIB} MiB = {limit:,.0f} MiB",
        reached=sampled.greatest <= limit,
    )
