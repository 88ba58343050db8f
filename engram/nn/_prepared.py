"""A step's embeddings on their way to a device, and what brings them there."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from engram.errors import ConfigError, SelectionError
from engram.gpu.launches import Launch
from engram.gpu.tier import GpuTier
from engram.ram.bundle_tier import BundleTier
from engram.tiers import Int32s, Selection

if TYPE_CHECKING:
    from engram.table import Table

_finding = threading.Lock()


def gpu_tier(
    table: Table, selection: Selection, device: torch.device, capacity: int
) -> GpuTier | None:
    """The GPU tier that serves `selection` on `device`, made when first asked for.

    None where rows are looked up on the host and copied: other devices than CUDA's (on the CPU
    only a `capacity` asks for the tier, which then is the host's twin), tables of sidecars on
    other hosts, and without Triton.

    Raises:
        ConfigError: a capacity where there can be no tier, or more than the device has free.
    """
    if device.type == "cpu" and not capacity:
        return None
    below = getattr(table, "_tier", None)
    reason = ""
    if device.type not in ("cuda", "cpu"):
        reason = f"{device.type} devices have no GPU tier yet"
    elif device.type == "cuda" and find_spec("triton") is None:
        reason = "the GPU tier needs Triton: pip install triton"
    elif not isinstance(below, BundleTier):
        reason = f"{table.name} is served from another host"
    if reason:
        if capacity:
            raise ConfigError(f"hbm: {reason}; leave hbm out, and rows are copied from the host")
        return None
    assert isinstance(below, BundleTier)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with _finding:
        for tier in table.on_devices:
            if (tier.selection, tier.device, tier.capacity) == (selection, device, capacity):
                return tier  # type: ignore[no-any-return]
        tier = GpuTier(below, selection, device, capacity)
        table.on_devices.append(tier)
        return tier


def _renew_lock() -> None:
    global _finding  # noqa: PLW0603 - a thread that the child lacks may have held it
    _finding = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class Prepared:
    """The embeddings of one step, on their way: `wait` at the layer that needs them first.

    Attributes:
        layers: the model layer indices it holds.
    """

    def __init__(
        self,
        tier: GpuTier,
        layers: tuple[int, ...],
        out: torch.Tensor,
        launches: Sequence[Launch],
        *,
        owned: bool,
    ) -> None:
        self.layers = layers
        self._tier = tier
        self._out = out
        self._launches = launches
        self._owned = owned
        self._waited: set[int] = set()

    def wait(self) -> Prepared:
        """Let the current stream go on only once the embeddings are there; the host goes on.

        Call it outside of a captured graph, before its replay.

        Raises:
            UnavailableError: the sidecar ended the lease, so rows may be wrong; prepare again.
        """
        if self._launches and self._launches[-1].done is not None:
            stream = torch.cuda.current_stream(self._tier.device)
            if stream.cuda_stream not in self._waited:
                stream.wait_event(self._launches[-1].done)
                if self._owned:
                    self._out.record_stream(stream)
                self._waited.add(stream.cuda_stream)
        self._tier.check(self._launches)
        return self

    def __getitem__(self, layer: int) -> torch.Tensor:
        """One layer's embeddings `[*tokens.shape, columns * dim]`; waits first.

        Raises:
            SelectionError: a layer that was not looked up.
            UnavailableError: as `wait`.
        """
        if layer not in self.layers:
            raise SelectionError(f"layer {layer} was not looked up; layers are {self.layers}")
        return self.wait()._out[self.layers.index(layer)]

    def decode(self, layer: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As `[layer]`, in another dtype or on another device."""
        return self[layer].to(device, dtype)


def prepare(
    tier: GpuTier,
    windows: Int32s,
    shape: tuple[int, ...],
    layers: tuple[int, ...],
    dtype: torch.dtype,
    out: torch.Tensor | None,
    after: Any = None,
) -> Prepared:
    """Queue the embeddings of a step.

    Args:
        windows: int32 `[T, max_order]`.
        shape: of the tokens.
        out: `dtype` `[layers, *shape, columns * dim]` to fill, contiguous on the device. Fresh
            memory when None.
        after: event behind which `out` may be written; when None, behind all that the current
            stream has queued.

    Raises:
        SelectionError: an `out` that does not fit.
        Others: as `GpuTier.embed`.
    """
    tier.require_usable()
    wanted = (len(layers), *shape, tier.width)
    stream = tier.stream
    owned = out is None
    if out is not None:
        _check_out(out, wanted, dtype, tier.device)
        if stream is not None:
            if after is None:
                stream.wait_stream(torch.cuda.current_stream(tier.device))
            else:
                stream.wait_event(after)
            # Each time: the same tensor may have been given other memory since.
            out.record_stream(stream)
    elif stream is None:
        out = torch.empty(wanted, dtype=dtype, device=tier.device)
    else:
        # Of the tier's own stream, so that it waits for nobody who used that memory before.
        with torch.cuda.stream(stream):
            out = torch.empty(wanted, dtype=dtype, device=tier.device)
    try:
        launches = tier.embed(windows, out)
    except BaseException:
        if stream is not None:  # a part of it may be written
            torch.cuda.current_stream(tier.device).wait_stream(stream)
        raise
    return Prepared(tier, layers, out, launches, owned=owned)


def _check_out(
    out: torch.Tensor, wanted: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if (
        out.shape != wanted
        or out.dtype != dtype
        or out.device.type != device.type
        or (device.type != "cpu" and out.device != device)
        or not out.is_contiguous()
    ):
        raise SelectionError(
            f"out must be contiguous {dtype} {list(wanted)} on {device}, not {out.dtype} "
            f"{list(out.shape)} on {out.device}; a CUDA graph needs one such tensor for each "
            "batch size it was captured with"
        )
