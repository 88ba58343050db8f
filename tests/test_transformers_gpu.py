"""An offloaded Qwen4-Exp model with a GPU tier gives what the resident one gives, to the last bit.

On the CPU the same code runs with the host's gather. Graphs are captured on a CUDA device only; the
CPU runs the step that would be captured, so that all but the capture is tested everywhere.
"""

import copy
from functools import cache

import pytest
import torch
from devices import DEVICES, same
from test_transformers import MODELS, RUNS, prompt
from tiny_models import VOCAB, MemoryTable, causal_lm
from transformers import DynamicCache

import engram
from engram.checkpoint import open_checkpoint
from engram.errors import ConfigError
from engram.integrations._steps import SharedLookup
from engram.integrations.transformers import load_offloaded, offload
from engram.nn import EngramLookup
from engram.spec import NgramSpec
from engram.store.writer import build_table

# Which tokens a query of indexed attention sees is asked of the device, so that no graph can hold
# such a layer.
ONLY_LINEAR = {"layer_types": ["linear_attention"] * 4}
KINDS = MODELS | {"only linear attention": ONLY_LINEAR}
CASES = [("two layers", torch.float32), ("three layers of 4-grams", torch.bfloat16)]
TIERS = [
    pytest.param("cpu", "1MiB", id="cpu"),
    pytest.param("cuda", "1MiB", id="cuda", marks=DEVICES[1].marks),
    pytest.param("cuda", "64KiB", id="cuda-few", marks=DEVICES[1].marks),
    pytest.param("cuda", 0, id="cuda-none", marks=DEVICES[1].marks),
]
STEPS = {"cpu": 30, "cuda": 1000}
SEQUENCES, PROMPT = 4, 5


@cache
def resident(kind, dtype, device="cpu"):
    return causal_lm(dtype, **KINDS[kind]).to(device)


@cache
def wanted(kind, dtype, run, device):
    with torch.no_grad():
        return RUNS[run](resident(kind, dtype, device), device)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Imports the table of a model once, from a checkpoint of it; gives its path."""

    @cache
    def path_of(kind, dtype):
        folder = tmp_path_factory.mktemp("tables")
        resident(kind, dtype).save_pretrained(folder / "checkpoint")
        spec = NgramSpec.from_pretrained(folder / "checkpoint")
        build_table(folder / "table", *open_checkpoint(folder / "checkpoint", spec))
        return folder / "table"

    return path_of


def ngrams_read(tier):
    """By where they were: on the device, in the arena, or brought by way of staging."""
    stats = tier.stats()
    return [stats[f"ngrams_{where}"] for where in ("on_device", "in_place", "staged")]


@pytest.mark.parametrize(("device", "hbm"), TIERS)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
@torch.no_grad()
def test_cold_and_warm_to_the_last_bit(kind, dtype, run, device, hbm, stored):
    with engram.open(stored(kind, dtype), ram="8MiB") as table:
        model = offload(
            copy.deepcopy(resident(kind, dtype, device)), table, check_rows=False, hbm=hbm
        )
        for _ in range(3):
            found = RUNS[run](model, device)
            assert len(found) == len(wanted(kind, dtype, run, device))
            for ours, theirs in zip(found, wanted(kind, dtype, run, device), strict=True):
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs)
        (tier,) = table.on_devices
        assert (tier.device.type, tier.capacity > 0) == (device, bool(hbm))
        on_device, _, staged = ngrams_read(tier)
        assert staged > 0
        assert (on_device > 0) == bool(hbm)
        tier.check_integrity()


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_step_is_under_way_before_the_first_layer(device, stored):
    """What comes before the first layer with n-grams is computed beside their gathering."""
    kind, dtype = "one layer of bigrams", torch.bfloat16
    with engram.open(stored(kind, dtype), ram="8MiB") as table:
        model = offload(copy.deepcopy(resident(kind, dtype, device)), table, hbm="1MiB")
        seen = []
        model.model.layers[0].register_forward_pre_hook(
            lambda *_: seen.append(sum(ngrams_read(table.on_devices[0])))
        )
        ids = prompt(3, 11, device)
        past = DynamicCache(config=model.config)
        model(ids[:, :10], past_key_values=past)
        model(ids[:, 10:], past_key_values=past)
        assert seen == [30, 33]
        assert sum(ngrams_read(table.on_devices[0])) == 33
        assert table.stats()["tiers"][0]["tier"] == "gpu"


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_dtype_that_the_step_was_not_prepared_in(device, stored):
    kind, dtype = "two layers", torch.float32
    weights = resident(kind, dtype, device).model.layers[2].ple
    ids = prompt(2, 9, device)
    exact = weights.ple_embedding(ids, None)
    rounded = exact.bfloat16()
    assert not torch.equal(rounded.float(), exact)
    with engram.open(stored(kind, dtype), ram="8MiB") as table:
        shared = SharedLookup(table, table.layers, 1 << 20)
        states = dict.fromkeys(table.layers)
        for prepared in (torch.bfloat16, torch.float32):
            shared.open(ids, states, prepared)
            for asked, right in ((torch.float32, exact), (torch.bfloat16, rounded)):
                assert same(shared.embeddings(2, ids, states, asked), right.cpu())
            shared.close()


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_loaded_without_its_tables(device, stored):
    kind, dtype = "two layers", torch.float32
    path = stored(kind, dtype)
    with engram.open(path, ram="8MiB") as table:
        model = load_offloaded(path.parent / "checkpoint", table, hbm="1MiB").to(device)
        ids = prompt(2, 9, device)
        assert torch.equal(model(ids).logits, resident(kind, dtype, device)(ids).logits)
        assert [tier.capacity for tier in table.on_devices] == [1 << 20]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_more_than_the_device_has(stored):
    kind, dtype = CASES[0]
    with engram.open(stored(kind, dtype), ram="8MiB") as table:
        model = offload(copy.deepcopy(resident(kind, dtype, "cuda")), table, hbm="8TiB")
        with pytest.raises(ConfigError, match=r"8TiB wanted, but cuda:0 has .* free"):
            model(prompt(1, 3, "cuda"))


@torch.no_grad()
def test_hbm_where_there_can_be_no_tier():
    model = causal_lm()
    offload(model, MemoryTable.of_model(model), hbm="1MiB")
    with pytest.raises(ConfigError, match="served from another host"):
        model(prompt(1, 3, "cpu"))


class Given(torch.nn.Module):
    """Stands where a layer looks its n-grams up: gives what is in some memory by then."""

    def __init__(self, embeddings):
        super().__init__()
        self.embeddings = embeddings

    def forward(self, input_ids, past_key_values):
        return self.embeddings


def step_arguments(past, start, count, device):
    """What a forward needs to leave masks and positions to us, of which some ask the device."""
    positions = torch.arange(start, start + count, device=device)
    return {
        "position_ids": positions.expand(SEQUENCES, count).clone(),
        "attention_mask": {"linear_attention": None, "indexed_attention": None},
        "past_key_values": past,
    }


class DecodeStep:
    """A model's decode step over memory that stays where it is: its ids, positions, n-gram
    embeddings, cache and logits. On a CUDA device it is a captured graph."""

    def __init__(self, model, table, past, device, hbm):
        self.lookup = EngramLookup(table, model.dtype, device=device, hbm=hbm)
        shape = (len(table.layers), SEQUENCES, 1, self.lookup.embedding_dim)
        self.out = torch.zeros(shape, dtype=model.dtype, device=device)
        self.ids = torch.zeros((SEQUENCES, 1), dtype=torch.int64, device=device)
        self.arguments = step_arguments(past, 0, 1, device)
        self.model = copy.deepcopy(model)
        for embeddings, layer in zip(self.out, table.layers, strict=True):
            self.model.model.layers[layer].ple.ple_embedding = Given(embeddings)
        self.graph = self._captured() if device == "cuda" else None

    def _forward(self):
        return self.model(self.ids, **self.arguments).logits

    def _captured(self):
        states = [
            state
            for layer in self.arguments["past_key_values"].layers
            for held in (layer.conv_states, layer.recurrent_states)
            for state in held.values()
            if state is not None
        ]
        before = [state.clone() for state in states]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Of this thread only: the tier's own ask the device meanwhile whether launches ended.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self._forward()
        for state, old in zip(states, before, strict=True):
            state.copy_(old)
        return graph

    def __call__(self, ids, at):
        """Logits of the tokens at `at` of `ids` `[SEQUENCES, any]`, which are on the host."""
        now = ids[:, at : at + 1]
        width = self.lookup.table.spec.max_order - 1
        prepared = self.lookup.prepare(now, history=ids[:, at - width : at], out=self.out)
        self.ids.copy_(now)
        self.arguments["position_ids"].fill_(at)
        prepared.wait()
        if self.graph is None:
            return self._forward()
        self.graph.replay()
        return self.logits


@pytest.mark.parametrize(("device", "hbm"), TIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_captured_decode_step_gives_what_eager_steps_give(dtype, device, hbm, stored):
    kind, steps = "only linear attention", STEPS[device]
    theirs = copy.deepcopy(resident(kind, dtype, device))
    # The other kinds of experts ask the device how many tokens each gets.
    theirs.set_experts_implementation("batched_mm")
    generator = torch.Generator().manual_seed(5)
    # Few ids, EOS among them, so that n-grams come again; but not all of them.
    few = torch.randint(5, 40, (SEQUENCES, PROMPT + steps), generator=generator)
    every = torch.randint(8, VOCAB, few.shape, generator=generator)
    ids = torch.where(torch.rand(few.shape, generator=generator) < 0.9, few, every)
    on_device = ids.to(device)
    with engram.open(stored(kind, dtype), ram="2MiB") as table:
        ours = offload(copy.deepcopy(theirs), table, hbm=hbm)
        past = {model: DynamicCache(config=model.config) for model in (theirs, ours)}
        mine = DynamicCache(config=theirs.config)
        for model, filled in ((theirs, past[theirs]), (ours, past[ours]), (theirs, mine)):
            model(on_device[:, :PROMPT], **step_arguments(filled, 0, PROMPT, device))
        replay = DecodeStep(theirs, table, mine, device, hbm)
        last = None
        for at in range(PROMPT, PROMPT + steps):
            now = on_device[:, at : at + 1]
            resident_logits, eager = (
                model(now, **step_arguments(past[model], at, 1, device)).logits
                for model in (theirs, ours)
            )
            replayed = replay(ids, at)
            assert replayed.isfinite().all()
            assert torch.equal(eager, resident_logits), at
            assert torch.equal(replayed, eager), at
            assert last is None or not torch.equal(replayed, last)
            last = replayed.clone()
        (tier,) = table.on_devices
        assert (ngrams_read(tier)[0] > 0) == bool(hbm)
        tier.check_integrity()
