"""DeepSeek-V4.1-Flash: the demo's hashing with dead positions, fp8 rows and fixed row counts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from engram.spec._compression import TokenizerLike
from engram.spec._family import Config, Family, LayerTensors
from engram.spec._spec import NgramSpec
from engram.spec.families.deepseek_demo import compressed_spec


def build(
    *,
    tokenizer: TokenizerLike,
    engram_vocab_size: int = 16_000_000,
    layer_ids: Iterable[int] = (1, 14),
    max_ngram_size: int = 4,
    n_heads: int = 8,
    head_dim: int = 256,
    pad_token_id: int = 2,
    seed: int = 0,
) -> NgramSpec:
    """Spec of DeepSeek-V4.1-Flash, or of a smaller memory of its kind.

    Args:
        tokenizer: `tokenizer.json`, its directory, or the int32 token map itself.
        engram_vocab_size: smallest table size of every order.
        layer_ids: model layer indices, in the order in which primes are handed out.
        head_dim: values in a row.
        pad_token_id: raw id that blocked positions hold.

    Raises:
        SpecError: parameters that contradict each other, or an unusable tokenizer.
    """
    return compressed_spec(
        "deepseek_v41",
        tokenizer,
        engram_vocab_size,
        tuple(layer_ids),
        max_order=max_ngram_size,
        heads=n_heads,
        dim=head_dim,
        pad_id=pad_token_id,
        seed=seed,
        dead_positions=True,
    )


def from_config(config: Config, directory: Path) -> NgramSpec:
    """From the model's config; its row counts and compressed vocabulary must come out."""
    layer_ids = config.integers("engram_layer_ids")
    row_counts = config.integers("engram_num_embeddings")
    compressed = config.integer("engram_compressed_vocab_size")
    spec = build(
        tokenizer=directory,
        engram_vocab_size=config.integer("engram_vocab_size"),
        layer_ids=layer_ids,
        max_ngram_size=config.integer("engram_max_ngram_size"),
        n_heads=config.integer("engram_n_heads"),
        head_dim=config.integer("engram_head_dim"),
        pad_token_id=config.integer("engram_pad_token_id"),
    )
    config.require_equal("engram_compressed_vocab_size", compressed, spec.canonical_vocab_size)
    rows = {each.layer: each.rows for each in spec.layers}
    config.require_equal("engram_num_embeddings", row_counts, [rows[layer] for layer in layer_ids])
    return spec


def tensors(spec: NgramSpec) -> list[LayerTensors]:
    """Values and scales of each layer, under the published names or those engines give them."""
    return [
        LayerTensors(
            layer,
            values=(rf"layers\.{layer}\.engram\.embed(?:_tokens)?\.weight",),
            scales=rf"layers\.{layer}\.engram\.embed(?:\.scale|_tokens\.weight_scale_inv)",
        )
        for layer in spec.layer_ids
    ]


FAMILY = Family(
    name="deepseek_v41",
    model_types=("deepseek_v41",),
    build=build,
    from_config=from_config,
    tensors=tensors,
    row_format="fp8-ue8m0",
    size_parameter="engram_vocab_size",
    needs_tokenizer=True,
)
