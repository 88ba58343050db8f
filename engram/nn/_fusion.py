"""How the families mix looked-up embeddings into their hyper-connected hidden states.

Both compute, for each branch h of the hyper-connection, with d the hidden size:

    dot  = sum(rmsnorm(key_h) * rmsnorm(hidden_h)) / sqrt(d)
    gate = sigmoid(sign(dot) * sqrt(max(|dot|, 1e-6)))

and write gate * value, the value being shared by all branches (Cheng et al., "Conditional Memory
via Scalable Lookup", 2026, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from engram.errors import CheckpointError

_CLAMP = 1e-6


class DeepSeekDemoFusion(nn.Module):
    """The demo's Engram module without its table: what is to be added to the hidden states.

    Parameters carry the demo's names (`key_projs.0.weight`, `norm1.0.weight`, `value_proj.weight`,
    `short_conv.conv.weight`, ..), so that its state dict loads with `load_demo_state`.

    Args:
        embed_dim: width of the embeddings, columns * dim.
        hidden_size: d.
        branches: the hyper-connection's, `hc_mult`.
        max_order: dilation of the short convolution, `max_ngram_size`.
        kernel_size: its taps.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_size: int,
        branches: int,
        max_order: int,
        kernel_size: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.hidden_size = hidden_size
        self.value_proj = nn.Linear(embed_dim, hidden_size, **made)
        self.key_projs = nn.ModuleList(
            nn.Linear(embed_dim, hidden_size, **made) for _ in range(branches)
        )
        self.norm1 = _norms(branches, hidden_size, None, made)
        self.norm2 = _norms(branches, hidden_size, None, made)
        self.short_conv = ShortConv(hidden_size, branches, max_order, kernel_size, made)

    def forward(self, hidden_states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Gate and smooth the embeddings.

        Args:
            hidden_states: `[B, L, branches, hidden_size]`.
            embeddings: `[B, L, embed_dim]`, as `EngramEmbedding` gives them.

        Returns:
            `[B, L, branches, hidden_size]`, to be added to `hidden_states`.
        """
        gates = []
        for branch, project in enumerate(self.key_projs):
            key = self.norm1[branch](project(embeddings))
            query = self.norm2[branch](hidden_states[:, :, branch])
            dot = (key * query).sum(dim=-1) / math.sqrt(self.hidden_size)
            gates.append(torch.sigmoid(dot.abs().clamp_min(_CLAMP).sqrt() * dot.sign()))
        gate = torch.stack(gates, dim=2).unsqueeze(-1)
        value = gate * self.value_proj(embeddings).unsqueeze(2)
        added: torch.Tensor = value + self.short_conv(value)
        return added

    def load_demo_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load a state dict of the demo's module; its table is left out.

        Raises:
            CheckpointError: a parameter is missing, unknown or of another shape.
        """
        _load(self, {n: t for n, t in state.items() if not n.startswith("multi_head_embedding.")})


class ShortConv(nn.Module):
    """Depthwise causal convolution over tokens, each branch normalized first, SiLU after."""

    def __init__(
        self, hidden_size: int, branches: int, dilation: int, kernel_size: int, made: dict[str, Any]
    ) -> None:
        super().__init__()
        channels = hidden_size * branches
        self.reach = (kernel_size - 1) * dilation
        self.conv = nn.Conv1d(
            channels,
            channels,
            kernel_size,
            groups=channels,
            bias=False,
            dilation=dilation,
            **made,
        )
        self.norms = _norms(branches, hidden_size, 1e-5, made)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """`[B, L, branches, hidden_size]` to the same shape; token t sees t and older ones only."""
        normed = [norm(value[:, :, branch]) for branch, norm in enumerate(self.norms)]
        channels_first = torch.cat(normed, dim=-1).transpose(1, 2)
        padded = nn.functional.pad(channels_first, (self.reach, 0))
        mixed: torch.Tensor = nn.functional.silu(self.conv(padded))
        return mixed.transpose(1, 2).reshape(value.shape)


class DeepSeekV41Fusion(nn.Module):
    """DeepSeek-V4.1's Engram module without its table: the hidden states, memory written in.

    One projection `wkv` gives the keys of all branches, then the shared value. The weights of the
    two RMSNorms are used only as a product, and all of the gate is computed in float32. Unlike the
    demo it has no convolution, and a dot product of zero counts as positive.

    Names and shapes are those of the released checkpoint below `layers.{i}.engram.`:
    `wkv.weight` `[(branches + 1) * hidden_size, embed_dim]` without bias (there fp8 with block
    scales: dequantize it first), `q_weight` and `k_weight` `[branches, hidden_size]`. They are not
    part of the published config but were read from public engines that load that checkpoint
    (vLLM, SGLang), the order of keys and value too.

    Args:
        embed_dim: width of the embeddings, columns * dim (6,144 in the release).
        hidden_size: d (5,120).
        branches: the hyper-connection's, `hc_mult` (4).
        eps: of both RMSNorms, the config's `rms_norm_eps` (1e-20).
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_size: int,
        branches: int,
        eps: float = 1e-20,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.branches, self.eps = hidden_size, branches, eps
        width = (branches + 1) * hidden_size
        self.wkv = nn.Linear(embed_dim, width, bias=False, device=device, dtype=dtype)
        ones = torch.ones(branches, hidden_size, device=device, dtype=dtype)
        self.q_weight = nn.Parameter(ones)
        self.k_weight = nn.Parameter(ones.clone())

    def forward(
        self,
        hidden_states: torch.Tensor,
        embeddings: torch.Tensor,
        dead: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the memory into the hidden states.

        Args:
            hidden_states: `[.., branches, hidden_size]`.
            embeddings: `[.., embed_dim]`, as `EngramEmbedding` gives them.
            dead: bool `[..]`: positions that take no part; they come out as they went in.

        Returns:
            `[.., branches, hidden_size]`, dtype of `hidden_states`.
        """
        keys_and_value = self.wkv(embeddings.to(self.wkv.weight.dtype)).float()
        shape = (*embeddings.shape[:-1], self.branches + 1, self.hidden_size)
        key, value = keys_and_value.reshape(shape).split([self.branches, 1], dim=-2)
        hidden = hidden_states.float()
        weight = self.q_weight.float() * self.k_weight.float()
        scale = _inverse_rms(hidden, self.eps) * _inverse_rms(key, self.eps)
        dot = (hidden * weight * key).sum(dim=-1) * scale / math.sqrt(self.hidden_size)
        gate = torch.sigmoid(torch.copysign(dot.abs().clamp_min(_CLAMP).sqrt(), dot))
        fused: torch.Tensor = (hidden + gate.unsqueeze(-1) * value).to(hidden_states.dtype)
        if dead is None:
            return fused
        return torch.where(dead[..., None, None], hidden_states, fused)

    def load_checkpoint_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load the tensors below `layers.{i}.engram.`, dequantized; the table is left out.

        Raises:
            CheckpointError: a parameter is missing, unknown or of another shape.
        """
        _load(self, {n: t for n, t in state.items() if not n.startswith("embed.")})


def _norms(branches: int, size: int, eps: float | None, made: dict[str, Any]) -> nn.ModuleList:
    return nn.ModuleList(nn.RMSNorm(size, eps=eps, **made) for _ in range(branches))


def _inverse_rms(vectors: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(vectors.square().mean(dim=-1) + eps)


def _load(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """All of `state` into `module`, or nothing: load_state_dict copies before it complains."""
    own = module.state_dict()
    for name in sorted(own.keys() ^ state.keys()):
        what = "lacks" if name in own else "has an unknown"
        raise CheckpointError(f"the fusion state {what} parameter {name!r}; check the prefix")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {list(state[name].shape)}, but the module was built for "
                f"{list(tensor.shape)}; build it with the checkpoint's config"
            )
    module.load_state_dict(dict(state))
