"""Row ids of V4.1 geometry on one core, beside the NumPy twin."""

from __future__ import annotations

import time

from report import Line, Samples

from engram.bench import checksum, random_tokens
from engram.demo.corpus import tokenizer_file
from engram.spec import NgramSpec
from engram.spec._twins import row_ids_twin

BAR_NS = 300


def run(smoke: bool) -> list[Line]:
    """All 48 row ids of each of 8,192 tokens."""
    count, runs = (256, 3) if smoke else (8192, 21)
    spec = NgramSpec.deepseek_v41(tokenizer=tokenizer_file())
    tokens = random_tokens(spec, count, seed=1)
    batch = spec.batch(tokens)
    ours: list[float] = []
    twins: list[float] = []
    spec.row_ids(tokens)
    for _ in range(runs):
        began = time.perf_counter()
        found = spec.row_ids(tokens)
        between = time.perf_counter()
        expected = row_ids_twin(spec, batch)
        twins.append((time.perf_counter() - between) / count * 1e9)
        ours.append((between - began) / count * 1e9)
    assert checksum(found) == checksum(expected)
    measured, peer = Samples.of(ours), Samples.of(twins)
    return [
        Line(
            f"windows and 48 row ids a token, {count:,} tokens, one core",
            "ns/token",
            measured,
            "NumPy twin",
            peer,
            measured.median / peer.median,
            f"at most {BAR_NS} ns",
            measured.median <= BAR_NS,
            checksum(found),
        )
    ]
