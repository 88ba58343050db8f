"""What offloading frees, refuses, saves and loads; and the way from a checkpoint to a model."""

import copy
import io
import weakref

import pytest
import torch
from tiny_models import MemoryTable, causal_lm, conditional_lm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen4_exp

from engram.errors import ModelError, SpecMismatchError
from engram.integrations._steps import SharedLookup
from engram.integrations.transformers import load_offloaded, offload
from engram.nn import dequantize
from engram.rows import RowFormat

IDS = torch.randint(8, 512, (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, **options):
    return model(IDS, **options).logits


def embedding_of(model, layer=0):
    return model.model.layers[layer].ple.ple_embedding


def unchanged(model, before):
    """Same modules, same weights, no hooks: as if nobody had touched it."""
    text_model = model.model
    assert not text_model._forward_pre_hooks
    assert not text_model._forward_hooks
    assert "save_pretrained" not in vars(model)
    for layer in (0, 2):
        assert isinstance(embedding_of(model, layer), qwen4_exp.Qwen4ExpTextNGramEmbedding)
    state = model.state_dict()
    assert state.keys() == before.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]), name


def test_returns_the_model_and_frees_its_tables():
    model = causal_lm()
    table = MemoryTable.of_model(model)
    weights = [weakref.ref(embedding_of(model, i).ngram_embedding.weight) for i in (0, 2)]
    assert offload(model, table) is model
    assert [weight() for weight in weights] == [None, None]
    assert not [name for name in model.state_dict() if "ple_embedding" in name]
    assert not [name for name, _ in model.named_parameters() if "ple_embedding" in name]


def test_a_model_whose_tables_are_on_the_meta_device():
    resident = causal_lm()
    table = MemoryTable.of_model(resident)
    model = copy.deepcopy(resident)
    for layer in (0, 2):
        embedding = embedding_of(model, layer).ngram_embedding
        embedding.weight = torch.nn.Parameter(embedding.weight.to("meta"))
    table.calls.clear()
    offload(model, table)
    assert table.calls == []
    assert torch.equal(logits(model), logits(resident))


def test_the_text_model_alone():
    resident = causal_lm().model
    model = copy.deepcopy(resident)
    offload(model, MemoryTable.of_model(resident))
    with torch.no_grad():
        assert torch.equal(model(IDS)[0], resident(IDS)[0])


@torch.no_grad()
def test_the_text_model_inside_a_vision_model():
    resident = conditional_lm()
    table = MemoryTable.of_model(resident)
    model = offload(copy.deepcopy(resident), table)
    table.calls.clear()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    for options in ({}, {"attention_mask": mask}):
        assert torch.equal(logits(model, **options), logits(resident, **options))
    assert table.calls == ["prefetch", "lookup"] * 2
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), resident.generate(IDS, **options))


@pytest.mark.parametrize(
    "row_format",
    [RowFormat("fp8-ue8m0", 32), RowFormat("fp8", 32, 0.01), RowFormat("nvfp4", 32, 0.5)],
    ids=str,
)
def test_quantized_rows_in_place_of_the_weights(row_format):
    """The model gets exactly the decoded rows, as if they were its weights."""
    resident = causal_lm(torch.bfloat16, ple_embed_dim=128)
    spec = MemoryTable.of_model(resident).spec
    table = MemoryTable.random(spec, row_format)
    table.rows = {layer: rows & 0x77 for layer, rows in table.rows.items()}  # no NaN
    for layer in (0, 2):
        rows = table.lookup_rows(layer, range(spec.layers[spec.layer_ids.index(layer)].rows))
        scales = None if rows.scales is None else torch.from_numpy(rows.scales)
        decoded = dequantize(torch.from_numpy(rows.values), scales, row_format, torch.bfloat16)
        embedding_of(resident, layer).ngram_embedding.weight.data = decoded
    model = offload(copy.deepcopy(resident), table)
    assert logits(model).isfinite().all()
    assert torch.equal(logits(model), logits(resident))


def test_a_model_cast_after_it_was_offloaded():
    resident = causal_lm()
    model = offload(copy.deepcopy(resident), MemoryTable.of_model(resident))
    assert torch.equal(logits(model.bfloat16()), logits(resident.bfloat16()))


def test_a_copy_shares_the_table_and_has_steps_of_its_own():
    resident = causal_lm()
    table = MemoryTable.of_model(resident)
    model = offload(copy.deepcopy(resident), table)
    copied = copy.deepcopy(model)
    shared = embedding_of(copied, 0).shared
    assert shared is embedding_of(copied, 2).shared
    assert shared is not embedding_of(model, 0).shared
    assert shared.table is table
    table.calls.clear()
    assert torch.equal(logits(copied), logits(resident))
    assert table.calls == ["prefetch", "lookup"]
    with pytest.raises(TypeError, match="cannot be pickled"):
        torch.save(model, io.BytesIO())
    with pytest.raises(ModelError):
        copied.save_pretrained("unused")


@torch.no_grad()
def test_a_compiled_model():
    resident = causal_lm(
        num_hidden_layers=2, layer_types=["linear_attention"] * 2, ple_layer_ids=[1]
    )
    model = offload(copy.deepcopy(resident), MemoryTable.of_model(resident))
    compiled = torch.compile(model.model.layers[0].ple, backend="eager")
    hidden = torch.randn(2, 11, 64)
    original = resident.model.layers[0].ple
    assert torch.equal(compiled(hidden, IDS, None), original(hidden, IDS, None))


def test_twice_is_refused():
    resident = causal_lm()
    table = MemoryTable.of_model(resident)
    model = offload(copy.deepcopy(resident), table)
    for again in (model, model.model):
        with pytest.raises(ModelError, match="offloaded already"):
            offload(again, table)
    assert torch.equal(logits(model), logits(resident))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vocab_size": 500}, "vocab_size"),
        ({"ngram_size": 2}, "max_order"),
        ({"heads_per_ngram": 4}, "heads"),
        ({"ple_embed_dim": 64}, "dim"),
        ({"ple_layer_ids": [1]}, "layers"),
        ({"ple_layer_ids": [1, 2]}, "layers"),
        ({"ngram_vocab_size_base": 900}, "layers"),
        ({"seed": 1}, "layers"),
        ({"make_ngram_vocab_size_divisible_by": 64}, "layers"),
        ({"eos_token_id": 8}, "blocked_id"),
    ],
    ids=str,
)
def test_a_table_of_another_spec_is_refused_by_the_field(changes, field):
    model = causal_lm()
    before = copy.deepcopy(model.state_dict())
    table = MemoryTable.of_model(causal_lm(**changes))
    with pytest.raises(SpecMismatchError) as caught:
        offload(model, table)
    assert caught.value.field.startswith(field)
    unchanged(model, before)


def test_a_table_of_other_rows_is_refused():
    model, other = causal_lm(weights=0), causal_lm(weights=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SpecMismatchError, match="layer 0 row 0 holds other values") as caught:
        offload(model, MemoryTable.of_model(other))
    assert caught.value.field == "rows"
    unchanged(model, before)
    offload(model, MemoryTable.of_model(other), check_rows=False)


def test_a_model_whose_hash_is_not_its_configs_is_refused():
    model = causal_lm()
    table = MemoryTable.of_model(model)
    embedding_of(model, 2).layer_multipliers += 2
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SpecMismatchError, match="layer 2's multipliers") as caught:
        offload(model, table)
    assert caught.value.field == "multipliers"
    unchanged(model, before)


def test_weights_of_another_shape_or_dtype_are_refused():
    model = causal_lm()
    table = MemoryTable.of_model(model)
    embedding = embedding_of(model, 2).ngram_embedding
    whole = embedding.weight
    embedding.weight = torch.nn.Parameter(whole[:, :4])
    with pytest.raises(SpecMismatchError, match="unsharded"):
        offload(model, table)
    embedding.weight = torch.nn.Parameter(whole.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="int8"):
        offload(model, table)
    embedding.weight = whole
    unchanged(model, model.state_dict())


def test_models_without_tables_are_refused():
    table = MemoryTable.of_model(causal_lm())
    with pytest.raises(ModelError, match="ple_layer_ids"):
        offload(causal_lm(ple_layer_ids=None), table)
    config = LlamaConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=8,
        intermediate_size=8,
    )
    with pytest.raises(ModelError, match="LlamaForCausalLM holds 0 Qwen4-Exp"):
        offload(LlamaForCausalLM(config), table)
    changed = causal_lm()
    changed.model.layers[2].ple.ple_embedding = torch.nn.Identity()
    with pytest.raises(ModelError, match="layer 2 embeds n-grams by a Identity"):
        offload(changed, table)


def test_saving_says_what_would_be_lost(tmp_path):
    resident = causal_lm()
    table = MemoryTable.of_model(resident)
    model = offload(copy.deepcopy(resident), table)
    for saved in (model, model.model):
        with pytest.raises(ModelError, match=r"state_dict=model\.state_dict\(\)"):
            saved.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    model.save_pretrained(tmp_path / "rest", state_dict=model.state_dict())
    assert torch.equal(logits(load_offloaded(tmp_path / "rest", table)), logits(resident))


def test_a_state_that_was_changed_in_place_is_read_anew():
    """A cache may keep one tensor for good and overwrite it, here even within a step."""
    shared = SharedLookup(MemoryTable.of_model(causal_lm()), (0, 2))
    before = torch.tensor([[20, 21], [22, 23]])
    after = torch.tensor([[30, 31], [32, 33]])

    def alone(state):
        return shared.embeddings(0, IDS, {0: state}, torch.float32)

    expected = [alone(before), alone(after)]
    assert not torch.equal(*expected)
    state = before.clone()
    states = {0: state, 2: state}
    shared.open(IDS, states)
    assert torch.equal(shared.embeddings(0, IDS, states, torch.float32), expected[0])
    state.copy_(after)
    assert torch.equal(shared.embeddings(0, IDS, states, torch.float32), expected[1])
    shared.close()
