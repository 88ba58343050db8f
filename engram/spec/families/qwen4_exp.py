"""Qwen4-Exp's per-layer embedding (PLE): raw ids, segments ended by EOS, padded tables."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from engram.errors import SpecError
from engram.spec._family import Config, Family, LayerTensors
from engram.spec._layers import LayerHash
from engram.spec._primes import primes_above
from engram.spec._spec import NgramSpec

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_LAYER_STRIDE = 10007


def _splitmix64(word: int) -> int:
    """One step of splitmix64 (Steele, Lea and Flood, 2014)."""
    word = (word + _GAMMA) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def _multipliers(count: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    """Odd, and small enough that the product with any id stays a positive int64."""
    bound = max(1, (2**63 - 1) // vocab_size // 2)
    return tuple(2 * (_splitmix64(seed + _GAMMA * (k + 1)) % bound) + 1 for k in range(count))


def build(
    *,
    vocab_size: int = 248_320,
    ngram_size: int = 3,
    heads_per_ngram: int = 8,
    ngram_vocab_size_base: int = 20_000_000,
    seed: int = 1234,
    eos_token_id: int = 248_044,
    ple_layer_ids: Iterable[int] = (1,),
    ple_embed_dim: int = 2560,
    make_ngram_vocab_size_divisible_by: int = 128,
) -> NgramSpec:
    """Spec of Qwen3.8-Flash-Next, or of another model of its kind.

    The parameters are those of `Qwen4ExpTextConfig` in transformers.

    Args:
        ngram_vocab_size_base: what no head's table falls below.
        ple_layer_ids: **1-based** layer numbers, the spec's are 0-based; order and repetition
            mean nothing, as in transformers.
        ple_embed_dim: values of all columns of a layer together.
        make_ngram_vocab_size_divisible_by: tables are padded up to a multiple of it.

    Raises:
        SpecError: parameters that contradict each other.
    """
    columns = (ngram_size - 1) * heads_per_ngram
    if columns < 1 or ple_embed_dim % columns:
        raise SpecError(
            f"ple_embed_dim {ple_embed_dim} cannot be divided among the {columns} columns of "
            f"ngram_size {ngram_size} and heads_per_ngram {heads_per_ngram}"
        )
    unit = make_ngram_vocab_size_divisible_by
    if vocab_size < 1 or ngram_vocab_size_base < 1 or unit < 1:
        raise SpecError(
            f"vocab_size {vocab_size}, ngram_vocab_size_base {ngram_vocab_size_base} and "
            f"make_ngram_vocab_size_divisible_by {unit} must be positive"
        )
    primes = primes_above(ngram_vocab_size_base - 1)
    layers = []
    for ordinal, number in enumerate(sorted(set(ple_layer_ids))):
        own = tuple(islice(primes, columns))
        layers.append(
            LayerHash(
                layer=number - 1,
                multipliers=_multipliers(ngram_size, vocab_size, seed + _LAYER_STRIDE * ordinal),
                primes=own,
                rows=-(-sum(own) // unit) * unit,
            )
        )
    return NgramSpec(
        family="qwen4_exp",
        vocab_size=vocab_size,
        min_order=2,
        max_order=ngram_size,
        heads=heads_per_ngram,
        dim=ple_embed_dim // columns,
        layers=tuple(layers),
        blocked_id=eos_token_id,
        boundary_id=eos_token_id,
        dead_positions=False,
        token_map=None,
    )


def from_config(config: Config, directory: Path) -> NgramSpec:
    """From the model's config, the text model's nested or not; no tokenizer is read."""
    width = "ple_embed_dim" if config.fields.get("ple_embed_dim") is not None else "hidden_size"
    return build(
        vocab_size=config.integer("vocab_size"),
        ngram_size=config.integer("ngram_size"),
        heads_per_ngram=config.integer("heads_per_ngram"),
        ngram_vocab_size_base=config.integer("ngram_vocab_size_base"),
        seed=config.integer("seed", default=1234),
        eos_token_id=_eos_of(config),
        ple_layer_ids=config.integers("ple_layer_ids"),
        ple_embed_dim=config.integer(width),
        make_ngram_vocab_size_divisible_by=config.integer(
            "make_ngram_vocab_size_divisible_by", default=128
        ),
    )


def _eos_of(config: Config) -> int:
    """The first end-of-sequence id; the outer config's where the text model's has none."""
    for fields in (config.fields, config.outer):
        stated = fields.get("eos_token_id")
        first = stated[0] if isinstance(stated, list) and stated else stated
        if isinstance(first, int) and not isinstance(first, bool):
            return first
        if stated is not None:
            raise config.error("eos_token_id", stated, "an integer or a list of them")
    raise config.error("eos_token_id", None, "an integer or a list of them")


def tensors(spec: NgramSpec) -> list[LayerTensors]:
    """One embedding per layer, whole or in shards, and the buffers that state its hash."""
    return [_tensors_of(each) for each in spec.layers]


def _tensors_of(hashed: LayerHash) -> LayerTensors:
    module = rf"layers\.{hashed.layer}\.ple\.ple_embedding"
    return LayerTensors(
        hashed.layer,
        values=(
            rf"{module}\.ngram_embedding\.shard_(?P<shard>\d+)\.weight",
            rf"{module}\.ngram_embedding\.weight",
        ),
        global_scale=rf"{module}\.ngram_embedding\.weight_scale",
        checks={
            rf"{module}\.layer_multipliers": hashed.multipliers,
            rf"{module}\.ngram_heads_vocab_sizes": hashed.primes,
            rf"{module}\.ngram_heads_offsets": hashed.offsets,
        },
    )


FAMILY = Family(
    name="qwen4_exp",
    model_types=("qwen4_exp", "qwen4_exp_text"),
    build=build,
    from_config=from_config,
    tensors=tensors,
    row_format="bf16",
    size_parameter="ngram_vocab_size_base",
    needs_tokenizer=False,
)
