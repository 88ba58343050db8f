"""An offloaded Qwen4-Exp model gives what the resident one gives, to the last bit."""

import copy
import threading
from functools import cache

import pytest
import torch
from tiny_models import EOS, PAD, VOCAB, MemoryTable, causal_lm
from transformers import DynamicCache

from engram.integrations.transformers import offload

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]
MODELS = {
    "two layers": {},
    "three layers of 4-grams": {
        "ple_layer_ids": [1, 2, 3],
        "ngram_size": 4,
        "ple_embed_dim": 48,
        "hc_count": 3,
    },
    "one layer of bigrams": {"ple_layer_ids": [2], "ngram_size": 2, "heads_per_ngram": 4},
}
CASES = [
    ("two layers", torch.float32),
    ("two layers", torch.bfloat16),
    ("three layers of 4-grams", torch.bfloat16),
    ("one layer of bigrams", torch.float32),
]


@cache
def pair(name="two layers", dtype=torch.float32, device="cpu"):
    """The resident model, the same offloaded, and the table it reads."""
    resident = causal_lm(dtype, **MODELS[name]).to(device)
    table = MemoryTable.of_model(resident)
    return resident, offload(copy.deepcopy(resident), table), table


def prompt(batch, length, device, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, VOCAB, (batch, length), generator=generator).to(device)


def left_padded(ids, lengths):
    """Each row keeps its last `lengths` ids; the rest is padding, masked."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : ids.shape[1] - length] = PAD
        mask[row, : ids.shape[1] - length] = 0
    return ids, mask


def with_eos(ids):
    ids = ids.clone()
    ids[0, 3] = ids[-1, 0] = ids[-1, 6] = ids[-1, 7] = ids[-1, -1] = EOS
    return ids


def chunked(model, ids, sizes, mask=None):
    """Logits of all chunks, run one after the other with a cache, and the ids it then holds."""
    past, parts, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        stop = start + size
        seen = None if mask is None else mask[:, :stop]
        out = model(ids[:, start:stop], attention_mask=seen, past_key_values=past, use_cache=True)
        parts.append(out.logits)
        start = stop
    assert start == ids.shape[1]
    return [torch.cat(parts, dim=1), *held_ids(model, past)]


def held_ids(model, past):
    layers = [number - 1 for number in model.config.ple_layer_ids]
    return [past.get_conv_state(layer, state_idx=2) for layer in layers]


def generated(model, ids, mask=None, **options):
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_logits=True,
        **({"do_sample": False} | options),
    )
    return [out.sequences, *out.logits]


def run_without_cache(model, device):
    return [model(prompt(3, 11, device), use_cache=False).logits]


def run_with_eos(model, device):
    return [model(with_eos(prompt(3, 11, device)), use_cache=False).logits]


def run_one_token(model, device):
    return [model(prompt(1, 1, device)).logits]


def run_left_padded(model, device):
    ids, mask = left_padded(with_eos(prompt(3, 11, device)), [11, 5, 1])
    return [model(ids, attention_mask=mask, use_cache=False).logits]


def run_token_by_token(model, device):
    return chunked(model, with_eos(prompt(2, 9, device)), [1] * 9)


def run_chunked(model, device):
    return chunked(model, with_eos(prompt(3, 17, device)), [1, 5, 2, 8, 1])


def run_chunked_left_padded(model, device):
    ids, mask = left_padded(with_eos(prompt(3, 14, device)), [14, 9, 2])
    return chunked(model, ids, [5, 4, 3, 1, 1], mask)


def run_greedy(model, device):
    return generated(model, prompt(1, 7, device))


def run_greedy_left_padded(model, device):
    return generated(model, *left_padded(with_eos(prompt(3, 11, device)), [11, 5, 1]))


def run_greedy_without_cache(model, device):
    return generated(model, prompt(2, 7, device), use_cache=False)


def run_greedy_static_cache(model, device):
    # Not compiled: the compiler fuses, and so rounds, otherwise around a lookup.
    options = {"cache_implementation": "static", "disable_compile": True}
    return generated(model, prompt(2, 7, device), **options)


def run_beams(model, device):
    return generated(model, *left_padded(prompt(2, 9, device), [9, 4]), num_beams=3)


def run_sampled(model, device):
    torch.manual_seed(11)
    return generated(model, prompt(2, 7, device), do_sample=True)


def run_embeds(model, device):
    embeds = model.get_input_embeddings()(with_eos(prompt(2, 9, device)))
    return [model(inputs_embeds=embeds).logits]


def run_embeds_and_ids(model, device):
    ids, mask = left_padded(prompt(2, 9, device), [9, 4])
    embeds = model.get_input_embeddings()(ids) * 0.5
    return [model(inputs_embeds=embeds, ple_input_ids=ids, attention_mask=mask).logits]


def run_positional(model, device):
    ids, mask = left_padded(prompt(2, 9, device), [9, 4])
    return [model(ids, mask).logits, model.model(ids, mask).last_hidden_state]


def run_reused_cache(model, device):
    past = DynamicCache(config=model.config)
    ids, parts = prompt(3, 12, device), []
    parts.append(model(ids[:, :5], past_key_values=past).logits)
    past.reorder_cache(torch.tensor([2, 0, 0], device=device))
    parts.append(model(ids[:, 5:9], past_key_values=past).logits)
    past.reset()
    parts.append(model(ids[:, 9:], past_key_values=past).logits)
    return [*parts, *held_ids(model, past)]


def run_cropped_cache(model, device):
    """Ids may be taken back where the cache records its past, also more than it then has left."""
    past = DynamicCache(config=model.config)
    linear = [i for i, kind in enumerate(model.config.layer_types) if kind == "linear_attention"]
    for layer in linear:
        past.layers[layer].activate_past_recording()
    ids, parts = prompt(2, 12, device), []
    parts.append(model(ids[:, :2], past_key_values=past).logits)
    for layer in model.config.ple_layer_ids:
        past.layers[layer - 1].conv_states[2] = past.layers[layer - 1].conv_states[2][:, :-1]
    parts.append(model(ids[:, 1:6], past_key_values=past).logits)
    for layer in model.config.ple_layer_ids:
        past.layers[layer - 1].crop(-3)
    parts.append(model(ids[:, 3:7], past_key_values=past).logits)
    return [*parts, *held_ids(model, past)]


RUNS = {
    name.removeprefix("run_"): function
    for name, function in sorted(globals().items())
    if name.startswith("run_")
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("name", "dtype"), CASES)
@torch.no_grad()
def test_same_to_the_last_bit(name, dtype, run, device):
    resident, offloaded, table = pair(name, dtype, device)
    forwards = []
    counting = offloaded.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    table.calls.clear()
    found = RUNS[run](offloaded, device)
    counting.remove()
    wanted = RUNS[run](resident, device)
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
        assert not ours.is_floating_point() or ours.isfinite().all()
    assert table.calls.count("lookup") == len(forwards)
    expected_prefetches = 0 if run == "embeds" else len(forwards)
    assert table.calls.count("prefetch") == expected_prefetches


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_layer_reads_the_table(name):
    """The equality above would mean little if rows did not reach the logits."""
    resident = causal_lm(**MODELS[name])
    ids = prompt(1, 8, "cpu")
    for number in resident.config.ple_layer_ids:
        table = MemoryTable.of_model(resident)
        table.rows[number - 1] = table.rows[number - 1][::-1].copy()
        other = offload(copy.deepcopy(resident), table, check_rows=False)
        assert not torch.equal(other(ids).logits, resident(ids).logits)


@torch.no_grad()
def test_threads_do_not_share_steps():
    resident, offloaded, _ = pair()
    prompts = [prompt(2, 9, "cpu", seed) for seed in range(6)]
    wanted = [resident(ids).logits for ids in prompts]
    found = [[] for _ in prompts]

    @torch.no_grad()
    def work(index):
        for _ in range(4):
            found[index].append(offloaded(prompts[index]).logits)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, logits in zip(found, wanted, strict=True):
        assert len(results) == 4
        assert all(torch.equal(result, logits) for result in results)


def test_gradients_of_the_other_parameters_stay_the_same():
    resident, offloaded, _ = pair()
    ids = prompt(2, 9, "cpu")
    for checkpointing in (False, True):
        gradients = []
        for model in (resident, offloaded):
            model.zero_grad()
            model.train()
            if checkpointing:
                model.activation_checkpointing_enable()
            model(ids, labels=ids, use_cache=False).loss.backward()
            model.activation_checkpointing_disable()
            model.eval()
            gradients.append(
                {n: p.grad for n, p in model.named_parameters() if "ngram_embedding" not in n}
            )
        ours, theirs = gradients[1], gradients[0]
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            assert (gradient is None) == (theirs[name] is None), name
            assert gradient is None or torch.equal(gradient, theirs[name]), name
        assert ours["model.layers.0.ple.key_proj.weight"].abs().max() > 0


@torch.no_grad()
def test_a_failed_lookup_leaves_the_ids_of_its_layer_and_the_next_step_whole():
    resident, offloaded, table = pair()
    ids = prompt(2, 9, "cpu")
    past = DynamicCache(config=offloaded.config)
    offloaded(ids[:, :4], past_key_values=past)
    before = [state.clone() for state in held_ids(offloaded, past)]
    lookup = table.lookup
    table.lookup = lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is gone"))
    with pytest.raises(OSError, match="the disk is gone"):
        offloaded(ids[:, 4:], past_key_values=past)
    table.lookup = lookup
    for state, old in zip(held_ids(offloaded, past), before, strict=True):
        assert torch.equal(state, old)
    assert torch.equal(offloaded(ids).logits, resident(ids).logits)


@torch.no_grad()
def test_layers_called_by_hand_share_nothing():
    resident, offloaded, table = pair()
    ids = prompt(2, 9, "cpu")
    table.calls.clear()
    for layer in (2, 0, 0):
        found = offloaded.model.layers[layer].ple.ple_embedding(ids, None)
        assert torch.equal(found, resident.model.layers[layer].ple.ple_embedding(ids, None))
    assert table.calls == ["lookup"] * 3


@torch.no_grad()
def test_layers_whose_histories_differ_get_their_own_rows():
    resident, offloaded, _ = pair()
    ids = prompt(2, 9, "cpu")
    results = []
    for model in (resident, offloaded):
        past = DynamicCache(config=model.config)
        model(ids[:, :4], past_key_values=past)
        past.layers[2].conv_states[2] = past.layers[2].conv_states[2] + 1
        results.append(model(ids[:, 4:], past_key_values=past).logits)
    assert torch.equal(*results)


@torch.no_grad()
def test_ids_that_are_not_int64():
    resident, offloaded, _ = pair()
    ids = prompt(2, 9, "cpu").int()
    assert torch.equal(offloaded(ids).logits, resident(ids).logits)


@torch.no_grad()
def test_inference_mode_and_a_buffer_of_ids_written_again():
    resident, offloaded, _ = pair()
    with torch.inference_mode():
        ids = prompt(2, 9, "cpu")
        for seed in (1, 2, 3):
            ids.copy_(prompt(2, 9, "cpu", seed))
            assert torch.equal(offloaded(ids).logits, resident(ids).logits)
