"""The peer: an OS page cache over the table's file, least recently used pages evicted first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from queues import kernel
from traces import Trace

from engram.spec import NgramSpec
from engram.store.layout import BlockLayout

PAGE_BYTES = 4096
_CHUNK = 65_536


def pages_of(trace: Trace, spec: NgramSpec, row_bytes: int) -> tuple[npt.NDArray[np.int32], int]:
    """Pages of each n-gram's rows, int32 `[K, layers * heads]`, and how many the table has."""
    layout = BlockLayout(row_bytes)
    rows_per_page = layout.rows_per_block
    per_layer = [layout.blocks(each.rows) for each in spec.layers]
    first = np.concatenate([[0], np.cumsum(per_layer)])
    out = np.empty((len(trace.windows), len(spec.layers) * spec.heads), np.int32)
    for start in range(0, len(out), _CHUNK):
        part = slice(start, start + _CHUNK)
        ids = spec.hash_windows(trace.windows[part]) // rows_per_page + first[:-1, None]
        column = (trace.orders[part].astype(np.int64) - spec.min_order) * spec.heads
        columns = column[:, None, None] + np.arange(spec.heads)
        out[part] = np.take_along_axis(ids, columns, axis=2).reshape(len(ids), -1)
    return out, int(first[-1])


@kernel
def _replay(keys, pages, capacity, newer, older, missed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """`newer` and `older` [P + 1] are -1 for pages not cached; the last is the queue's mark."""
    mark = len(newer) - 1
    cached = 0
    for i in range(len(keys)):
        for page in pages[keys[i]]:
            if newer[page] >= 0:
                newer[older[page]] = newer[page]
                older[newer[page]] = older[page]
            else:
                missed[i] += 1
                cached += 1
                if cached > capacity:
                    victim = newer[mark]
                    newer[mark] = newer[victim]
                    older[newer[victim]] = mark
                    newer[victim] = -1
                    cached -= 1
            below = older[mark]
            older[page] = below
            newer[page] = mark
            newer[below] = page
            older[mark] = page


def rows_missed(
    trace: Trace, pages: npt.NDArray[np.int32], count: int, cache_bytes: int
) -> npt.NDArray[np.uint8]:
    """Rows of each access whose page is not cached: uint8 `[A]`.

    Args:
        pages, count: of `pages_of`.
    """
    newer = np.full(count + 1, -1, np.int32)
    older = np.full(count + 1, -1, np.int32)
    newer[count] = older[count] = count
    missed = np.zeros(len(trace.keys), np.uint8)
    _replay(trace.keys, pages, cache_bytes // PAGE_BYTES, newer, older, missed)
    return missed
