"""Embeddings whose rows come from a table: one layer's, or those of all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from engram.errors import SelectionError, TokenError
from engram.nn._dequantize import dequantize
from engram.rows import RowFormat, Rows
from engram.tiers import chosen

if TYPE_CHECKING:
    from engram.table import Table


class TableRef:
    """Keeps a table inside a module: a copy of the module shares it, a pickle refuses it."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __deepcopy__(self, memo: dict[int, Any]) -> TableRef:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self.table!r} is open in this process and cannot be pickled; open or connect the "
            "table where the model is needed and build its modules there (state_dict() works)"
        )


class LayerRows:
    """The rows of one step, on a device; `rows[layer]` are that layer's embeddings.

    Attributes:
        layers: the model layer indices it holds.
    """

    def __init__(
        self,
        values: torch.Tensor,
        scales: torch.Tensor | None,
        row_format: RowFormat,
        layers: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.layers = layers
        self._values = values
        self._scales = scales
        self._row_format = row_format
        self._dtype = dtype

    def __getitem__(self, layer: int) -> torch.Tensor:
        """Decode one layer: `[*tokens.shape, columns * dim]`.

        Raises:
            SelectionError: a layer that was not looked up.
        """
        return self.decode(layer, self._dtype, self._values.device)

    def decode(self, layer: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As `[layer]`, in another dtype or on another device."""
        if layer not in self.layers:
            raise SelectionError(f"layer {layer} was not looked up; layers are {self.layers}")
        position = self.layers.index(layer)
        values = self._values.select(-3, position).to(device)
        scales = None if self._scales is None else self._scales.select(-3, position).to(device)
        return dequantize(values, scales, self._row_format, dtype).flatten(-2)


def read(
    table: Table,
    tokens: torch.Tensor | np.ndarray,
    batch: dict[str, Any],
    layers: tuple[int, ...],
    columns: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> LayerRows:
    """One `Table.lookup`, its bytes brought to `device` without waiting for it.

    Bytes bound for a CUDA device land in pinned memory, which torch reuses only after the copy
    from it has finished.

    Args:
        batch: `starts`, `history` and `dead` of the lookup.
    """
    shape = (*tokens.shape, len(layers), len(columns))
    pinned = device.type == "cuda"
    row_format = table.row_format
    values = torch.empty((*shape, row_format.value_bytes), dtype=torch.uint8, pin_memory=pinned)
    scales = None
    if row_format.scale_bytes:
        scales = torch.empty((*shape, row_format.scale_bytes), dtype=torch.uint8, pin_memory=pinned)
    out = Rows(values.numpy(), None if scales is None else scales.numpy())
    host = {name: _on_host(part) for name, part in batch.items()}
    table.lookup(_on_host(tokens), **host, layers=layers, columns=columns, out=out)
    values = values.to(device, non_blocking=True)
    scales = None if scales is None else scales.to(device, non_blocking=True)
    return LayerRows(values, scales, row_format, layers, dtype)


def _on_host(part: Any) -> Any:
    return part.detach().cpu().numpy() if isinstance(part, torch.Tensor) else part


class EngramLookup(nn.Module):
    """Looks the rows of several layers up at once: call it once per step, then hand each layer
    its own, `rows = lookup(tokens, history=history); rows[1]; rows[14]`.

    It has no parameters and nothing in its state dict. A deep copy shares the table; pickling
    raises TypeError, because a table is open in one process.

    Args:
        table: from `engram.open` or `engram.connect`.
        dtype: floating dtype of the embeddings; see `engram.nn.dequantize` for the rounding.
        layers: model layer indices, 0-based; all of the table when None.
        columns: column numbers, in the order wanted; all when None.
        device: where the embeddings go; when None, where the tokens are. Tokens kept on the host
            with `device` naming a CUDA device spare the wait for a copy of them.

    Raises:
        SelectionError: a layer or column that the table lacks, or a dtype that is not floating.
    """

    def __init__(
        self,
        table: Table,
        dtype: torch.dtype = torch.bfloat16,
        layers: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not dtype.is_floating_point:
            raise SelectionError(f"embeddings need a floating dtype, not {dtype}")
        self.layers = chosen("layer", layers, table.layers)
        self.columns = chosen("column", columns, table.columns)
        self.dtype = dtype
        self.device = None if device is None else torch.device(device)
        self._ref = TableRef(table)

    @property
    def table(self) -> Table:
        return self._ref.table

    @property
    def embedding_dim(self) -> int:
        """Width of a layer's embeddings: columns * dim."""
        return len(self.columns) * self.table.row_format.dim

    @torch.compiler.disable
    def forward(
        self,
        tokens: torch.Tensor,
        starts: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
    ) -> LayerRows:
        """Look up all layers for `tokens`.

        Args:
            tokens: integer ids `[T]` with `starts`; else `[L]` or `[B, L]`.
            starts, history, dead: as for `Table.lookup`.

        Returns:
            Each layer's embeddings `[*tokens.shape, columns * dim]`, decoded when asked for.

        Raises: as `Table.lookup`.
        """
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TokenError(f"token ids must be integers, not {tokens.dtype}")
        batch = {"starts": starts, "history": history, "dead": dead}
        device = tokens.device if self.device is None else self.device
        return read(self.table, tokens, batch, self.layers, self.columns, self.dtype, device)

    def prefetch(
        self,
        tokens: torch.Tensor,
        starts: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
    ) -> None:
        """Bring the rows of a coming call closer; returns at once."""
        batch = {"starts": starts, "history": history, "dead": dead}
        host = {name: _on_host(part) for name, part in batch.items()}
        self.table.prefetch(_on_host(tokens), **host)

    def extra_repr(self) -> str:
        return f"{self.table!r}, layers={list(self.layers)}, dtype={self.dtype}"


class EngramEmbedding(nn.Module):
    """One layer's n-gram embeddings: tokens in, `[*tokens.shape, columns * dim]` out.

    A drop-in for the embedding of a model whose table is not resident. A model with several such
    layers reads each n-gram once if it uses `EngramLookup` instead.

    Args:
        table: from `engram.open` or `engram.connect`.
        layer: model layer index, 0-based.
        dtype, columns, device: as for `EngramLookup`.

    Raises:
        SelectionError: a layer or column that the table lacks, or a dtype that is not floating.
    """

    def __init__(
        self,
        table: Table,
        layer: int,
        dtype: torch.dtype = torch.bfloat16,
        columns: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.lookup = EngramLookup(table, dtype, [layer], columns, device)

    @property
    def embedding_dim(self) -> int:
        """Width of the embeddings: columns * dim."""
        return self.lookup.embedding_dim

    def forward(
        self,
        tokens: torch.Tensor,
        starts: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed `tokens`; arguments and errors as for `EngramLookup.forward`."""
        rows: LayerRows = self.lookup(tokens, starts, history, dead)
        return rows[self.layer]
