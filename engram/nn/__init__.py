"""Torch modules that take their n-gram embeddings from a table."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ModuleNotFoundError("engram.nn needs PyTorch: pip install 'engram-offload[torch]'")

from engram.gpu.dequantize import dequantize
from engram.nn._fusion import DeepSeekDemoFusion, DeepSeekV41Fusion
from engram.nn._lookup import EngramEmbedding, EngramLookup, LayerRows
from engram.nn._prepared import Prepared

__all__ = [
    "DeepSeekDemoFusion",
    "DeepSeekV41Fusion",
    "EngramEmbedding",
    "EngramLookup",
    "LayerRows",
    "Prepared",
    "dequantize",
]
