"""Qwen4-Exp in transformers: where its n-gram tables sit, and the module that replaces them.

The original keeps the last `ngram_size - 1` ids of each sequence as one more conv state of the
layer's cache, so that the cache's own reordering, cropping and resetting apply to them. So does
the replacement, which leaves there what the original would have left.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers.masking_utils import create_recurrent_attention_mask
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen4_exp

from engram.errors import ModelError, SpecMismatchError
from engram.integrations._steps import SharedLookup, States
from engram.nn import dequantize
from engram.spec import NgramSpec

if TYPE_CHECKING:
    from engram.table import Table

_IDS_STATE = 2
"""Which of a layer's conv states holds the ids."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ROWS_COMPARED = 64


class OffloadedNgramEmbedding(nn.Module):
    """Takes the place of `Qwen4ExpTextNGramEmbedding`: same call, same result, no parameters.

    Args:
        original: the module it replaces.
        shared: the lookup it shares with the model's other PLE layers.
    """

    def __init__(self, original: Any, shared: SharedLookup) -> None:
        super().__init__()
        self.layer_idx: int = original.layer_idx
        self.context_len: int = original.context_len
        self.eos_token_id: int = original.eos_token_id
        self.shared = shared
        # Stands in for the weights where a model is cast, so that the rows follow it.
        like = torch.empty(0, dtype=original.ngram_embedding.weight.dtype)
        self._like: torch.Tensor
        self.register_buffer("_like", like, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings: that of the weights they stand in for."""
        return self._like.dtype

    def forward(self, input_ids: torch.Tensor, past_key_values: Any) -> torch.Tensor:
        """Embed `input_ids` `[B, L]` after the ids in the cache: `[B, L, ple_embed_dim]`.

        Raises: as `Table.lookup`; the layer's ids in the cache are then as they were.
        """
        states = cached_ids(past_key_values, self.shared.layers)
        embeddings: torch.Tensor = self.shared.embeddings(
            self.layer_idx, input_ids, states, self.dtype
        )
        if past_key_values is not None:
            self._remember(input_ids.long(), past_key_values, states[self.layer_idx] is None)
        return embeddings

    def _remember(self, input_ids: torch.Tensor, cache: Any, first: bool) -> None:
        missing = self.context_len - input_ids.shape[1]
        if first and missing > 0:
            input_ids = nn.functional.pad(input_ids, (missing, 0), value=self.eos_token_id)
        cache.update_conv_state(
            input_ids, self.layer_idx, state_idx=_IDS_STATE, conv_kernel_size=self.context_len
        )

    def extra_repr(self) -> str:
        return f"layer {self.layer_idx} of {self.shared.table!r}, {self.dtype}"


class StepHooks:
    """Opens a step of `shared` at the text model's entry and closes it at its exit."""

    def __init__(self, text_model: Any, shared: SharedLookup) -> None:
        self._parameters = tuple(inspect.signature(text_model.forward).parameters)
        self._shared = shared

    def install(self, text_model: nn.Module) -> None:
        text_model.register_forward_pre_hook(self.enter, with_kwargs=True)
        text_model.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open with the ids that the layers will get, where the arguments tell them."""
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        ids = given.get("ple_input_ids")
        ids = given.get("input_ids") if ids is None else ids
        cache = given.get("past_key_values")
        if ids is not None:
            ids = _masked(module.config, ids, given.get("attention_mask"), cache)
        layers = self._shared.layers
        self._shared.open(ids, cached_ids(cache, layers), _shared_dtype(module, layers))

    def leave(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self._shared.close()


def _shared_dtype(text_model: Any, layers: tuple[int, ...]) -> torch.dtype:
    """What all layers ask for; float32, from which each can round, where they differ."""
    first, *others = {text_model.layers[layer].ple.ple_embedding.dtype for layer in layers}
    return torch.float32 if others else first


def _masked(config: Any, ids: torch.Tensor, mask: Any, cache: Any) -> torch.Tensor:
    """The ids with padding turned into EOS, as the model does before its layers get them."""
    if isinstance(mask, dict):
        mask = mask.get("linear_attention")
    else:
        # Of the embeddings it looks at the length only, which the ids have too.
        mask = create_recurrent_attention_mask(
            config=config, inputs_embeds=ids, attention_mask=mask, past_key_values=cache
        )
    return ids if mask is None else torch.where(mask.bool(), ids, _eos_of(config))


def _eos_of(config: Any) -> int:
    eos = config.eos_token_id
    return int(eos[0] if isinstance(eos, list) else eos)


def cached_ids(cache: Any, layers: tuple[int, ...]) -> States:
    """The ids each layer's cache holds, `[B, any]`; None where nothing came before."""
    if cache is None:
        return dict.fromkeys(layers)
    return {layer: cache.get_conv_state(layer, state_idx=_IDS_STATE) for layer in layers}


def spec_of(config: Any) -> NgramSpec:
    """The spec of a `Qwen4ExpTextConfig`."""
    return NgramSpec.qwen4_exp(
        vocab_size=config.vocab_size,
        ngram_size=config.ngram_size,
        heads_per_ngram=config.heads_per_ngram,
        ngram_vocab_size_base=config.ngram_vocab_size_base,
        seed=config.seed,
        eos_token_id=_eos_of(config),
        ple_layer_ids=config.ple_layer_ids,
        ple_embed_dim=config.ple_embed_dim,
        make_ngram_vocab_size_divisible_by=config.make_ngram_vocab_size_divisible_by,
    )


def text_model_of(model: Any) -> Any:
    """The one text model inside `model` (or `model` itself) that has n-gram tables.

    Raises:
        ModelError: there is none, or several.
    """
    found = [m for m in model.modules() if isinstance(m, qwen4_exp.Qwen4ExpTextModel)]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} holds {len(found)} Qwen4-Exp text models; pass a "
            "Qwen4ExpForCausalLM, Qwen4ExpForConditionalGeneration or Qwen4ExpTextModel"
        )
    if not found[0].config.ple_layer_ids:
        raise ModelError(
            f"{type(model).__name__} has no layers with n-gram embeddings (ple_layer_ids is "
            "empty), so there is nothing to offload"
        )
    return found[0]


def ple_layers(text_model: Any) -> dict[int, Any]:
    """The PLE module of each model layer that has one, still with its own table.

    Raises:
        ModelError: offloaded before, or changed by something else.
    """
    found = {i: layer.ple for i, layer in enumerate(text_model.layers) if layer.ple is not None}
    for layer, ple in found.items():
        if isinstance(ple.ple_embedding, OffloadedNgramEmbedding):
            raise ModelError(
                "the model is offloaded already; load it again to take its rows from another table"
            )
        if not isinstance(ple.ple_embedding, qwen4_exp.Qwen4ExpTextNGramEmbedding):
            raise ModelError(
                f"layer {layer} embeds n-grams by a {type(ple.ple_embedding).__name__}, not by "
                "transformers' own module; offload the model before other tools change it"
            )
    return found


def check_layer(table: Table, layer: int, original: Any) -> None:
    """Refuse a table that would not give `original`'s embeddings.

    Raises:
        SpecMismatchError: hash, row count, row width or (of a sample) rows differ, field named.
        ModelError: a weight of a kind that rows cannot stand in for.
    """
    hashed = table.spec.layers[table.spec.layer_ids.index(layer)]
    weight = original.ngram_embedding.weight
    if weight.dtype not in _DTYPES:
        raise ModelError(
            f"layer {layer}'s n-gram table is {weight.dtype}; load the model in bfloat16, float16 "
            "or float32 before offloading it"
        )
    pairs = [
        ("multipliers", original.layer_multipliers, hashed.multipliers),
        ("primes", original.ngram_heads_vocab_sizes, hashed.primes),
        ("offsets", original.ngram_heads_offsets, hashed.offsets),
    ]
    for field, buffer, wanted in pairs:
        if buffer.device.type != "meta" and buffer.tolist() != list(wanted):
            raise SpecMismatchError(
                f"layer {layer}'s {field} in the model differ from those its config gives, so the "
                "table does not fit it; import the table from this model's checkpoint",
                field,
            )
    if tuple(weight.shape) != (hashed.rows, table.spec.dim):
        raise SpecMismatchError(
            f"layer {layer}'s n-gram table is {list(weight.shape)} in the model, but "
            f"{[hashed.rows, table.spec.dim]} in {table.name}; offload an unsharded model",
            "rows",
        )


def check_rows(table: Table, layer: int, original: Any) -> None:
    """Compare a sample of rows, where the model still holds them and the table stores floats.

    Raises:
        SpecMismatchError: the table holds other rows, first one named.
        RowIntegrityError: a row of the sample is damaged.
    """
    weight = original.ngram_embedding.weight
    if weight.device.type == "meta" or table.row_format.scale_bytes or _quantized(table):
        return
    used = int(original.ngram_heads_vocab_sizes.sum())
    sample = np.unique(np.linspace(0, used - 1, _ROWS_COMPARED).astype(np.int64))
    rows = table.lookup_rows(layer, sample)
    theirs = dequantize(torch.from_numpy(rows.values), None, table.row_format, weight.dtype)
    ours = weight.detach()[torch.from_numpy(sample).to(weight.device)].cpu()
    same = (_bits(ours) == _bits(theirs)).all(dim=-1).numpy()
    if not same.all():
        raise SpecMismatchError(
            f"layer {layer} row {int(sample[~same][0])} holds other values in the model than in "
            f"{table.name}; import the table from this model's checkpoint, or pass "
            "check_rows=False if it is meant to differ",
            "rows",
        )


def _quantized(table: Table) -> bool:
    return table.row_format.global_scale is not None


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)
