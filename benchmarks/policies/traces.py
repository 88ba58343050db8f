"""Traces: which n-grams real text asks for, batch by batch."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from queues import kernel

from engram.spec import NgramSpec

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

SUFFIXES = frozenset(
    f"{suffix}{packed}"
    for suffix in (".py", ".pyi", ".c", ".h", ".go", ".rs", ".js", ".md", ".rst", ".txt", ".html")
    for packed in ("", ".gz")
)
# Long files become several documents; none may make up a trace.
DOCUMENT_TOKENS_MAX = 32_768
_FILE_CHARACTERS_MAX = 4_000_000
_FILE_CHARACTERS_MIN = 200

STREAMS = 32
PREFILL_TOKENS = 512
DECODE_TOKENS_MAX = 512


@dataclass(frozen=True)
class Trace:
    """Accesses to n-grams, each once in a batch, in the order of their first use there.

    Attributes:
        keys: int32 `[A]`, dense numbers of the n-grams accessed.
        starts: int64 `[B + 1]`, where each batch begins in `keys`, then A.
        tokens: int64 `[B]`, tokens of each batch.
        windows: int32 `[K, max_order]`, the window of each n-gram; entries past its order are 0.
        orders: uint8 `[K]`.
    """

    name: str
    keys: Int32s
    starts: Int64s
    tokens: Int64s
    windows: Int32s
    orders: npt.NDArray[np.uint8]


class _Text(HTMLParser):
    """The text of a page without its tags, scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style") and self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data)


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    text = data.decode(errors="replace")
    if path.name.removesuffix(".gz").endswith(".html"):
        page = _Text()
        page.feed(text)
        text = "\n".join(line for piece in page.pieces for line in [piece.strip("\n")] if line)
    return text


def _files(places: Sequence[Path]) -> list[Path]:
    """Files named, and those of known suffixes below folders named; links are not followed."""
    found: list[Path] = []
    for place in places:
        if place.is_file():
            found.append(place)
        else:
            found += [
                path
                for path in sorted(place.rglob("*"))
                if "".join(path.suffixes[-2:]) in SUFFIXES or path.suffix in SUFFIXES
                if path.is_file() and not path.is_symlink()
            ]
    return found


def documents(
    places: Sequence[Path], tokenizer: Any, tokens_max: int, seed: int = 0
) -> Iterator[Int32s]:
    """Token ids of files below `places`, in a seeded order, equal texts once.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        tokens_max: stop after this many tokens in all.
    """
    files = _files(places)
    np.random.default_rng(seed).shuffle(files)
    seen: set[int] = set()
    for path in files:
        text = _text(path)[:_FILE_CHARACTERS_MAX]
        if len(text) < _FILE_CHARACTERS_MIN or hash(text) in seen:
            continue
        seen.add(hash(text))
        ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        for start in range(0, min(len(ids), tokens_max), DOCUMENT_TOKENS_MAX):
            yield ids[start : min(start + DOCUMENT_TOKENS_MAX, tokens_max)]
        tokens_max -= len(ids)
        if tokens_max <= 0:
            return


@kernel
def _number(windows, vocab, slots, names, out):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Dense numbers of all n-grams: `slots` [2^k] keys (-1 = free) and `names` its numbers."""
    mask = len(slots) - 1
    count = 0
    for t in range(len(windows)):
        parent = np.int64(windows[t, 0])
        for n in range(1, windows.shape[1]):
            key = parent * vocab + windows[t, n]
            at = ((key * -7046029254386353131) >> 20) & mask
            while slots[at] != key and slots[at] >= 0:
                at = (at + 1) & mask
            if slots[at] < 0:
                slots[at] = key
                names[at] = count
                count += 1
            out[t, n - 1] = names[at]
            parent = vocab + names[at]
    return count


@kernel
def _deduplicate(ids, places, steps, last, keys, starts):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Fill `keys` and `starts`; `last` [K] is the last batch of each n-gram (-1 at first)."""
    count = 0
    for batch in range(len(steps) - 1):
        for i in range(steps[batch], steps[batch + 1]):
            for n in range(ids.shape[1]):
                key = ids[places[i], n]
                if last[key] != batch:
                    last[key] = batch
                    keys[count] = key
                    count += 1
        starts[batch + 1] = count
    return count


def number(windows: Int32s, vocab: int) -> tuple[Int32s, int]:
    """Dense numbers int32 `[T, orders]` of the n-grams of orders 2.., and how many there are."""
    out = np.empty((len(windows), windows.shape[1] - 1), np.int32)
    room = 1 << int(np.ceil(np.log2(max(out.size, 1) * 1.5 + 2)))
    count = _number(windows, vocab, np.full(room, -1, np.int64), np.empty(room, np.int32), out)
    return out, int(count)


def one_stream(lengths: Sequence[int], batch: int) -> tuple[Int64s, Int64s]:
    """Documents one after the other, in batches of at most `batch` tokens of one document.

    Returns:
        The positions of the concatenated documents in order of use, and the steps' boundaries.
    """
    ends = np.cumsum(lengths)
    steps = [np.arange(end - n, end, batch) for end, n in zip(ends, lengths, strict=True)]
    return np.arange(ends[-1]), np.concatenate([*steps, ends[-1:]])


def many_streams(lengths: Sequence[int]) -> tuple[Int64s, Int64s]:
    """Documents as `STREAMS` sequences at once: a chunk of one prompt and all decodes a step.

    The last quarter of a document, at most `DECODE_TOKENS_MAX` tokens, is decoded token by token;
    what stands before it is its prompt, prefilled `PREFILL_TOKENS` a step. As soon as a sequence
    ends the next document takes its place.

    Returns:
        As `one_stream`.
    """
    waiting = [(int(end) - n, n) for end, n in zip(np.cumsum(lengths), lengths, strict=True)][::-1]
    prompts: list[list[int]] = []
    decodes: list[list[int]] = []
    order: list[npt.NDArray[np.int64]] = []
    steps = [0]
    while waiting or prompts or decodes:
        while waiting and len(prompts) + len(decodes) < STREAMS:
            start, n = waiting.pop()
            prompts.append([start, start + n - min(n // 4, DECODE_TOKENS_MAX), start + n])
        step = [np.array([each[0] for each in decodes], np.int64)]
        for each in decodes:
            each[0] += 1
        if prompts:
            prompt = prompts[0]
            chunk = np.arange(prompt[0], min(prompt[0] + PREFILL_TOKENS, prompt[1]))
            step.append(chunk)
            prompt[0] += len(chunk)
            if prompt[0] == prompt[1]:
                decodes.append(prompts.pop(0))
        decodes = [each for each in decodes if each[0] < each[2]]
        order += step
        steps.append(steps[-1] + sum(map(len, step)))
    return np.concatenate(order), np.array(steps)


def trace(
    name: str, spec: NgramSpec, texts: Sequence[Int32s], schedule: tuple[Int64s, Int64s]
) -> Trace:
    """The accesses that `texts` make when served in the order of `schedule`."""
    starts = np.concatenate([[0], np.cumsum([len(each) for each in texts])]).astype(np.int32)
    windows = spec.windows(np.concatenate(texts), starts)
    ids, count = number(windows, spec.canonical_vocab_size)
    places, steps = schedule
    keys = np.empty(ids.size, np.int32)
    bounds = np.zeros(len(steps), np.int64)
    used = _deduplicate(ids, places, steps, np.full(count, -1, np.int32), keys, bounds)
    named = np.zeros((count, spec.max_order), np.int32)
    orders = np.zeros(count, np.uint8)
    for n in range(2, spec.max_order + 1):
        named[ids[:, n - 2], :n] = windows[:, :n]
        orders[ids[:, n - 2]] = n
    return Trace(name, keys[:used].copy(), bounds, np.diff(steps), named, orders)
