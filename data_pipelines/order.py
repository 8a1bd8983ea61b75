"""Which sample comes when: pure functions of the seed.

Every random decision of the data pipelines is a keyed hash of (seed, purpose, ...): the same on every rank, in every worker,
after every resume, and independent of how often anything else was drawn.
"""

from __future__ import annotations

import hashlib

_MASK = (1 << 64) - 1


def keyed(*parts: object) -> int:
    """64-bit hash of the parts' text, stable across processes, machines and Python versions."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a cheap 64-bit avalanche."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A keyed permutation of range(n) that needs no memory: `permutation[i]` for any i in O(1).

    A six-round balanced Feistel network on the smallest even number of bits that holds n, walked until it lands inside range(n)
    (cycle walking; at most four steps on average).
    """

    ROUNDS = 6

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, not {n}")
        self.n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._low = (1 << self._half) - 1
        self._keys = [_mix(key + round_) for round_ in range(self.ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(index)
        while True:
            left, right = index >> self._half, index & self._low
            for key in self._keys:
                left, right = right, left ^ (_mix(key ^ right) & self._low)
            index = left << self._half | right
            if index < self.n:
                return index


class EpochOrder:
    """An endless order over n samples: position p is in epoch p // n, and each epoch is its own permutation."""

    def __init__(self, n: int, *key: object) -> None:
        self.n, self._key = n, key
        self._epoch, self._permutation = 0, Permutation(n, keyed(*key, 0))

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self.n)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, Permutation(self.n, keyed(*self._key, epoch))
        return self._permutation[index]
