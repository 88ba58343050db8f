"""Simulate the policies on traces of real text, and the page cache beside the chosen one.

Without `--texts` the standard library is the text. Each kind of text is served as one stream; where
there are several kinds, all of them together are served as many streams at once as well.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pages
import policies
import tables
from policies import CHOSEN, Missed, Policy
from traces import Int32s, Trace, documents, many_streams, one_stream, trace

from engram.demo.corpus import tokenizer_file
from engram.spec import NgramSpec

_BENCHMARKS = Path(__file__).resolve().parents[1]
ROW_BYTES = 264
SLOT_BYTES = 16 * ROW_BYTES + 64
BATCH_TOKENS = 512
CAPACITIES_GIB = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
VARIANT_CAPACITIES_GIB = (0.25, 1.0)
PAGE_CACHES_GIB = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Outcome:
    """What a policy misses on a trace.

    Attributes:
        miss: of n-gram accesses; `late`: of those in the second half of the batches.
        rows, rows_late: rows missed per token, likewise.
    """

    trace: str
    policy: str
    gib: float
    slots: int
    miss: float
    late: float
    rows: float
    rows_late: float


@dataclass(frozen=True)
class Peer:
    """The RAM that the chosen policy and LRU need to miss no more rows than a page cache.

    Attributes:
        miss: rows missed of rows read, second half of the batches.
        least_gib: bytes of bundles, slot heads included, of the chosen policy, in GiB.
        lru_gib: the same of LRU.
    """

    trace: str
    page_cache_gib: float
    miss: float
    least_gib: float
    lru_gib: float


def slots_of(gib: float) -> int:
    return max(1, int(gib * 2**30) // SLOT_BYTES)


def outcome(run: Trace, name: str, gib: float, missed: Missed, rows_each: int = 16) -> Outcome:
    half = len(run.tokens) // 2
    late = int(run.starts[half])
    return Outcome(
        run.name,
        name,
        gib,
        slots_of(gib),
        float(missed.mean()),
        float(missed[late:].mean()),
        float(missed.sum(dtype=np.int64)) * rows_each / int(run.tokens.sum()),
        float(missed[late:].sum(dtype=np.int64)) * rows_each / int(run.tokens[half:].sum()),
    )


def compare(run: Trace, rivals: list[Policy], capacities: tuple[float, ...]) -> Iterator[Outcome]:
    for policy in rivals:
        for gib in capacities:
            missed = policies.misses(policy, run.keys, run.starts, slots_of(gib))
            yield outcome(run, policy.name, gib, missed)


def optimum(run: Trace, capacities: tuple[float, ...]) -> Iterator[Outcome]:
    for gib in capacities:
        missed = policies.optimum_misses(run.keys, run.starts, slots_of(gib))
        yield outcome(run, "MIN (knows the future)", gib, missed)


def circumstances(run: Trace, capacities: tuple[float, ...]) -> Iterator[Outcome]:
    """Hits noted in part only, and n-grams prefetched, so that their own lookup touches them."""
    sampled = [(policy, n) for policy in (CHOSEN, policies.s3fifo(promote=1)) for n in (4, 16)]
    ahead = [policies.lru(), policies.clock(2), CHOSEN, policies.s3fifo(promote=3, table=True)]
    for gib in capacities:
        slots = slots_of(gib)
        for policy, n in sampled:
            missed = policies.misses(policy, run.keys, run.starts, slots, sample=n)
            yield outcome(run, f"{policy.name}; one hit in {n} noted", gib, missed)
        for policy in ahead:
            missed = policies.misses(policy, run.keys, run.starts, slots, prefetched=True)
            yield outcome(run, f"{policy.name}; all prefetched", gib, missed)


def beside_page_cache(run: Trace, spec: NgramSpec, caches: tuple[float, ...]) -> Iterator[Peer]:
    late = int(run.starts[len(run.tokens) // 2])
    of_rows, count = pages.pages_of(run, spec, ROW_BYTES)
    for gib in caches:
        missed = pages.rows_missed(run, of_rows, count, int(gib * 2**30))
        goal = float(missed[late:].mean()) / of_rows.shape[1]
        needs = [_needed(run, policy, late, goal) for policy in (CHOSEN, policies.lru())]
        yield Peer(run.name, gib, goal, *needs)


def _needed(run: Trace, policy: Policy, late: int, goal: float) -> float:
    """GiB at which `policy` misses at most `goal`: bisected to 2 %, the greater end."""
    low, high = 2.0**-8, 4.0
    while high / low > 1.02:
        middle = float(np.sqrt(low * high))
        missed = policies.misses(policy, run.keys, run.starts, slots_of(middle))
        low, high = (middle, high) if missed[late:].mean() > goal else (low, middle)
    return high


def traces(texts: dict[str, list[Int32s]], spec: NgramSpec, seed: int = 0) -> Iterator[Trace]:
    """Each kind of text as one stream; then equal parts of all of them as many streams."""
    for name, kind in texts.items():
        yield trace(name, spec, kind, one_stream([len(each) for each in kind], BATCH_TOKENS))
    if len(texts) > 1:
        every = [each for kind in texts.values() for each in kind[:: len(texts)]]
        order = np.random.default_rng(seed).permutation(len(every))
        mixed = [every[i] for i in order]
        yield trace("mixed", spec, mixed, many_streams([len(each) for each in mixed]))


def batch_sizes(
    texts: list[Int32s], name: str, spec: NgramSpec, sizes: tuple[int, ...]
) -> Iterator[Outcome]:
    for size in sizes:
        run = trace(f"{name}, {size} a batch", spec, texts, one_stream([*map(len, texts)], size))
        yield from compare(run, [policies.lru(), CHOSEN], VARIANT_CAPACITIES_GIB)


def read(arguments: argparse.Namespace) -> tuple[dict[str, list[Int32s]], dict[str, Any]]:
    """The texts' tokens by kind, and what is to be said of them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file()))
    named = arguments.texts or [f"code={sysconfig.get_paths()['stdlib']}"]
    texts: dict[str, list[Int32s]] = {}
    facts: dict[str, Any] = {}
    for each in named:
        kind, _, listed = each.partition("=")
        places = [Path(place) for place in listed.split(",")]
        absent = [str(place) for place in places if not place.exists()]
        if absent or not listed:
            raise SystemExit(f"--texts {each}: give NAME=PLACE[,PLACE...] of files or folders")
        texts[kind] = list(documents(places, tokenizer, arguments.tokens))
        names = ["standard library"] if not arguments.texts else [str(each) for each in places]
        facts[kind] = {"places": names, "documents": len(texts[kind])}
    return texts, facts


def describe(run: Trace) -> dict[str, Any]:
    return {
        "tokens": int(run.tokens.sum()),
        "batches": len(run.tokens),
        "accesses": len(run.keys),
        "ngrams": len(run.orders),
        "ngrams_late_first": _first_late(run),
    }


def _first_late(run: Trace) -> float:
    """Share of the second half's accesses whose n-gram was never asked for before."""
    late = int(run.starts[len(run.tokens) // 2])
    firsts: npt.NDArray[np.int64] = np.unique(run.keys, return_index=True)[1]
    return float((firsts >= late).sum()) / max(1, len(run.keys) - late)


def simulate(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures of one run."""
    texts, facts = read(arguments)
    spec = NgramSpec.deepseek_v41(tokenizer=str(tokenizer_file()))
    capacities = CAPACITIES_GIB[:2] if arguments.smoke else CAPACITIES_GIB
    variants = CAPACITIES_GIB[:1] if arguments.smoke else VARIANT_CAPACITIES_GIB
    caches = (0.0625,) if arguments.smoke else PAGE_CACHES_GIB
    body: dict[str, Any] = {"texts": facts, "traces": {}, "costs": policies.costs()}
    parts: dict[str, list[Any]] = {
        "policies": [],
        "variants": [],
        "circumstances": [],
        "page_cache": [],
        "batches": [],
    }
    for run in traces(texts, spec):
        body["traces"][run.name] = describe(run)
        say(f"{run.name}: {body['traces'][run.name]}")
        parts["policies"] += compare(run, policies.main_policies(), capacities)
        parts["policies"] += optimum(run, capacities)
        say(f"{run.name}: policies compared")
        parts["page_cache"] += beside_page_cache(run, spec, caches)
        say(f"{run.name}: page cache compared")
        parts["variants"] += compare(run, policies.variants(), variants)
        parts["circumstances"] += circumstances(run, variants)
    if not arguments.smoke:
        name, kind = next(iter(texts.items()))
        parts["batches"] += batch_sizes(kind, name, spec, (64, 512, 2048))
    return body | {part: [asdict(each) for each in found] for part, found in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--texts", action="append", metavar="NAME=PLACE,..", help="repeatable")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="most tokens of each NAME")
    parser.add_argument("--out", type=Path, help="folder for results.json, results.md and plots")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only that it runs")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.tokens = min(arguments.tokens, 20_000)
    sys.path.append(str(_BENCHMARKS))
    from report import environment

    facts = {
        "command": " ".join(["python", "benchmarks/policies/simulate.py", *sys.argv[1:]]),
        "environment": environment(),
    }
    body = facts | simulate(arguments, lambda line: print(line, flush=True))
    print(tables.markdown(body))
    if arguments.out:
        tables.save(arguments.out, body)


if __name__ == "__main__":
    main()
