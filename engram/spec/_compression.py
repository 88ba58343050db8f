"""Tokenizer compression: ids whose text means the same share one canonical id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engram.errors import SpecError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

TokenizerLike = str | os.PathLike[str] | npt.NDArray[Any]
"""A `tokenizer.json`, a directory that holds one, or a token map that is already known."""

_UNDECODABLE = "\ufffd"
_LONE_SPACE = "\ue000"


def token_map_of(tokenizer: TokenizerLike) -> npt.NDArray[np.int32]:
    """Canonical id of every raw id: int32 `[vocab_size]`.

    Raises:
        SpecError: no such file, not a tokenizer, or a map of another form.
    """
    if isinstance(tokenizer, np.ndarray):
        return _checked_map(tokenizer)
    path = Path(tokenizer)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise SpecError(f"{path} does not exist; this family needs the model's tokenizer.json")
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise SpecError(f"{path} is not a readable tokenizer: {error}") from None
    return compress(loaded, str(path))


def _checked_map(given: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    whole = given.ndim == 1 and given.size and given.dtype.kind in "iu"
    if not whole or int(given.min()) < 0 or int(given.max()) >= given.size:
        raise SpecError(
            "a token map must be integers [vocab_size], each from 0 to below the vocabulary size"
        )
    return given.astype(np.int32)


def compress(tokenizer: Tokenizer, name: str) -> npt.NDArray[np.int32]:
    """Number the ids' keys by first appearance: the rule of the Engram paper's code.

    A key is the text of an id alone, normalized; or the raw token where the bytes of the id are
    only part of a character.
    """
    normalizer = _normalizer()
    count = tokenizer.get_vocab_size(with_added_tokens=True)
    texts = tokenizer.decode_batch([[i] for i in range(count)], skip_special_tokens=False)
    canonical: dict[str, int] = {}
    token_map = np.empty(count, np.int32)
    for i, text in enumerate(texts):
        token = tokenizer.id_to_token(i)
        if token is None:
            raise SpecError(f"{name} has no token for id {i}, though it has {count} tokens")
        key = token if _UNDECODABLE in text else normalizer.normalize_str(text) or text
        token_map[i] = canonical.setdefault(key, len(canonical))
    return token_map


def _normalizer() -> Normalizer:
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            # A token that is only white space would otherwise be stripped to nothing.
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )
