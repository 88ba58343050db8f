"""Qwen4-Exp models small enough for tests, and their tables held in memory."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen4ExpConfig, Qwen4ExpTextConfig
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen4_exp

from engram.rows import RowFormat, Rows

# Products this small gain nothing from a second thread and wait for it on a busy machine.
torch.set_num_threads(1)

VOCAB = 512
EOS = 7
PAD = 0


def text_config(**changes) -> Qwen4ExpTextConfig:
    """Four layers, n-gram tables at layers 0 and 2, two residual streams, four experts."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "layer_types": ["linear_attention"] * 3 + ["indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1, 3],
        "ple_embed_dim": 32,
        "ngram_size": 3,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 1000,
        "split_ngram_parts": 8,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "bos_token_id": 1,
    }
    return Qwen4ExpTextConfig(**(fields | changes))


def causal_lm(dtype=torch.float32, weights=0, **changes):
    """A model with every weight random: those that start as zeros would hide wrong rows."""
    model = qwen4_exp.Qwen4ExpForCausalLM(text_config(**changes))
    return randomized(model, weights).to(dtype)


def conditional_lm():
    """The same text model inside a model that also sees images."""
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    }
    config = Qwen4ExpConfig(
        text_config=text_config().to_dict(),
        vision_config=vision,
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=502,
        vision_end_token_id=503,
    )
    return randomized(qwen4_exp.Qwen4ExpForConditionalGeneration(config))


def randomized(model, seed=0):
    """Give every parameter values that are large enough to reach the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1.0 if "ngram_embedding" in name or "conv1d" in name else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


class MemoryTable:
    """What a `Table` offers to model code, over rows in memory, with every call written down."""

    def __init__(self, spec, row_format: RowFormat, packed: dict[int, np.ndarray]) -> None:
        self.spec = spec
        self.row_format = row_format
        self.layers = spec.layer_ids
        self.columns = tuple(range(spec.num_columns))
        self.name = "memory"
        self.rows = packed
        self.calls: list[str] = []

    @classmethod
    def random(cls, spec, row_format, seed=0):
        source = np.random.default_rng(seed)
        rows = {
            each.layer: source.integers(0, 256, (each.rows, row_format.row_bytes), np.uint8)
            for each in spec.layers
        }
        return cls(spec, row_format, rows)

    @classmethod
    def of_model(cls, model):
        """The tables of a Qwen4-Exp model, copied in the dtype of its weights."""
        from engram.integrations._qwen4_exp import ple_layers, spec_of, text_model_of

        text_model = text_model_of(model)
        spec = spec_of(text_model.config)
        weights = {
            layer: ple.ple_embedding.ngram_embedding.weight.detach().cpu()
            for layer, ple in ple_layers(text_model).items()
        }
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        dtype = next(iter(weights.values())).dtype
        packed = {layer: w.view(torch.uint8).numpy().copy() for layer, w in weights.items()}
        return cls(spec, RowFormat(names[dtype], spec.dim), packed)

    def lookup(
        self, tokens, starts=None, history=None, dead=None, layers=None, columns=None, out=None
    ):
        self.calls.append("lookup")
        ids = self.spec.row_ids(tokens, starts, history, dead)
        layers = self.layers if layers is None else layers
        columns = list(self.columns if columns is None else columns)
        parts = [
            self.rows[layer][ids[..., self.layers.index(layer), :][..., columns]]
            for layer in layers
        ]
        return self._filled(np.stack(parts, axis=-3), out)

    def lookup_rows(self, layer, row_ids, out=None):
        self.calls.append("lookup_rows")
        return self._filled(self.rows[layer][np.asarray(row_ids)], out)

    def prefetch(self, tokens, starts=None, history=None, dead=None):
        self.spec.windows(tokens, starts, history, dead)
        self.calls.append("prefetch")

    def _filled(self, packed, out):
        if out is None:
            out = Rows.empty(packed.shape[:-1], self.row_format)
        else:
            out.check(packed.shape[:-1], self.row_format)
        width = self.row_format.value_bytes
        out.values[...] = packed[..., :width]
        if out.scales is not None:
            out.scales[...] = packed[..., width:]
        return out
