"""The families' fusion modules against their published results and float64 twins."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from engram.errors import CheckpointError
from engram.nn import DeepSeekDemoFusion, DeepSeekV41Fusion

GOLDEN = np.load(Path(__file__).parent / "data" / "deepseek_demo_fusion.npz")
CONFIG = ast.literal_eval(str(GOLDEN["config"]))
STATE = {
    name.removeprefix("param/"): torch.from_numpy(GOLDEN[name])
    for name in GOLDEN
    if name.startswith("param/")
}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]


def demo():
    orders = CONFIG["max_ngram_size"] - 1
    fusion = DeepSeekDemoFusion(
        orders * CONFIG["n_embed_per_ngram"],
        CONFIG["hidden_size"],
        CONFIG["hc_mult"],
        CONFIG["max_ngram_size"],
        CONFIG["kernel_size"],
    )
    fusion.load_demo_state(STATE)
    return fusion


def golden_inputs(device="cpu"):
    hidden = torch.from_numpy(GOLDEN["hidden_in"]).to(device)
    return hidden, torch.from_numpy(GOLDEN["embeddings"]).flatten(-2).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_demo_gives_the_published_result(device):
    found = demo().to(device)(*golden_inputs(device)).detach().cpu().numpy()
    assert np.abs(found - GOLDEN["out"]).max() < 1e-5


def test_demo_looks_back_only():
    fusion, (hidden, embeddings) = demo(), golden_inputs()
    changed = embeddings.clone()
    changed[:, 5] += 1
    before, after = fusion(hidden, embeddings), fusion(hidden, changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])
    # The convolution reaches back by its dilation, the largest order.
    assert not torch.equal(before[:, 8], after[:, 8])
    assert torch.equal(before[:, 6:8], after[:, 6:8])


def test_demo_state_is_loaded_whole_or_not_at_all():
    fusion = demo()
    before = {name: tensor.clone() for name, tensor in fusion.state_dict().items()}
    bad = dict(STATE)
    bad["value_proj.bias"] = torch.zeros(3)
    lacking = {name: tensor for name, tensor in STATE.items() if name != "key_projs.1.bias"}
    extra = STATE | {"key_projs.9.bias": torch.zeros(3)}
    for state, named in [
        (bad, "value_proj.bias"),
        (lacking, "key_projs.1.bias"),
        (extra, "key_projs.9.bias"),
    ]:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
            fusion.load_demo_state(zeros)
    for name, tensor in fusion.state_dict().items():
        assert torch.equal(tensor, before[name])


def v41_twin(state, hidden, embeddings, dead, eps):
    """Float64, one position and branch at a time, straight from the definition."""
    state = {name: tensor.double().numpy() for name, tensor in state.items()}
    hidden, embeddings = hidden.double().numpy(), embeddings.double().numpy()
    branches, size = state["q_weight"].shape
    out = hidden.copy()
    for place in np.ndindex(embeddings.shape[:-1]):
        if dead is not None and bool(dead[place]):
            continue
        projected = state["wkv.weight"] @ embeddings[place]
        value = projected[branches * size :]
        for branch in range(branches):
            key = projected[branch * size : (branch + 1) * size]
            query = hidden[place][branch]
            key = key / np.sqrt((key**2).mean() + eps) * state["k_weight"][branch]
            query = query / np.sqrt((query**2).mean() + eps) * state["q_weight"][branch]
            dot = key @ query / np.sqrt(size)
            root = np.copysign(np.sqrt(max(abs(dot), 1e-6)), dot)
            out[place][branch] += value / (1 + np.exp(-root))
    return out


def v41(embed_dim=48, size=12, branches=3, eps=1e-6):
    torch.manual_seed(5)
    fusion = DeepSeekV41Fusion(embed_dim, size, branches, eps)
    state = {name: torch.randn_like(tensor) for name, tensor in fusion.state_dict().items()}
    fusion.load_checkpoint_state(state | {"embed.weight": torch.zeros(1)})
    return fusion, state


@pytest.mark.parametrize("device", DEVICES)
def test_v41_agrees_with_its_twin(device):
    fusion, state = v41()
    hidden, embeddings = torch.randn(2, 7, 3, 12), torch.randn(2, 7, 48)
    dead = torch.zeros(2, 7, dtype=torch.bool)
    dead[0, 2:5] = True
    for mask in (None, dead):
        twin = v41_twin(state, hidden, embeddings, mask, 1e-6)
        found = fusion.to(device)(
            hidden.to(device), embeddings.to(device), None if mask is None else mask.to(device)
        )
        assert np.abs(found.detach().cpu().numpy() - twin).max() < 1e-5
        assert np.abs(twin - hidden.numpy()).max() > 0.1


def test_v41_dead_positions_pass_through_whatever_they_hold():
    fusion, _ = v41()
    hidden, embeddings = torch.randn(7, 3, 12), torch.randn(7, 48)
    embeddings[3] = torch.nan
    dead = torch.zeros(7, dtype=torch.bool)
    dead[3] = True
    found = fusion(hidden, embeddings, dead)
    assert torch.equal(found[3], hidden[3])
    assert found.isfinite().all()


def test_v41_gates_in_float32_and_answers_in_the_dtype_of_the_hidden_states():
    fusion, state = v41()
    hidden = torch.randn(4, 3, 12).bfloat16()
    embeddings = torch.randn(4, 48).bfloat16()
    exact = v41_twin(
        {name: tensor.bfloat16() for name, tensor in state.items()}, hidden, embeddings, None, 1e-6
    )
    found = fusion.bfloat16()(hidden, embeddings)
    assert found.dtype == torch.bfloat16
    assert np.abs(found.detach().double().numpy() - exact).max() < 0.1


def test_v41_with_the_released_epsilon_survives_zero_keys():
    fusion, _ = v41(eps=1e-20)
    found = fusion(torch.randn(4, 3, 12), torch.zeros(4, 48))
    assert found.isfinite().all()


def test_v41_shapes_of_the_release():
    with torch.device("meta"):
        fusion = DeepSeekV41Fusion(24 * 256, 5120, 4)
    shapes = {name: tuple(tensor.shape) for name, tensor in fusion.state_dict().items()}
    assert shapes == {"wkv.weight": (25600, 6144), "q_weight": (4, 5120), "k_weight": (4, 5120)}
    assert fusion.eps == 1e-20
