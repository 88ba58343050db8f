"""A lease without a sidecar, and a stand-in for the one that would write into its staging."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np

from engram._wire import unpack_ngrams
from engram.proto.v1 import engram_pb2 as pb
from engram.ram.layout import HEAD_IDS, STAGED_HEAD_BYTES, BundleLayout
from engram.ram.memory import Memory

TABLE = 3
BUNDLE = BundleLayout(2, 4, 8, 2, 4)
BUNDLE_AT = STAGED_HEAD_BYTES + BUNDLE.head_bytes


def lease_of(chunks=3, entries=4):
    """What a Fetcher uses of a lease."""
    return SimpleNamespace(
        token=b"t" * 16,
        table_number=TABLE,
        bundle=BUNDLE,
        staging=Memory.private(chunks * entries * BUNDLE.staged_bytes),
        chunks=chunks,
        entries_per_chunk=entries,
    )


def write_entry(entry, request_id, window, order, *, table=TABLE, sequence=2):
    """Fill one staged entry, uint8 `[staged_bytes]`; its bundle repeats `bundle_byte`."""
    entry[:8].view(np.uint64)[0] = request_id
    head = entry[STAGED_HEAD_BYTES:]
    head[:8].view(np.uint64)[0] = sequence
    head[8:16].view(np.int32)[:] = table, order
    head[HEAD_IDS : HEAD_IDS + 4 * order].view(np.int32)[:] = window[:order]
    entry[BUNDLE_AT:] = bundle_byte(window, order)


def bundle_byte(window, order):
    """What stands in a bundle, so that one n-gram's is told from another's."""
    return int(np.sum(window[:order]) * 7 + order) % 251


class FakeSidecar:
    """The method of a stub: writes what is asked for and replies, as told.

    Attributes:
        asked: requests as they came.
        spoil: called with entry bytes, request and index after each entry was written.
        reply_of: makes the reply from a request; None for no reply.
    """

    def __init__(self, lease):
        self.lease = lease
        self.asked = []
        self.spoil = lambda entry, request, index: None
        self.reply_of = lambda request: pb.FetchResponse(request_id=request.request_id)
        self.replies = SimpleQueue()
        self.cancelled = False

    def __call__(self, requests):
        threading.Thread(target=self._serve, args=(requests,), daemon=True).start()
        return self

    def _serve(self, requests):
        for request in requests:
            self.asked.append(request)
            self.write(request)
            reply = self.reply_of(request)
            if reply is not None:
                self.replies.put(reply)
        self.replies.put(None)

    def write(self, request):
        ngrams = unpack_ngrams(request.ngrams, 2, 4, 10**6)
        stride = BUNDLE.staged_bytes
        chunk_bytes = self.lease.entries_per_chunk * stride
        chunk = self.lease.staging.bytes()[request.chunk * chunk_bytes :][:chunk_bytes]
        for n, (window, order) in enumerate(zip(ngrams.windows, ngrams.orders, strict=True)):
            entry = chunk[n * stride : (n + 1) * stride]
            write_entry(entry, request.request_id, window, int(order))
            self.spoil(entry, request, n)

    def initial_metadata(self):
        return ()

    def __iter__(self):
        return iter(self.replies.get, None)

    def cancel(self):
        self.cancelled = True
        self.replies.put(None)
