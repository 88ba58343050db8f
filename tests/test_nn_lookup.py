"""Torch embeddings whose rows come from a table."""

import copy
import io

import numpy as np
import pytest
import torch
from tiny_models import MemoryTable

from engram.errors import SelectionError, TokenError
from engram.nn import EngramEmbedding, EngramLookup, dequantize
from engram.rows import ROW_FORMATS, RowFormat
from engram.spec import NgramSpec

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]


def table_of(name="bf16", dim=32, layers=(1, 3, 4)):
    spec = NgramSpec.qwen4_exp(
        vocab_size=300,
        ngram_size=3,
        heads_per_ngram=2,
        ngram_vocab_size_base=500,
        eos_token_id=7,
        ple_layer_ids=layers,
        ple_embed_dim=4 * dim,
    )
    scale = 0.5 if name in ("fp8", "nvfp4") else None
    return MemoryTable.random(spec, RowFormat(name, dim, scale))


def expected(table, layer, tokens, dtype, columns=None, **batch):
    rows = table.lookup(tokens, layers=[layer], columns=columns, **batch)
    scales = None if rows.scales is None else torch.from_numpy(rows.scales)
    decoded = dequantize(torch.from_numpy(rows.values), scales, table.row_format, dtype)
    return decoded.flatten(-3)


def same(found, wanted):
    bits = torch.int32 if wanted.element_size() == 4 else torch.int16
    return torch.equal(found.cpu().view(bits), wanted.view(bits))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ROW_FORMATS)
def test_every_format_where_the_tokens_are(name, dtype, device):
    table = table_of(name)
    tokens = torch.randint(0, 300, (2, 9))
    history = torch.tensor([[-1, 5], [7, 12]])
    embedding = EngramEmbedding(table, 2, dtype)
    found = embedding(tokens.to(device), history=history.to(device))
    wanted = expected(table, 2, tokens.numpy(), dtype, history=history.numpy())
    assert found.device.type == device
    assert found.shape == (2, 9, embedding.embedding_dim)
    finite = ~wanted.isnan()
    assert torch.equal(found.cpu().isnan(), wanted.isnan())
    assert same(found.cpu()[finite], wanted[finite])
    if name == "bf16" and dtype == torch.bfloat16:
        assert same(found, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_one_lookup_for_all_layers(device):
    table = table_of()
    lookup = EngramLookup(table, torch.float32)
    tokens = torch.randint(0, 300, (2, 9), dtype=torch.int32)
    lookup.prefetch(tokens.to(device))
    rows = lookup(tokens.to(device))
    found = {layer: rows[layer] for layer in rows.layers}
    assert table.calls == ["prefetch", "lookup"]
    assert set(found) == {0, 2, 3}
    for layer, embeddings in found.items():
        alone = EngramEmbedding(table, layer, torch.float32)(tokens.to(device))
        assert same(embeddings, alone.cpu())
        assert same(embeddings, expected(table, layer, tokens.numpy(), torch.float32))
    with pytest.raises(SelectionError, match="layer 1 was not looked up"):
        rows[1]


def test_ragged_batches_and_chosen_columns():
    table = table_of("fp8-ue8m0")
    tokens = torch.randint(0, 300, (11,))
    starts = torch.tensor([0, 4, 4, 11])
    history = torch.tensor([[1, 2], [3, 4], [5, 6]])
    embedding = EngramEmbedding(table, 3, torch.float32, columns=[3, 0])
    found = embedding(tokens, starts, history)
    wanted = expected(
        table,
        3,
        tokens.numpy(),
        torch.float32,
        columns=[3, 0],
        starts=starts.numpy(),
        history=history.numpy(),
    )
    assert found.shape == (11, 64)
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


def test_no_tokens():
    embedding = EngramEmbedding(table_of("nvfp4"), 0)
    assert embedding(torch.zeros((0,), dtype=torch.int64)).shape == (0, 128)


def test_nothing_is_remembered_between_calls():
    table = table_of()
    embedding = EngramEmbedding(table, 0)
    tokens = torch.randint(0, 300, (5,))
    first = embedding(tokens)
    assert same(first, embedding(tokens))
    tokens += 1
    tokens %= 300
    assert not same(first, embedding(tokens))
    assert same(embedding(tokens), expected(table, 0, tokens.numpy(), torch.bfloat16))


def test_no_state_of_its_own():
    table = table_of()
    model = torch.nn.ModuleDict(
        {"one": EngramEmbedding(table, 0), "all": EngramLookup(table)}
    ).requires_grad_(False)
    assert not list(model.parameters())
    assert not model.state_dict()
    model.load_state_dict({})


def test_a_copy_shares_the_table_and_a_pickle_is_refused():
    table = table_of()
    embedding = EngramEmbedding(table, 0)
    copied = copy.deepcopy(embedding)
    assert copied.lookup.table is table
    tokens = torch.tensor([1, 2, 3])
    assert same(copied(tokens), embedding(tokens))
    with pytest.raises(TypeError, match="open or connect the table where the model is needed"):
        torch.save(embedding, io.BytesIO())


def test_what_the_table_lacks_is_refused():
    table = table_of()
    with pytest.raises(SelectionError, match=r"layer 1 does not exist; layers are 0, 2, 3"):
        EngramEmbedding(table, 1)
    with pytest.raises(SelectionError, match="column 4 does not exist"):
        EngramEmbedding(table, 0, columns=[4])
    with pytest.raises(SelectionError, match="each once"):
        EngramLookup(table, layers=[0, 0])
    with pytest.raises(SelectionError, match="each once"):
        EngramLookup(table, columns=[])
    with pytest.raises(SelectionError, match="floating dtype"):
        EngramEmbedding(table, 0, torch.int32)


def test_tokens_that_are_none_are_refused():
    embedding = EngramEmbedding(table_of(), 0)
    for tokens in (torch.tensor([1.0]), torch.tensor([True])):
        with pytest.raises(TokenError, match="integers"):
            embedding(tokens)
    with pytest.raises(TokenError):
        embedding(torch.tensor([300]))
    with pytest.raises(TokenError):
        embedding(torch.tensor([3]), dead=torch.tensor([True]))


def test_the_device_can_be_named():
    embedding = EngramEmbedding(table_of(), 0, device="cpu")
    assert embedding(torch.tensor([1, 2])).device.type == "cpu"
    assert np.prod(embedding(torch.tensor([1, 2])).shape) == 2 * embedding.embedding_dim


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tokens_on_the_host_and_rows_on_the_device():
    table = table_of("fp8-ue8m0")
    embedding = EngramEmbedding(table, 0, torch.float32, device="cuda")
    batches = [torch.randint(0, 300, (64,)) for _ in range(32)]
    found = [embedding(tokens) for tokens in batches]
    for tokens, embeddings in zip(batches, found, strict=True):
        assert embeddings.device.type == "cuda"
        wanted = expected(table, 0, tokens.numpy(), torch.float32)
        assert torch.equal(embeddings.cpu().nan_to_num(), wanted.nan_to_num())
