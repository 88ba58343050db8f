"""Tokenizer compression on a vocabulary small enough to see, and the primes."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from engram.errors import SpecError
from engram.spec._compression import compress, token_map_of
from engram.spec._primes import is_prime, primes_above


def byte_level(tokens: list[str], special: tuple[str, ...] = ()) -> Tokenizer:
    """A byte-level tokenizer of exactly these tokens, then the special ones."""
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in special])
    return tokenizer


def keys_shared(tokens, special=()) -> list[int]:
    return compress(byte_level(tokens, special), "made up").tolist()


# In a byte-level vocabulary "Ġ" is a space, "Ċ" a line feed, "ĉ" a tab.
def test_case_accents_width_and_spaces_do_not_matter():
    # "Ã©" are the two bytes of an accented e, "ï¼¡" the three of a full-width A.
    assert keys_shared(["the", "The", "ĠTHE", "theĠ", "e", "Ã©", "a", "ï¼¡"]) == [
        0, 0, 0, 0, 1, 1, 2, 2,
    ]  # fmt: skip


def test_white_space_alone_is_one_key_and_not_nothing():
    assert keys_shared(["Ġ", "ĠĠ", "Ċ", "ĉĊ", "x"]) == [0, 0, 0, 0, 1]


def test_inner_runs_of_white_space_collapse():
    assert keys_shared(["aĠb", "aĠĠĊb", "ab"]) == [0, 0, 1]


def test_parts_of_a_character_are_told_apart_by_their_raw_token():
    # Each alone decodes to U+FFFD, but they are different bytes.
    assert keys_shared(["Ã", "©", "Ã©"]) == [0, 1, 2]


def test_text_that_normalizes_to_nothing_is_its_own_key():
    # U+0301 and U+0300 are accents without a letter; stripping leaves nothing of either.
    assert keys_shared(["Ìģ", "ÌĢ", "x"]) == [0, 1, 2]


def test_special_tokens_count():
    assert keys_shared(["a", "b"], ("<s>", "<S>", "A")) == [0, 1, 2, 2, 0]


def test_numbers_follow_the_first_appearance():
    assert keys_shared(["z", "a", "Z", "m", "A"]) == [0, 1, 0, 2, 1]


def test_a_file_and_its_directory_give_the_same(tmp_path):
    byte_level(["a", "A", "b"]).save(str(tmp_path / "tokenizer.json"))
    for given in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        found = token_map_of(given)
        assert found.tolist() == [0, 0, 1]
        assert found.dtype == np.int32


def test_a_known_map_is_taken_as_it_is():
    assert token_map_of(np.array([0, 1, 0], np.int64)).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "given",
    [
        np.zeros((2, 2), np.int32),
        np.zeros(0, np.int32),
        np.zeros(3, np.float32),
        np.array([0, -1]),
        np.array([0, 2]),
    ],
)
def test_maps_that_cannot_be(given):
    with pytest.raises(SpecError, match=r"a token map must be integers \[vocab_size\]"):
        token_map_of(given)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"tokenizer\.json does not exist; this family needs"):
        token_map_of(tmp_path)


def test_a_file_that_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SpecError, match="is not a readable tokenizer") as caught:
        token_map_of(tmp_path)
    assert "\n" not in str(caught.value)


def test_ids_without_a_token_are_refused():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    with pytest.raises(SpecError, match="made up has no token for id 1"):
        compress(tokenizer, "made up")


def test_primes_equal_a_sieve():
    limit = 20_000
    sieve = np.ones(limit, bool)
    sieve[:2] = False
    for n in range(2, 142):
        if sieve[n]:
            sieve[n * n :: n] = False
    assert [n for n in range(limit) if is_prime(n)] == np.flatnonzero(sieve).tolist()
    assert list(islice(primes_above(0), 5)) == [2, 3, 5, 7, 11]
    assert next(primes_above(13)) == 17


@pytest.mark.parametrize(
    ("number", "prime"),
    [
        (2**61 - 1, True),
        (2**61 + 1, False),
        (3_215_031_751, False),  # a strong pseudoprime to the witnesses 2, 3, 5 and 7
        (3_825_123_056_546_413_051, False),  # and to all witnesses up to 23
        (16_000_057**2, False),
        (2**64 - 59, True),
    ],
)
def test_large_numbers(number, prime):
    assert is_prime(number) == prime
