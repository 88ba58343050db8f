"""Staged entries as their reader sees them: each must prove that it is the answer.

An entry counts if it carries the request's id, an even sequence and the n-gram that was asked for,
and if its id and sequence are still the same after its rows were copied. Then it is no late answer
to another request and nobody wrote it meanwhile.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engram._jit import fence_acquire, kernel, load_acquire, load_relaxed
from engram.ram._directory import ids_at, is_key
from engram.ram.layout import HEAD_IDS, HEAD_ORDER, HEAD_TABLE, STAGED_HEAD_BYTES, BundleLayout
from engram.tiers import Ngrams


class Staged:
    """Entries in answer to one request.

    Args:
        ngrams: that were asked for; entry i is for n-gram i.
        table: its number.
        bundle: its layout.
        address: of entry 0; `len(ngrams)` entries lie there.
        request_id: of the request.
    """

    def __init__(
        self, ngrams: Ngrams, table: int, bundle: BundleLayout, address: int, request_id: int
    ) -> None:
        self._entries = (ngrams.windows, ngrams.orders, table, address, bundle.staged_bytes)
        self._request_id = request_id
        self._sequences = np.empty(len(ngrams), np.uint64)
        first = address + STAGED_HEAD_BYTES + bundle.head_bytes
        self.bundles = first + bundle.staged_bytes * np.arange(len(ngrams), dtype=np.int64)
        """int64 `[N]`, the bundles' addresses."""

    def whole(self) -> bool:
        """Whether all entries are answers; ask before copying."""
        return bool(check_entries(*self._entries, self._request_id, self._sequences) < 0)

    def unchanged(self) -> bool:
        """Whether they still are what `whole` found; ask after copying."""
        _, _, _, address, stride = self._entries
        return bool(entries_kept(address, stride, self._request_id, self._sequences))


@kernel
def check_entries(windows, orders, table, address, stride, request_id, sequences):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Note the entries' sequences; the first entry that is no answer, or -1."""
    for n in range(len(orders)):
        entry = address + n * stride
        head = entry + STAGED_HEAD_BYTES
        sequence = load_acquire(head)
        sequences[n] = sequence
        if (
            sequence & np.uint64(1)
            or load_relaxed(entry) != np.uint64(request_id)
            or not is_key(head, table, orders[n], ids_at(windows, n))
        ):
            return n
    return -1


@kernel
def entries_kept(address, stride, request_id, sequences):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Whether all entries have their id and these sequences."""
    fence_acquire()
    for n in range(len(sequences)):
        entry = address + n * stride
        if load_relaxed(entry + STAGED_HEAD_BYTES) != sequences[n]:
            return False
        if load_relaxed(entry) != np.uint64(request_id):
            return False
    return True


def check_entries_twin(
    ngrams: Ngrams, table: int, memory: npt.NDArray[np.uint8], stride: int, request_id: int
) -> int:
    """`check_entries` in NumPy: its oracle.

    Args:
        memory: uint8 `[N * stride]`, the entries.
    """
    for n, entry in enumerate(memory.reshape(-1, stride)[: len(ngrams)]):
        head, order = entry[STAGED_HEAD_BYTES:], int(ngrams.orders[n])
        ids = head[HEAD_IDS : HEAD_IDS + 4 * order].view(np.int32)
        key = head[HEAD_TABLE : HEAD_ORDER + 4].view(np.int32).tolist()
        if (
            int(entry[:8].view(np.uint64)[0]) != request_id
            or int(head[:8].view(np.uint64)[0]) % 2
            or key != [table, order]
            or not np.array_equal(ids, ngrams.windows[n, :order])
        ):
            return n
    return -1
