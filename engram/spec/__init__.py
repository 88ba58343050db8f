"""Specs: how tokens become row ids, resolved to plain numbers for every family."""

from engram.spec._layers import LayerHash
from engram.spec._spec import NgramSpec

__all__ = ["LayerHash", "NgramSpec"]
