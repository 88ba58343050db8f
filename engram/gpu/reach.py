"""Host memory that a device reads in place, and staging for what is in no arena.

A CUDA device reads registered host memory at its host address (unified virtual addressing). A
client's map of the arena is read-only and sealed, so it is registered as read-only, which any
device that can read pageable memory or has `cudaDevAttrHostRegisterReadOnlySupported` allows;
other flags are refused for such a map.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from engram.errors import ConfigError
from engram.ram.bundle_tier import InPlace
from engram.ram.memory import Memory

_READ_ONLY = 0x08
"""cudaHostRegisterReadOnly."""
_RETRY_S = 0.02
_STAGING_LEAST = 1 << 20
_Flags = np.ndarray[Any, np.dtype[np.uint8]]


_log = logging.getLogger("engram.gpu")


class Reach:
    """Which slabs of an arena a device can read; more as they get their memory.

    A slab that cannot be read costs speed only: its n-grams are fetched to staging.

    Args:
        in_place: the arena.
        device: that reads it.

    Attributes:
        reachable: uint8 `[slabs]`, set by a thread of its own.
        failure: why the rest cannot be read, if so.
    """

    def __init__(self, in_place: InPlace, device: torch.device) -> None:
        self._slabs = in_place.slabs
        self._ready = in_place.ready
        self._device = device
        self._closing = threading.Event()
        self._settled = threading.Event()
        # Taken again if the garbage collector ends this one meanwhile.
        self._lock = threading.RLock()
        self._registered: list[Memory] = []
        self.reachable: _Flags = np.zeros(max(1, len(self._slabs)), np.uint8)
        self.failure: ConfigError | None = None
        threading.Thread(target=self._register_all, name="engram-register", daemon=True).start()

    def _register_all(self) -> None:
        try:
            for number, slab in enumerate(self._slabs):
                while self._ready() <= number:
                    if self._closing.wait(_RETRY_S):
                        return
                if not self._register(number, slab):
                    return
        except ConfigError as error:
            self.failure = error
            _log.warning("%s", error)
        finally:
            self._settled.set()

    def _register(self, number: int, slab: Memory) -> bool:
        with self._lock:
            if self._closing.is_set():
                return False
            if self._device.type == "cuda":
                register(slab.address, slab.size, self._device)
                self._registered.append(slab)
            self.reachable[number] = 1
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait until all slabs can be read, or one cannot; whether that was in time."""
        return self._settled.wait(timeout_s)

    @property
    def registered_bytes(self) -> int:
        return sum(slab.size for slab in self._registered)

    def close(self) -> None:
        """Let go of all; nothing that reads them may be queued any more."""
        self._closing.set()
        with self._lock:
            self.reachable[:] = 0
            registered, self._registered = self._registered, []
        for slab in registered:
            _cudart().cudaHostUnregister(slab.address)


_reaches: weakref.WeakKeyDictionary[InPlace, dict[str, Reach]] = weakref.WeakKeyDictionary()
_finding = threading.Lock()


def reach_of(in_place: InPlace, device: torch.device) -> Reach:
    """The one of an arena, which all devices of a kind share: CUDA registers memory once, for all
    of its. It ends with `in_place`."""
    with _finding:
        kinds = _reaches.setdefault(in_place, {})
        if device.type not in kinds:
            reach = kinds[device.type] = Reach(in_place, device)
            weakref.finalize(in_place, reach.close).atexit = False
        return kinds[device.type]


def _renew_lock() -> None:
    global _finding  # noqa: PLW0603 - a thread that the child lacks may have held it
    _finding = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def register(address: int, size: int, device: torch.device) -> None:
    """Let CUDA devices read some mapped, populated memory in place.

    Raises:
        ConfigError: refused, with the reason.
    """
    with torch.cuda.device(device):
        code = int(_cudart().cudaHostRegister(address, size, _READ_ONLY))
        if not code:
            return
        reason = _cudart().cudaGetErrorString(_cudart().cudaError(code))
        with suppress(RuntimeError):
            torch.zeros(1, device=device)  # takes the error, which the next call would raise
    raise ConfigError(
        f"{device} cannot read {size} bytes of the RAM tier in place: cudaHostRegister with flag "
        f"{_READ_ONLY} (read-only) says {reason!r}; raise the memlock limit (ulimit -l, or "
        "LimitMEMLOCK=); until then its rows are copied, which is slower"
    )


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class Staging:
    """Host memory for bundles on their way, in two halves that take turns.

    A half is written again only after the device has read it, and grows to what was needed.

    Args:
        device: that reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._turn = 0
        self.clear()

    @property
    def bytes(self) -> int:
        return sum(half.numel() for half in self._halves)

    def take(self, size: int) -> int:
        """Address of `size` bytes that nobody reads; waits for the device if it still does."""
        self._turn = 1 - self._turn
        event, self._read[self._turn] = self._read[self._turn], None
        if event is not None:
            event.synchronize()
        if self._halves[self._turn].numel() < size:
            pinned = self._device.type == "cuda"
            wanted = max(_STAGING_LEAST, 1 << (size - 1).bit_length())
            self._halves[self._turn] = torch.empty(wanted, dtype=torch.uint8, pin_memory=pinned)
        return self._halves[self._turn].data_ptr()

    def clear(self) -> None:
        """Free all; the device reads none of it any more."""
        self._halves = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._read: list[Any] = [None, None]

    def queued(self, event: Any) -> None:
        """What reads the half taken last is queued before `event`; None if it was read already."""
        self._read[self._turn] = event
