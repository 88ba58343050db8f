"""A dense decoder with random weights, and places where memory is written into its hidden states.

Fast enough to show what a table costs: bf16, grouped-query attention over a static cache, every
step a replay of two captured graphs, before the first Engram layer and from it on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from engram.nn import DeepSeekV41Fusion

cuda: Any = torch.cuda  # parts of it have no types


@dataclass(frozen=True)
class Shape:
    """Of the decoder: by default some 8 billion parameters."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    feed_forward: int = 14336
    vocab: int = 129_280
    context: int = 512
    engram_layers: tuple[int, int] = (1, 14)
    embed_dim: int = 24 * 256

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def bytes_of_step(self, sequences: int) -> int:
        """Read at least: weights once, and every sequence's cache."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        block = attention + 3 * self.hidden * self.feed_forward
        weights = self.layers * block + self.hidden * self.vocab
        cache = 2 * self.layers * sequences * self.context * self.kv_heads * self.head_dim
        return 2 * (weights + cache)


def _linear(rows: int, columns: int, device: torch.device) -> nn.Linear:
    made = nn.Linear(rows, columns, bias=False, device=device, dtype=torch.bfloat16)
    nn.init.normal_(made.weight, std=rows**-0.5)
    return made


class _Block(nn.Module):
    def __init__(self, shape: Shape, sequences: int, device: torch.device) -> None:
        super().__init__()
        self.shape = shape
        wide = shape.head_dim * (shape.heads + 2 * shape.kv_heads)
        made: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.norm1 = nn.RMSNorm(shape.hidden, **made)
        self.norm2 = nn.RMSNorm(shape.hidden, **made)
        self.qkv = _linear(shape.hidden, wide, device)
        self.out = _linear(shape.hidden, shape.hidden, device)
        self.up = _linear(shape.hidden, 2 * shape.feed_forward, device)
        self.down = _linear(shape.feed_forward, shape.hidden, device)
        size = (2, sequences, shape.kv_heads, shape.context, shape.head_dim)
        self.cache = torch.randn(size, **made)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shape, count = self.shape, len(hidden)
        parts = [shape.heads, shape.kv_heads, shape.kv_heads]
        qkv = self.qkv(self.norm1(hidden)).view(count, -1, 1, shape.head_dim).split(parts, dim=1)
        self.cache[0, :count, :, -1:] = qkv[1]
        self.cache[1, :count, :, -1:] = qkv[2]
        seen = functional.scaled_dot_product_attention(
            qkv[0], self.cache[0, :count], self.cache[1, :count], enable_gqa=True
        )
        hidden = hidden + self.out(seen.reshape(count, shape.hidden))
        gate, up = self.up(self.norm2(hidden)).chunk(2, dim=-1)
        forward: torch.Tensor = hidden + self.down(functional.silu(gate) * up)
        return forward


Memory = Callable[[int], torch.Tensor] | None
"""Embeddings `[sequences, embed_dim]` of one of the two layers, by its number among them."""


class Decoder(nn.Module):
    """Args: shape; sequences, at most; where."""

    def __init__(self, shape: Shape, sequences: int, device: torch.device) -> None:
        super().__init__()
        self.shape, self.device = shape, device
        self.embed = nn.Embedding(shape.vocab, shape.hidden, device=device, dtype=torch.bfloat16)
        self.blocks = nn.ModuleList(_Block(shape, sequences, device) for _ in range(shape.layers))
        made: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.fusions = nn.ModuleList(
            DeepSeekV41Fusion(shape.embed_dim, shape.hidden, 1, **made) for _ in shape.engram_layers
        )
        self.head = _linear(shape.hidden, shape.vocab, device)

    def before(self, ids: torch.Tensor) -> torch.Tensor:
        """Up to the first Engram layer."""
        hidden: torch.Tensor = self.embed(ids)
        for number in range(self.shape.engram_layers[0]):
            hidden = self.blocks[number](hidden)
        return hidden

    def after(self, hidden: torch.Tensor, memory: Memory) -> torch.Tensor:
        """From there on: the ids that come next."""
        for number in range(self.shape.engram_layers[0], self.shape.layers):
            if memory is not None and number in self.shape.engram_layers:
                which = self.shape.engram_layers.index(number)
                fused = self.fusions[which](hidden.unsqueeze(-2), memory(which))
                hidden = fused.squeeze(-2)
            hidden = self.blocks[number](hidden)
        ids: torch.Tensor = self.head(hidden).argmax(-1).to(torch.int32)
        return ids


class Step:
    """A decode step of a fixed number of sequences, captured where there are graphs.

    Args:
        memory: as for `Decoder.after`; reads fixed addresses.
        before: what the first graph does beside the layers, given the ids; or None.
    """

    def __init__(
        self,
        decoder: Decoder,
        sequences: int,
        memory: Memory,
        before: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.ids = torch.zeros(sequences, dtype=torch.int64, device=decoder.device)
        self.next: torch.Tensor
        self._hidden: torch.Tensor

        def first() -> None:
            if before is not None:
                before(self.ids)
            self._hidden = decoder.before(self.ids)

        def rest() -> None:
            self.next = decoder.after(self._hidden, memory)

        self.first, self.rest = _captured(first, decoder), _captured(rest, decoder)


def _captured(work: Callable[[], None], decoder: Decoder) -> Callable[[], None]:
    with torch.no_grad():
        if decoder.device.type != "cuda":
            work()

            def again() -> None:
                with torch.no_grad():
                    work()

            return again
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(2):
                work()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            work()
    replay: Callable[[], None] = graph.replay
    return replay
