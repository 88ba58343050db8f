"""The GPU tier: every embedding the same to the last bit as the host's, wherever it came from.

On the CPU the same code runs with the host's gather, so all but the kernel is tested everywhere;
`test_gpu_kernel.py` runs the kernel itself, there in Triton's interpreter.
"""

import threading

import numpy as np
import pytest
import torch
from conftest import build_synthetic, small_qwen
from devices import DEVICES, all_layers, expected, random_ids, same
from hypothesis import given, settings
from hypothesis import strategies as st
from scraping import key, samples_at
from sidecars import Sidecar

import engram
from engram.errors import (
    ConfigError,
    SelectionError,
    StoreError,
    TokenError,
)
from engram.nn import EngramEmbedding, EngramLookup
from engram.rows import ROW_FORMATS, RowFormat

CAPACITIES = {"cpu": ["1MiB", "64KiB", "100KiB"], "cuda": [0, "1MiB", "64KiB"]}
"""None on the device (CUDA only: on a CPU that asks for no tier), all of it, and a few slots."""
CASES = [
    pytest.param(device, capacity, id=f"{device}-{capacity}", marks=marks)
    for device, marks in (("cpu", ()), ("cuda", DEVICES[1].marks))
    for capacity in CAPACITIES[device]
]


@pytest.fixture(scope="module", params=ROW_FORMATS)
def any_table(request, tmp_path_factory):
    spec = small_qwen(ple_embed_dim=512)
    scale = 0.37 if request.param in ("fp8", "nvfp4") else None
    row_format = RowFormat(request.param, spec.dim, scale)
    return build_synthetic(tmp_path_factory.mktemp("any") / "table", spec, row_format)


@pytest.mark.parametrize(("device", "capacity"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_format(any_table, device, capacity, dtype):
    with engram.open(any_table, ram="1MiB") as table:
        lookup = EngramLookup(table, dtype, device=device, hbm=capacity)
        for seed in (1, 2, 1, 2, 3):  # cold, and again from wherever they are now
            tokens = random_ids(table, (3, 40), seed)
            found = all_layers(lookup(torch.from_numpy(tokens)))
            assert same(found, expected(table, tokens, dtype))
        table.on_devices[0].check_integrity()


@pytest.mark.parametrize(("device", "capacity"), CASES)
@settings(max_examples=8 if torch.cuda.is_available() else 25, deadline=None)  # each compiles anew
@given(data=st.data())
def test_any_selection_and_batch(v41_table, device, capacity, data):
    with engram.open(v41_table, ram=data.draw(st.sampled_from([0, "200KiB", "4MiB"]))) as table:
        every = list(table.columns)
        columns = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
        layers = data.draw(st.lists(st.sampled_from(table.layers), min_size=1, unique=True))
        lookup = EngramLookup(table, torch.float32, layers, columns, device, capacity)
        for _ in range(data.draw(st.integers(1, 4))):
            count = data.draw(st.integers(0, 70))
            cut = data.draw(st.integers(0, count))
            tokens = random_ids(table, count, data.draw(st.integers(0, 3)))
            batch = {
                "starts": np.array([0, cut, count], np.int32),
                "history": random_ids(table, (2, 3), 9),
                "dead": np.random.default_rng(count).random(count) < 0.1,
            }
            as_tensors = {name: torch.from_numpy(part) for name, part in batch.items()}
            found = all_layers(lookup(torch.from_numpy(tokens), **as_tensors))
            wanted = expected(table, tokens, torch.float32, layers, columns, **batch)
            assert same(found, wanted)
        for tier in table.on_devices:
            tier.check_integrity()


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_larger_than_one_launch(v41_table, device):
    with engram.open(v41_table, ram="8MiB") as table:
        lookup = EngramLookup(table, torch.bfloat16, device=device, hbm="4MiB")
        tokens = random_ids(table, 9000, 4)
        for _ in range(2):
            found = all_layers(lookup(torch.from_numpy(tokens)))
            assert same(found, expected(table, tokens, torch.bfloat16))


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_are_taken_as_tensors_are(v41_table, device):
    with engram.open(v41_table, ram="1MiB") as table:
        ids, history = random_ids(table, 40, 1), random_ids(table, (2, 3), 2)
        starts = np.array([0, 15, 40])
        wanted = expected(table, ids, torch.float32, starts=starts, history=history)
        for hbm in (0, "1MiB"):
            lookup = EngramLookup(table, torch.float32, device=device, hbm=hbm)
            assert same(all_layers(lookup(ids, starts, history)), wanted)
            assert same(all_layers(lookup.prepare(ids, starts, history).wait()), wanted)
            with pytest.raises(TokenError, match="integers"):
                lookup(ids / 2)
        assert same(all_layers(EngramLookup(table, torch.float32)(ids, starts, history)), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_where_n_grams_came_from_is_counted(v41_table, device):
    with engram.open(v41_table, ram="8MiB") as table:
        lookup = EngramLookup(table, device=device, hbm="8MiB")
        tokens = torch.from_numpy(random_ids(table, 50, 5))
        lookup(tokens)
        (tier,) = table.on_devices
        assert tier._reach.wait(10)
        first = tier.stats()
        assert first["ngrams_staged"] > 0
        assert first["ngrams_on_device"] == first["ngrams_in_place"] == 0
        lookup(tokens)
        again = tier.stats()
        assert again["ngrams_on_device"] == 150
        assert again["ngrams_staged"] == first["ngrams_staged"]
        other = EngramLookup(table, torch.float32, columns=[3, 2, 9], device=device, hbm="1MiB")
        other(tokens)
        tier = table.on_devices[1]
        tier._reach.wait(10)
        assert tier.stats()["ngrams_staged"] == 0
        assert tier.stats()["ngrams_in_place"] > 0
        assert [each["tier"] for each in table.stats()["tiers"]] == ["gpu", "gpu", "ram", "ssd"]


@pytest.mark.parametrize("device", DEVICES)
def test_prefetched_to_the_device(v41_table, device):
    with engram.open(v41_table, ram="8MiB") as table:
        lookup = EngramLookup(table, device=device, hbm="8MiB")
        ids = random_ids(table, 300, 6)
        lookup(torch.from_numpy(ids[:1]))
        (tier,) = table.on_devices
        assert tier._reach.wait(10)
        lookup.prefetch(torch.from_numpy(ids))
        done = threading.Event()
        for _ in range(500):
            if not tier._prefetcher._open:
                break
            done.wait(0.01)
        before = tier.stats()
        found = all_layers(lookup(torch.from_numpy(ids)))
        after = tier.stats()
        assert after["ngrams_staged"] == before["ngrams_staged"]
        assert after["ngrams_on_device"] - before["ngrams_on_device"] == 900
        assert after["prefetched_useful"] > 0
        assert same(found, expected(table, ids, torch.bfloat16))
        tier.check_integrity()


def test_a_cancelled_prefetch_brings_nothing_more(v41_table):
    with engram.open(v41_table, ram=0) as table:
        lookup = EngramLookup(table, device="cpu", hbm="1MiB")
        lookup(torch.zeros(1, dtype=torch.int64))
        handle = table.prefetch(random_ids(table, 300, 7), tier="gpu")
        handle.cancel()
        assert handle.cancelled
    with pytest.raises(SelectionError, match="tier must be"):
        table.prefetch([1], tier="tape")


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_memory_step_after_step(v41_table, device):
    with engram.open(v41_table, ram="4MiB") as table:
        lookup = EngramLookup(table, device=device, hbm="1MiB")
        width = lookup.embedding_dim
        out = torch.empty((2, 16, width), dtype=torch.bfloat16, device=device)
        for seed in range(5):
            ids = random_ids(table, 16, seed)
            prepared = lookup.prepare(torch.from_numpy(ids), out=out).wait()
            assert prepared[table.layers[1]].data_ptr() == out[1].data_ptr()
            assert same(out, expected(table, ids, torch.bfloat16))
        with pytest.raises(SelectionError, match="for each batch size"):
            lookup.prepare(torch.from_numpy(random_ids(table, 17, 1)), out=out)
        with pytest.raises(SelectionError, match="contiguous"):
            lookup.prepare(torch.from_numpy(random_ids(table, 16, 1)), out=out.float())


def test_threads_share_a_tier(v41_table):
    with engram.open(v41_table, ram="300KiB") as table:
        lookup = EngramLookup(table, torch.float32, device="cpu", hbm="100KiB")
        wrong = []

        def work(seed):
            for turn in range(20):
                ids = random_ids(table, 30, seed * 3 + turn % 4)
                found = all_layers(lookup(torch.from_numpy(ids)))
                if not same(found, expected(table, ids, torch.float32)):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        table.on_devices[0].check_integrity()


def test_one_layer(v41_table):
    with engram.open(v41_table, ram="1MiB") as table:
        embedding = EngramEmbedding(table, table.layers[1], device="cpu", hbm="1MiB")
        ids = random_ids(table, 9, 1)
        prepared = embedding.prepare(torch.from_numpy(ids))
        wanted = expected(table, ids, torch.bfloat16, [table.layers[1]])[0]
        assert same(prepared.wait()[table.layers[1]], wanted)
        assert same(embedding(torch.from_numpy(ids)), wanted)


def test_refusals(v41_table):
    with engram.open(v41_table, ram="1MiB") as table:
        with pytest.raises(ConfigError, match="no GPU tier"):
            EngramLookup(table, device="meta", hbm="1MiB")(torch.zeros(1, dtype=torch.int64))
        lookup = EngramLookup(table, device="cpu", hbm="1MiB")
        with pytest.raises(SelectionError, match="was not looked up"):
            lookup(torch.zeros(1, dtype=torch.int64))[99]
    with pytest.raises(StoreError, match="closed"):
        lookup(torch.zeros(1, dtype=torch.int64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_the_device_has(v41_table):
    with engram.open(v41_table, ram="1MiB") as table:
        lookup = EngramLookup(table, device="cuda", hbm="8TiB")
        with pytest.raises(ConfigError, match=r"8TiB wanted, but cuda:0 has .* free"):
            lookup(torch.zeros(1, dtype=torch.int64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_reads_each_steps_embeddings(v41_table):
    with engram.open(v41_table, ram="2MiB") as table:
        lookup = EngramLookup(table, device="cuda", hbm="256KiB")
        out = torch.zeros((2, 16, lookup.embedding_dim), dtype=torch.bfloat16, device="cuda")
        weight = torch.randn(lookup.embedding_dim, 64, dtype=torch.bfloat16, device="cuda")
        torch.matmul(out, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = torch.matmul(out, weight)
        for seed in range(1000):
            ids = random_ids(table, 16, seed)
            lookup.prepare(torch.from_numpy(ids), out=out).wait()
            graph.replay()
            eager = torch.matmul(all_layers(lookup(torch.from_numpy(ids))), weight)
            assert torch.equal(replayed, eager)
            if seed % 100 == 0:
                assert same(out, expected(table, ids, torch.bfloat16))


@pytest.mark.parametrize("device", DEVICES)
def test_a_sidecar_counts_what_steps_of_its_clients_found(tmp_path, v41_table, device):
    """By token, as the steps themselves count it, and nothing for what was only kept."""
    with (
        Sidecar(tmp_path / "s", {"v41": v41_table}, ram="8MiB", http="127.0.0.1:0") as running,
        engram.connect(running.address) as table,
    ):
        lookup = EngramLookup(table, device=device, hbm="64KiB")
        for seed in (1, 1, 2, 3, 1):
            lookup(torch.from_numpy(random_ids(table, 90, seed)))
            assert table.on_devices[0]._reach.wait(10)
        table.lookup(random_ids(table, 90, 1))
        stats = [table.on_devices[0].stats(), table.stats()["tiers"][1]]
        found = samples_at(running.http)
    by_source = {
        source: found[key("engram_gpu_ngrams_total", table="v41", source=source)]
        for source in ("device", "arena", "staging")
    }
    counted = [stats[0][f"ngrams_{where}"] for where in ("on_device", "in_place", "staged")]
    assert list(by_source.values()) == counted
    assert sum(counted) == 5 * 90 * table.spec.num_orders
    assert min(counted) > 0
    served = {
        tier: found[key("engram_ngrams_served_total", table="v41", tier=tier)]
        for tier in ("gpu", "ram", "ssd")
    }
    assert served == {
        "gpu": counted[0],
        "ram": counted[1] + stats[1]["hits"],
        "ssd": counted[2] + stats[1]["misses"],
    }
    assert stats[1]["hits"] + stats[1]["misses"] == 90 * table.spec.num_orders
