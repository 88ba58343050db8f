"""The matrix of `test_transformers`, cold and warm, over real tables: embedded and attached."""

import copy
from functools import cache

import pytest
import torch
from test_transformers import MODELS, RUNS
from tiny_models import causal_lm

import engram
from engram.checkpoint import open_checkpoint
from engram.demo.sidecar import sidecar
from engram.integrations.transformers import offload
from engram.spec import NgramSpec
from engram.store.writer import build_table

CASES = ("two layers", "three layers of 4-grams")


@cache
def resident(case):
    return causal_lm(torch.bfloat16, **MODELS[case])


@cache
def wanted(case, run):
    with torch.no_grad():
        return RUNS[run](resident(case), "cpu")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Table of each case, imported from a checkpoint."""
    paths = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp("tables")
        resident(case).save_pretrained(folder / "checkpoint")
        spec = NgramSpec.from_pretrained(folder / "checkpoint")
        build_table(folder / "table", *open_checkpoint(folder / "checkpoint", spec))
        paths[case] = folder / "table"
    return paths


@pytest.fixture(scope="module")
def address(stored, tmp_path_factory):
    """A sidecar that serves each case once for every run: what one run read, no other finds."""
    socket = tmp_path_factory.mktemp("run") / "s.sock"
    tables = {_name(case, run): stored[case] for case in CASES for run in RUNS}
    with sidecar(socket, tables, ram="256MiB") as address:
        yield address


def _name(case, run):
    return f"{CASES.index(case)}-{run}"


@pytest.mark.parametrize("kind", ["embedded", "attached"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cold_and_warm_to_the_last_bit(case, run, kind, stored, request):
    if kind == "embedded":
        table = engram.open(stored[case])
    else:
        table = engram.connect(request.getfixturevalue("address"), _name(case, run))
    with table:
        model = offload(copy.deepcopy(resident(case)), table, check_rows=False)
        missed = [_misses(table)]
        for _ in range(2):
            found = RUNS[run](model, "cpu")
            assert len(found) == len(wanted(case, run))
            for ours, theirs in zip(found, wanted(case, run), strict=True):
                assert torch.equal(ours, theirs)
            missed.append(_misses(table))
        assert table.stats()["tiers"][0]["hits"] > 0, table.stats()["tiers"]
    # What a prefetch brings in time is no miss, so a cold pass may have few; a warm one has none.
    assert missed[1] == missed[2]


def _misses(table):
    return table.stats()["tiers"][0]["misses"]
