"""The demonstration code of the Engram paper (DeepSeek, 2026): compressed ids, seeded multipliers.

Every head of every layer has a prime of its own. For each layer and order in turn, primes are
taken in ascending order from the order's table size on, passing over those already taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from engram.errors import SpecError
from engram.spec._compression import TokenizerLike, token_map_of
from engram.spec._family import Config, Family, LayerTensors
from engram.spec._layers import LayerHash
from engram.spec._primes import primes_above
from engram.spec._spec import NgramSpec

_LAYER_STRIDE = 10007


def layer_hashes(
    layer_ids: Sequence[int],
    table_sizes: Sequence[int],
    heads: int,
    compressed_vocab_size: int,
    seed: int,
) -> tuple[LayerHash, ...]:
    """Multipliers and primes of all layers, ascending by layer.

    Args:
        layer_ids: in the order in which primes are handed out.
        table_sizes: for each order from 2 on, what its primes must not fall below.
    """
    candidates: dict[int, Iterator[int]] = {}
    taken: set[int] = set()
    found = []
    for layer in layer_ids:
        primes: list[int] = []
        for size in table_sizes:
            # Those passed over were taken already, so the search never has to go back.
            rising = candidates.setdefault(size, primes_above(size - 1))
            primes += _untaken(rising, taken, heads)
        multipliers = _multipliers(
            len(table_sizes) + 1, compressed_vocab_size, seed + _LAYER_STRIDE * layer
        )
        found.append(LayerHash(layer, multipliers, tuple(primes), sum(primes)))
    return tuple(sorted(found, key=lambda each: each.layer))


def _untaken(rising: Iterator[int], taken: set[int], count: int) -> list[int]:
    fresh: list[int] = []
    while len(fresh) < count:
        prime = next(rising)
        if prime not in taken:
            taken.add(prime)
            fresh.append(prime)
    return fresh


def _multipliers(count: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    """Odd, and small enough that the product with any id stays a positive int64."""
    bound = max(1, (2**63 - 1) // vocab_size // 2)
    drawn = np.random.default_rng(seed).integers(0, bound, size=count, dtype=np.int64)
    return tuple(2 * int(each) + 1 for each in drawn)


def build(
    *,
    tokenizer: TokenizerLike,
    engram_vocab_size: int | Iterable[int] = (646_400, 646_400),
    max_ngram_size: int = 3,
    n_embed_per_ngram: int = 512,
    n_head_per_ngram: int = 8,
    layer_ids: Iterable[int] = (1, 15),
    pad_id: int = 2,
    seed: int = 0,
) -> NgramSpec:
    """Spec of the demo's memory.

    Args:
        tokenizer: `tokenizer.json`, its directory, or the int32 token map itself.
        engram_vocab_size: smallest table size of each order from 2 on; one int = the same for all.
        n_embed_per_ngram: values of all heads of one order together.
        layer_ids: model layer indices, in the order in which primes are handed out.
        pad_id: raw id that stands before the start of a sequence.

    Raises:
        SpecError: parameters that contradict each other, or an unusable tokenizer.
    """
    if n_head_per_ngram < 1 or n_embed_per_ngram % n_head_per_ngram:
        raise SpecError(
            f"n_embed_per_ngram {n_embed_per_ngram} cannot be divided among "
            f"n_head_per_ngram {n_head_per_ngram} heads"
        )
    return compressed_spec(
        "deepseek_demo",
        tokenizer,
        engram_vocab_size,
        tuple(layer_ids),
        max_order=max_ngram_size,
        heads=n_head_per_ngram,
        dim=n_embed_per_ngram // n_head_per_ngram,
        pad_id=pad_id,
        seed=seed,
        dead_positions=False,
    )


def compressed_spec(
    name: str,
    tokenizer: TokenizerLike,
    table_sizes: int | Iterable[int],
    layer_ids: tuple[int, ...],
    *,
    max_order: int,
    heads: int,
    dim: int,
    pad_id: int,
    seed: int,
    dead_positions: bool,
) -> NgramSpec:
    """A spec of the demo's kind; DeepSeek-V4.1 is one, too."""
    orders = max_order - 1
    sizes = [table_sizes] * orders if isinstance(table_sizes, int) else list(table_sizes)
    if orders < 1 or len(sizes) != orders or min(sizes) < 1:
        raise SpecError(
            f"engram_vocab_size {sizes} must hold one positive size for each order 2..{max_order}"
        )
    if seed < 0 or min(layer_ids, default=0) < 0:
        raise SpecError(f"seed {seed} and layers {list(layer_ids)} must not be negative")
    token_map = token_map_of(tokenizer)
    if not 0 <= pad_id < len(token_map):
        raise SpecError(f"pad id {pad_id} is not in the vocabulary of {len(token_map)}")
    return NgramSpec(
        family=name,
        vocab_size=len(token_map),
        min_order=2,
        max_order=max_order,
        heads=heads,
        dim=dim,
        layers=layer_hashes(layer_ids, sizes, heads, int(token_map.max()) + 1, seed),
        blocked_id=int(token_map[pad_id]),
        boundary_id=None,
        dead_positions=dead_positions,
        token_map=token_map,
    )


def from_config(config: Config, directory: Path) -> NgramSpec:
    """From a config whose keys are the parameters of `build`; the paper's code has no config."""
    sizes = config.fields.get("engram_vocab_size")
    return build(
        tokenizer=directory,
        engram_vocab_size=sizes if isinstance(sizes, int) else config.integers("engram_vocab_size"),
        max_ngram_size=config.integer("max_ngram_size"),
        n_embed_per_ngram=config.integer("n_embed_per_ngram"),
        n_head_per_ngram=config.integer("n_head_per_ngram"),
        layer_ids=config.integers("layer_ids"),
        pad_id=config.integer("pad_id"),
        seed=config.integer("seed"),
    )


def tensors(spec: NgramSpec) -> list[LayerTensors]:
    """One embedding per layer; the module around it may have any name without a number."""
    name = r"multi_head_embedding\.embedding\.weight"
    if len(spec.layers) == 1:
        return [LayerTensors(spec.layer_ids[0], (name,))]
    return [
        LayerTensors(layer, (rf"{layer}\.(?:[^.\d][^.]*\.)*{name}",)) for layer in spec.layer_ids
    ]


FAMILY = Family(
    name="deepseek_demo",
    model_types=("deepseek_demo",),
    build=build,
    from_config=from_config,
    tensors=tensors,
    row_format="fp32",
    size_parameter="engram_vocab_size",
    needs_tokenizer=True,
)
