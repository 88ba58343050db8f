"""The gather kernel beside its twin on the host: on a device, or in Triton's interpreter.

As a program, `python gather_cases.py DEVICE`: prints a line for each case, its name and whether
both gave the same bytes. The interpreter must be chosen before Triton is imported, so it has a
process of its own.
"""

import sys

import numpy as np
import torch

from engram.gpu.gather import Gather
from engram.gpu.plan import PACKED, Plan
from engram.ram.layout import BundleLayout
from engram.rows import ROW_FORMATS, RowFormat
from engram.spec import NgramSpec
from engram.tiers import Selection

TOKENS = 7
GEOMETRIES = {
    # dim, heads, columns or None for all, layers or None for all, layers of the table
    "all": (64, 4, None, None, (1, 3)),
    "one layer": (64, 4, None, [3], (1, 3)),
    "turned": (32, 2, [5, 0, 3], [3, 1], (1, 3)),
    "odd": (96, 3, [8, 1, 2, 0], None, (1, 3)),
    "one head": (32, 1, None, None, (1, 3)),
    "three of five layers": (64, 4, None, [9, 1, 3], (1, 3, 5, 7, 9)),
    "more layers than a program has": (256, 8, None, None, (1, 3, 5)),
}


def spec_of(heads, dim, layers):
    return NgramSpec.qwen4_exp(
        vocab_size=300,
        ngram_size=4,
        heads_per_ngram=heads,
        ngram_vocab_size_base=500,
        eos_token_id=7,
        ple_layer_ids=layers,
        ple_embed_dim=3 * heads * dim,
    )


def memory(size, device, seed):
    """Random bytes that `device` can read, and what keeps them alive."""
    content = np.random.default_rng(seed).integers(0, 256, size + 64, np.uint8)
    tensor = torch.from_numpy(content)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return (tensor.data_ptr() + 63) // 64 * 64, tensor


def check(name, geometry, dtype, device):
    """Whether kernel and twin wrote the same embeddings, and kept the same bytes."""
    dim, heads, columns, layers, table_layers = GEOMETRIES[geometry]
    spec = spec_of(heads, dim, table_layers)
    row_format = RowFormat(name, dim, 0.37 if name in ("fp8", "nvfp4") else None)
    bundle = BundleLayout.of(spec, row_format)
    chosen = layers and [spec.layer_ids[table_layers.index(layer)] for layer in layers]
    selection = Selection.of(spec, chosen, columns)
    plan = Plan.of(bundle, selection)
    orders, used = selection.orders, np.diff(selection.order_bounds) > 0
    whole, keep_a = memory(TOKENS * orders * bundle.slot_bytes, device, 1)
    packed, keep_b = memory(TOKENS * orders * plan.slot_bytes, device, 2)
    rng = np.random.default_rng(3)
    number = np.arange(TOKENS * orders).reshape(TOKENS, orders)
    of_packed = rng.random(number.shape) < 0.4
    sources = np.where(
        of_packed, packed + number * plan.slot_bytes + PACKED, whole + number * bundle.slot_bytes
    )
    sources[:, ~used] = 0
    wanted_keep = (rng.random(number.shape) < 0.5) & used
    results = []
    for where in (device, torch.device("cpu")):
        twin = where is not device
        if where.type == "cuda":
            kept = torch.zeros(TOKENS * orders * plan.slot_bytes, dtype=torch.uint8, device=where)
            first = kept.data_ptr()
        else:
            first, kept = memory(TOKENS * orders * plan.slot_bytes, where, 4)
            kept.zero_()
        keep = np.where(wanted_keep, first + number * plan.slot_bytes, 0)
        addresses = torch.from_numpy(np.stack([sources, keep]))
        shape = (plan.layers, TOKENS, plan.columns, dim)
        out = torch.full(shape, float("nan"), dtype=dtype, device=where)
        if twin:
            Gather(plan, row_format, where)(addresses, out)
        else:
            from engram.gpu._kernel import Kernel

            stream = torch.cuda.current_stream() if where.type == "cuda" else None
            launch = Kernel(plan, row_format, where)
            for _ in range(1 if stream is None else 2):  # compiled, and then as it was compiled
                launch(addresses.to(where), out, stream)
            again = torch.full_like(out, float("nan"))
            launch(addresses[:1].contiguous().to(where), again, stream, kept=False)
            assert torch.equal(again.view(torch.uint8), out.view(torch.uint8))
        at = 0 if where.type == "cuda" else first - kept.data_ptr()
        content = kept.cpu()[at : at + TOKENS * orders * plan.slot_bytes]
        results.append((out.float().cpu(), content))
    del keep_a, keep_b
    (found, kept), (expected, expected_kept) = results
    nan = expected.isnan()
    return (
        torch.equal(found.isnan(), nan)
        and torch.equal(found[~nan].view(torch.int32), expected[~nan].view(torch.int32))
        and torch.equal(kept, expected_kept)
    )


def cases(device):
    """Triton's interpreter does not round to bf16 as devices do; there it is float32 alone."""
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    for name in ROW_FORMATS:
        for geometry in GEOMETRIES:
            for dtype in dtypes:
                yield name, geometry, dtype
    yield "bf16", "all", torch.bfloat16
    yield "fp16", "all", torch.float16


if __name__ == "__main__":
    for case in cases(sys.argv[1]):
        name, geometry, dtype = case
        print(f"{name}/{geometry}/{dtype}", check(*case, torch.device(sys.argv[1])), flush=True)
