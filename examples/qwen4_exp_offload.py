"""Run a Qwen4-Exp model of Hugging Face transformers with its n-gram tables on SSD.

    python examples/qwen4_exp_offload.py                      # a tiny random model, to try it
    python examples/qwen4_exp_offload.py CHECKPOINT TABLE "Once upon a time"

CHECKPOINT is a directory in transformers' format, TABLE what `engram import CHECKPOINT TABLE`
made of it; it is imported now if it does not exist.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import engram
from engram.checkpoint import open_checkpoint
from engram.integrations.transformers import load_offloaded
from engram.store.writer import build_table


def import_table(checkpoint: Path, destination: Path) -> None:
    """What `engram import` does."""
    schema, rows = open_checkpoint(checkpoint, engram.NgramSpec.from_pretrained(checkpoint))
    build_table(destination, schema, rows)


def generate(checkpoint: Path, destination: Path, ids: torch.Tensor) -> torch.Tensor:
    """Continue `ids` int64 `[B, L]` by 16 greedy tokens."""
    with engram.open(destination) as table:
        # The checkpoint's n-gram tables are never read, so they need not fit into memory. For a
        # model that is loaded already: engram.integrations.transformers.offload(model, table).
        model: Any = load_offloaded(checkpoint, table, dtype="auto")
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        continued: torch.Tensor = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=16,
            do_sample=False,
        )
        print(table.stats())
    return continued


def run_tiny(folder: Path) -> None:
    """Save a tiny random model, import its tables and run it."""
    from engram.demo.model import tiny_model

    checkpoint, destination = folder / "model", folder / "table"
    tiny_model().save_pretrained(checkpoint)
    import_table(checkpoint, destination)
    print(generate(checkpoint, destination, torch.tensor([[11, 42, 7, 99]])).tolist())


def run(checkpoint: Path, destination: Path, prompt: str) -> None:
    """Continue `prompt` with the model at `checkpoint`."""
    from transformers import AutoTokenizer

    if not destination.exists():
        import_table(checkpoint, destination)
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    print(tokenizer.decode(generate(checkpoint, destination, ids)[0]))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    elif len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as temporary:
            run_tiny(Path(temporary))
    else:
        sys.exit(__doc__)
