"""Primes above a bound, in ascending order."""

from __future__ import annotations

from collections.abc import Iterator

_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(number: int) -> bool:
    """Miller-Rabin; with these witnesses it is exact below 3.3e24 (Sorenson and Webster, 2015)."""
    if number < 2:
        return False
    for small in _WITNESSES:
        if number % small == 0:
            return number == small
    twos = ((number - 1) & (1 - number)).bit_length() - 1
    odd = (number - 1) >> twos
    return all(_passes(number, witness, odd, twos) for witness in _WITNESSES)


def _passes(number: int, witness: int, odd: int, twos: int) -> bool:
    power = pow(witness, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False


def primes_above(bound: int) -> Iterator[int]:
    """All primes greater than `bound`, ascending, without end."""
    number = bound + 1
    while True:
        if is_prime(number):
            yield number
        number += 1
