"""The README's Python runs as it stands, on small tables and a tiny model."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from devices import expected, same
from test_tidy import ROOT

import engram
from engram.checkpoint import open_checkpoint
from engram.demo.model import quiet_transformers, tiny_model
from engram.demo.sidecar import sidecar
from engram.store.writer import build_table

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    quiet_transformers()
    folder = tmp_path_factory.mktemp("readme")
    tiny_model().save_pretrained(folder / "model")
    spec = engram.NgramSpec.from_pretrained(folder / "model")
    build_table(folder / "table", *open_checkpoint(folder / "model", spec))
    return folder


def test_offloading(checkpoint):
    block, _, _ = BLOCKS
    assert "unix:/run/engram/engram.sock" in block
    model = tiny_model()
    tokens = torch.arange(2, 40).reshape(2, 19)
    wanted = model(tokens).logits
    with sidecar(checkpoint / "s.sock", {"qwen": checkpoint / "table"}) as address:
        names = {"model": model}
        exec(block.replace("unix:/run/engram/engram.sock", address), names)
        assert torch.equal(names["model"](tokens).logits, wanted)
        names["table"].close()


def test_model_code_of_your_own(v41_table):
    _, block, _ = BLOCKS
    tokens = np.arange(12, dtype=np.int32)
    names = {
        "engram": engram,
        "torch": torch,
        "tokens": tokens,
        "starts": np.array([0, 5, 12]),
        "history": np.full((2, 3), -1),
        "token_ids": torch.arange(12),
    }
    exec(block.replace("/srv/engram/deepseek", str(v41_table)), names)
    assert names["rows"].values.shape == (12, 2, 24, 64)
    assert names["vectors"].shape == (12, 24 * 64)
    names["table"].close()


def test_steps_on_a_device(v41_table):
    _, _, block = BLOCKS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert block.count('"cuda"') == 2
    replayed = []

    class Graph:
        """Reads what a captured one would."""

        def replay(self):
            replayed.append(names["out"].clone())

    with engram.open(v41_table, ram="4MiB") as table:
        tokens = np.arange(12, dtype=np.int32)
        names = {
            "engram": engram,
            "torch": torch,
            "table": table,
            "batch": 12,
            "tokens": torch.from_numpy(tokens),
            "starts": torch.arange(13, dtype=torch.int32),
            "history": torch.full((12, 3), -1),
            "graph": Graph(),
        }
        exec(block.replace('"cuda"', f'"{device}"').replace("2GiB", "1MiB"), names)
        wanted = expected(
            table,
            tokens,
            torch.bfloat16,
            starts=names["starts"].numpy(),
            history=names["history"].numpy(),
        )
        assert same(replayed[0], wanted)
