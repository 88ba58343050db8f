"""Predicted hits of the RAM tier beside those of the tier itself, and what predicting costs."""

from __future__ import annotations

import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from real_tier import RealTier
from report import Line, Samples

import engram
from engram.bench import checksum
from engram.demo.corpus import source_tokens, tokenizer_file
from engram.sizing.simulator import LEVEL_LIVE, STATE_BYTES_MAX, Simulator, hash_windows, sizes_from
from engram.spec import NgramSpec

# Texts are read by what compares eviction policies.
sys.path.append(str(Path(__file__).resolve().parent / "policies"))
from traces import documents

Int32s = npt.NDArray[np.int32]

TOKENS, LOOKUP_TOKENS, SAMPLES_LEVEL_SMOKE = 2_000_000, 512, 2
ERROR_BAR, COST_BAR = 0.02, 0.01
_FED_AT_ONCE = 65_536
_RUST = sorted(Path.home().glob(".rustup/toolchains/stable-*/share/doc/rust/html"))
PROSE = [
    *map(Path, ("/usr/share/vim/vim90/doc", "/usr/share/doc/git", "/usr/share/doc/nodejs")),
    *(
        books / book
        for books in _RUST[:1]
        for book in ("book", "cargo", "edition-guide", "nomicon", "reference")
    ),
    Path("/usr/share/common-licenses"),
]
"""Manuals, books, release notes, licences: what of it is on this machine."""


@dataclass(frozen=True)
class Text:
    """Lookups of one kind of text.

    Attributes:
        lookups: int32 `[T, max_order]` windows of each.
        hashes: uint64 `[A]` of all their n-grams; `starts`: int64 `[B + 1]`.
    """

    name: str
    lookups: list[Int32s]
    hashes: npt.NDArray[np.uint64]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, name: str, spec: NgramSpec, texts: list[Int32s]) -> Text:
        lookups = []
        for text in texts:
            windows = spec.windows(text)
            lookups += [
                np.ascontiguousarray(windows[at : at + LOOKUP_TOKENS])
                for at in range(0, len(text), LOOKUP_TOKENS)
            ]
        hashes = [hash_windows(windows, spec.min_order) for windows in lookups]
        starts = np.cumsum([0, *map(len, hashes)])
        return cls(name, lookups, np.concatenate(hashes), starts)


def run(path: Path, smoke: bool) -> list[Line]:
    """The errors of four texts, the state, and the cost beside lookups of the table at `path`."""
    spec = NgramSpec.deepseek_v41(tokenizer=tokenizer_file())
    level = SAMPLES_LEVEL_SMOKE if smoke else LEVEL_LIVE
    lines = [_state(level)]
    for text in _texts(spec, 20_000 if smoke else TOKENS):
        lines += _errors(text, spec, level, smoke)
    lines.append(_cost(path, smoke))
    return lines


def _texts(spec: NgramSpec, tokens: int) -> list[Text]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file()))
    code = list(documents([Path(sysconfig.get_paths()["stdlib"])], tokenizer, tokens))
    # The licences of Python's own packages are on every machine; on this one there is more.
    places = [place for place in PROSE if place.exists()] or [
        Path(sysconfig.get_paths()["purelib"])
    ]
    prose = list(documents(places, tokenizer, tokens))
    rng = np.random.default_rng(0)
    both = code[::2] + prose[::2]
    mixed = [both[i] for i in rng.permutation(len(both))]
    uniform = [rng.integers(0, spec.vocab_size, tokens, dtype=np.int32)]
    named = {"code": code, "prose": prose, "code and prose": mixed, "uniform ids": uniform}
    return [Text.of(name, spec, texts) for name, texts in named.items()]


def _state(level: int) -> Line:
    simulator = Simulator(sizes_from(level, 1 << 40))
    reached = simulator.nbytes <= STATE_BYTES_MAX
    return Line(
        f"state of a table's {len(simulator.bank.slots)} miniatures, every size there can be",
        "MiB",
        Samples.of([simulator.nbytes / 2**20]),
        bar=f"at most {STATE_BYTES_MAX >> 20} MiB",
        reached=reached,
    )


def _errors(text: Text, spec: NgramSpec, level: int, smoke: bool) -> list[Line]:
    """How far off each size is; beside it exact LRU, which stack distances predict."""
    simulator = Simulator(sizes_from(level, len(text.hashes)))
    simulator.feed(text.hashes, text.starts)
    points = simulator.curve().points[: 2 if smoke else None]
    truth = [RealTier(spec, point.slots).run(text.lookups) for point in points]
    exact = Simulator([(0, point.slots) for point in points], recency=True)
    exact.feed(text.hashes, text.starts)
    lru = [1 - int(counts[:, 1].sum()) / len(text.hashes) for counts in exact.bank.counts]
    errors = [abs(point.hits - hits) for point, hits in zip(points, truth, strict=True)]
    others = [abs(hits - true) for hits, true in zip(lru, truth, strict=True)]
    reached = max(errors) <= ERROR_BAR
    return [
        Line(
            f"{text.name}: predicted hits of {points[0].slots:,} to {points[-1].slots:,} slots, "
            f"which hit {min(truth):.3f} to {max(truth):.3f}; one n-gram in {2**level}",
            "absolute error",
            Samples.of(errors),
            "exact LRU of these sizes, which stack distances would predict",
            Samples.of(others),
            bar="" if smoke else f"at most {ERROR_BAR} at every size",
            reached=None if smoke else reached,
            checksum=checksum(np.array([point.hits for point in points]), np.array(truth)),
        )
    ]


def _cost(path: Path, smoke: bool) -> Line:
    """Per n-gram, of real text that is all in the RAM tier."""
    runs, tokens = (5, 4_000) if smoke else (201, 120_000)
    ids = np.concatenate(source_tokens(tokens))
    lookups, ours = [], []
    with engram.open(path, ram="1GiB", guard=True) as table:
        spec = table.spec
        hashes = hash_windows(np.ascontiguousarray(spec.windows(ids)), spec.min_order)
        hashes = np.resize(hashes, max(_FED_AT_ONCE, len(hashes)))
        for at in range(0, len(ids), 8192):
            table.lookup(ids[max(0, at - 8) : at + 8192])
        simulator = Simulator(sizes_from(LEVEL_LIVE, 1 << 40))
        simulator.feed(hashes)
        rng = np.random.default_rng(1)
        out, context = table.lookup(ids[:64]), spec.max_order - 1
        for _ in range(runs):
            first = int(rng.integers(context, len(ids) - 64))
            history = ids[None, first - context : first]
            began = time.perf_counter()
            table.lookup(ids[first : first + 64], None, history, out=out)
            lookups.append((time.perf_counter() - began) / (64 * spec.num_orders) * 1e9)
            first = int(rng.integers(0, len(hashes) - _FED_AT_ONCE + 1))
            part = hashes[first : first + _FED_AT_ONCE]
            began = time.perf_counter()
            simulator.feed(part)
            ours.append((time.perf_counter() - began) / len(part) * 1e9)
    measured, peer = Samples.of(ours), Samples.of(lookups)
    ratio = measured.median / peer.median
    return Line(
        f"taking note of an n-gram, fed {_FED_AT_ONCE:,} at once, one in {2**LEVEL_LIVE} sampled",
        "ns/n-gram",
        measured,
        "a lookup of 64 tokens, hits, by its n-grams",
        peer,
        ratio,
        f"at most {COST_BAR} of it",
        ratio <= COST_BAR,
        checksum(simulator.bank.counts),
    )
