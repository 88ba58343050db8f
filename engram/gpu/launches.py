"""What launches hold until they have ended: an epoch of the arena, host memory, an event.

Used under its tier's lock, but for what says otherwise.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from engram.ram.bundle_tier import InPlace
from engram.tiers import Int64s

cuda: Any = torch.cuda  # parts of it have no types
_ROOMS_MAX = 8
_LEAST_TOKENS = 64


class Room(NamedTuple):
    """Host memory for a launch's addresses, pinned for CUDA devices.

    Attributes:
        whole: int64, what is lent.
        tensor: int64 `[2, T, orders]`, its beginning.
        sources, keep: the halves of it: where n-grams are, and where to keep them.
    """

    whole: torch.Tensor
    tensor: torch.Tensor
    sources: Int64s
    keep: Int64s


@dataclass(eq=False)
class Launch:
    """One launch.

    Attributes:
        done: event behind it; None where it has ended when it returns.
        lost: why nothing that it read may be used, once that is known.
    """

    done: Any
    in_place: InPlace
    epoch: int
    room: Room
    lost: Exception | None = None


class Launches:
    """Those of one tier, in the order in which they were queued.

    Args:
        device: on which they run.
        orders: of the table.
    """

    def __init__(self, device: torch.device, orders: int) -> None:
        self._cuda = device.type == "cuda"
        self._orders = orders
        self._queue: deque[Launch] = deque()
        self._rooms: dict[int, list[Room]] = {}
        self._events: list[Any] = []

    def __len__(self) -> int:
        return len(self._queue)

    def holds(self, room: Room | None) -> bool:
        """Whether a launch with this room was added."""
        return bool(self._queue) and self._queue[-1].room is room

    def room(self, tokens: int) -> Room:
        """For addresses of `tokens`; what was in it is still there."""
        size = max(_LEAST_TOKENS, 1 << max(0, tokens - 1).bit_length())
        spare = self._rooms.get(size)
        if spare:
            room = spare.pop()
            if room.tensor.shape[1] == tokens:
                return room
            whole = room.whole
        else:
            count = 2 * size * self._orders
            whole = torch.zeros(count, dtype=torch.int64, pin_memory=self._cuda)
        tensor = whole[: 2 * tokens * self._orders].view(2, tokens, self._orders)
        return Room(whole, tensor, *tensor.numpy())

    def event(self, stream: Any) -> Any:
        """Recorded on `stream` now."""
        done = self._events.pop() if self._events else cuda.Event()
        done.record(stream)
        return done

    def add(self, launch: Launch) -> Launch:
        """It was queued."""
        self._queue.append(launch)
        return launch

    def examine(self) -> bool:
        """Whether all that is under way still reads what it was to read; those that do not, and
        what came after them, are marked: they may have read from the device what those put there.
        """
        for number, launch in enumerate(self._queue):
            try:
                launch.in_place.require_protection()
            except Exception as error:
                for later in list(self._queue)[number:]:
                    later.lost = later.lost or error
                return False
        return True

    def collect(self) -> bool:
        """Let go of what launches that have ended held; False as `examine`, for these."""
        whole = True
        while self._queue:
            launch = self._queue[0]
            if launch.done is not None and not launch.done.query():
                break
            whole = self.examine() and whole
            self._queue.popleft()
            launch.in_place.epochs.leave(launch.epoch)
            if launch.done is not None:
                # Who still waits for it waits for what comes later on the same stream.
                self._events.append(launch.done)
            size = launch.room.whole.numel() // (2 * self._orders)
            spare = self._rooms.setdefault(size, [])
            if len(spare) < _ROOMS_MAX:
                spare.append(launch.room)
        return whole

    def clear(self) -> None:
        """Free all memory."""
        self._rooms.clear()
        self._events.clear()
