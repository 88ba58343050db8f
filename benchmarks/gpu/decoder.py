"""A dense decoder with random weights, and places where memory is written into its hidden states.

Fast enough to show what a table costs: bf16, grouped-query attention over a static cache, every
step a replay of two captured graphs, before the first Engram layer and from it on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values `[tokens, heads, head_dim]`."""
        shape = self.shape
        qkv = self.qkv(self.norm1(hidden)).view(len(hidden), -1, shape.head_dim)
        parts: tuple[torch.Tensor, ...] = qkv.split(
            [shape.heads, shape.kv_heads, shape.kv_heads], 1
        )
        return parts

    def finish(self, hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """What follows the attention, given what it saw."""
        hidden = hidden + self.out(seen.reshape(len(hidden), self.shape.hidden))
        gate, up = self.up(self.norm2(hidden)).chunk(2, dim=-1)
        finished: torch.Tensor = hidden + self.down(functional.silu(gate) * up)
        return finished

    def attend(self, qkv: Sequence[torch.Tensor], *, prefill: bool) -> torch.Tensor:
        """One token of each sequence over its cache, or all tokens of one over those before."""
        if prefill:
            query, key, value = (part.transpose(0, 1)[None] for part in qkv)
            seen = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
            return seen[0].transpose(0, 1)
        query, key, value = qkv
        count = len(query)
        self.cache[0, :count, :, -1], self.cache[1, :count, :, -1] = key, value
        return functional.scaled_dot_product_attention(
            query.unsqueeze(2), self.cache[0, :count], self.cache[1, :count], enable_gqa=True
        )


Memory = Callable[[int], torch.Tensor] | None
"""Embeddings `[sequences, embed_dim]` of one of the two layers, by its number among them."""


class Decoder(nn.Module):
    """On a CUDA device all but the attention is compiled.

    Args: shape; sequences, at most; where.
    """

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
        self._project, self._finish = _Block.project, _Block.finish
        self._fuse: Any = DeepSeekV41Fusion.forward
        if device.type == "cuda":
            self._project = torch.compile(_Block.project, dynamic=False)
            self._finish = torch.compile(_Block.finish, dynamic=False)
            self._fuse = torch.compile(DeepSeekV41Fusion.forward, dynamic=False)

    def _through(self, number: int, hidden: torch.Tensor, *, prefill: bool) -> torch.Tensor:
        block: Any = self.blocks[number]
        seen = block.attend(self._project(block, hidden), prefill=prefill)
        return self._finish(block, hidden, seen)

    def before(self, ids: torch.Tensor, *, prefill: bool = False) -> torch.Tensor:
        """Up to the first Engram layer, ids `[sequences]`, or of one sequence's tokens."""
        hidden: torch.Tensor = self.embed(ids)
        for number in range(self.shape.engram_layers[0]):
            hidden = self._through(number, hidden, prefill=prefill)
        return hidden

    def after(self, hidden: torch.Tensor, memory: Memory, *, prefill: bool = False) -> torch.Tensor:
        """From there on: the ids that come next."""
        for number in range(self.shape.engram_layers[0], self.shape.layers):
            if memory is not None and number in self.shape.engram_layers:
                which = self.shape.engram_layers.index(number)
                fused = self._fuse(self.fusions[which], hidden.unsqueeze(-2), memory(which))
                hidden = fused.squeeze(-2)
            hidden = self._through(number, hidden, prefill=prefill)
        hidden = hidden[-1:] if prefill else hidden
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
