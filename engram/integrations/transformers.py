"""Hugging Face transformers: a Qwen4-Exp model whose n-gram tables stay on SSD."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

if find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "this module needs transformers: pip install 'engram-offload[transformers]'"
    )

from transformers import AutoConfig, PreTrainedModel
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen4_exp

from engram.errors import ModelError
from engram.integrations import _qwen4_exp
from engram.integrations._steps import SharedLookup
from engram.sizes import parse_size

if TYPE_CHECKING:
    from engram.table import Table

Model = TypeVar("Model")

__all__ = ["load_offloaded", "offload"]

_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of `from_pretrained` that say where a checkpoint is."""


def offload(model: Model, table: Table, *, check_rows: bool = True, hbm: int | str = 0) -> Model:
    """Let a model take its n-gram embeddings from `table`, and free its own tables.

    The logits stay the same to the last bit where the table holds the model's own rows: with and
    without cache, in chunks, with padding, in beams. (A model under `torch.compile` leaves its
    graph for each lookup; the compiler then fuses other operations than in the resident model, and
    may round differently.) One lookup per forward serves all layers, and rows are prefetched from
    the ids at the text model's entry. Memory is freed as soon as nobody else holds the model's
    `ngram_embedding` weights (a state dict taken before does).

    On a CUDA device the embeddings of all layers are gathered on a stream of their own, from the
    model's entry on, beside the layers before the first that needs them. The host waits once a
    forward for a copy of the ids from the device, and once more where padding is masked; so no
    CUDA graph can hold a forward. (`engram.nn.EngramLookup.prepare` fills buffers for graphs.)

    A copy of the model shares the table. The table must stay open while the model is used.
    `save_pretrained` is refused afterwards, because a checkpoint without the table would load with
    random rows; with `state_dict=model.state_dict()` it saves everything else, for
    `load_offloaded`.

    Args:
        model: an unmodified `Qwen4ExpForCausalLM`, `Qwen4ExpForConditionalGeneration`,
            `Qwen4ExpModel` or `Qwen4ExpTextModel` of transformers 5.23, on any device.
        table: from `engram.open` or `engram.connect`; its rows are rounded to the dtype of the
            weights they stand in for.
        check_rows: compare 64 rows of each layer with the model's before freeing those. Quantized
            rows and weights on the meta device are never compared.
        hbm: memory on the model's CUDA device for n-grams that come again, like `"2GiB"`. More than
            the device has free is refused by the first forward.

    Returns:
        `model`.

    Raises:
        ModelError: not such a model, one without n-gram layers, or one offloaded before.
        SpecMismatchError: the table was made for another model, with the field named.
        ConfigError: `hbm` is no size.
        The model is unchanged after an error.
    """
    text_model = _qwen4_exp.text_model_of(model)
    layers = _qwen4_exp.ple_layers(text_model)
    _qwen4_exp.spec_of(text_model.config).check_same(table.spec)
    for layer, ple in layers.items():
        _qwen4_exp.check_layer(table, layer, ple.ple_embedding)
        if check_rows:
            _qwen4_exp.check_rows(table, layer, ple.ple_embedding)
    shared = SharedLookup(table, tuple(layers), parse_size(hbm))
    hooks = _qwen4_exp.StepHooks(text_model, shared)
    for ple in layers.values():
        ple.ple_embedding = _qwen4_exp.OffloadedNgramEmbedding(ple.ple_embedding, shared)
    hooks.install(text_model)
    for module in model.modules():  # type: ignore[attr-defined]
        if isinstance(module, PreTrainedModel) and text_model in module.modules():
            module.save_pretrained = MethodType(_save_without_table, module)
    return model


def _save_without_table(model: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("state_dict") is None:
        raise ModelError(
            "the model's n-gram tables are offloaded, so this checkpoint would lack them; pass "
            "state_dict=model.state_dict() to save all the rest, or save before offload"
        )
    return type(model).save_pretrained(model, *args, **kwargs)


def load_offloaded(
    checkpoint: str | os.PathLike[str],
    table: Table,
    *,
    model_class: type[PreTrainedModel] | None = None,
    hbm: int | str = 0,
    **from_pretrained: Any,
) -> Any:
    """Load a checkpoint without its n-gram tables, which are never read nor given memory.

    For models that would not fit into memory until `offload` frees their tables, and for
    checkpoints that were saved after it.

    Args:
        checkpoint: directory or name, as for `from_pretrained`.
        table, hbm: as for `offload`.
        model_class: what to load; by default what the checkpoint's config names.
        from_pretrained: passed on, for example `dtype`, `device_map` or `revision`.

    Returns:
        What `from_pretrained` returns: the model, offloaded.

    Raises:
        ModelError: the config names no Qwen4-Exp model.
        SpecMismatchError: the table was made for another model, with the field named.
    """
    chosen = model_class or _class_of(checkpoint, from_pretrained)

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        chosen.__init__(self, *args, **kwargs)
        offload(self, table, hbm=hbm)

    ignored = [*(chosen._keys_to_ignore_on_load_unexpected or []), r"\.ple_embedding\."]
    members = {"__init__": build, "_keys_to_ignore_on_load_unexpected": ignored}
    # from_pretrained builds the class it is called on, on the meta device, and then loads what its
    # parameters ask for. So a class that is offloaded as it is built never asks for its tables.
    tableless: Any = type(chosen.__name__, (chosen,), members | {"__module__": chosen.__module__})
    loaded = tableless.from_pretrained(checkpoint, **from_pretrained)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.__class__ = chosen
    return loaded


def _class_of(checkpoint: Any, from_pretrained: dict[str, Any]) -> type[PreTrainedModel]:
    config = from_pretrained.get("config")
    if config is None:
        where = {name: from_pretrained[name] for name in _WHERE if name in from_pretrained}
        config = AutoConfig.from_pretrained(checkpoint, **where)
    for name in config.architectures or ():
        found = getattr(qwen4_exp, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ModelError(
        f"the checkpoint's config names {config.architectures}, none of them a Qwen4-Exp model; "
        "pass model_class"
    )
