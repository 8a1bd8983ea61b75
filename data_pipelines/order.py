"""Which sample comes when: pure functions of the seed.

Every random decision of the data pipelines is a keyed hash of (seed, purpose, ...): the same on every rank, in every worker,
after every resume, and independent of how often anything else was drawn.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

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

    A Feistel network of six rounds on pairs (left, right) of Z_a x Z_b, a = ceil(sqrt(n)), b = ceil(n / a), whose rounds add a
    keyed hash of one half to the other. It is walked until it lands inside range(n) (cycle walking), nearly always at once,
    since a * b exceeds n by less than a.
    """

    ROUNDS = 6

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, not {n}")
        self.n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        self._keys = [_mix(key + round_) for round_ in range(self.ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(index)
        while True:
            left, right = divmod(index, self._b)
            for first, second in zip(self._keys[::2], self._keys[1::2], strict=True):
                left = (left + (_mix(first ^ right) >> 1)) % self._a
                right = (right + (_mix(second ^ left) >> 1)) % self._b
            index = left * self._b + right
            if index < self.n:
                return index

    def many(self, indices: np.ndarray) -> np.ndarray:
        """What `permutation[i]` gives for each i of an int64 array, a hundred times as fast."""
        import numpy as np

        values = np.asarray(indices).astype(np.uint64)
        a, b, one = np.uint64(self._a), np.uint64(self._b), np.uint64(1)
        keys = np.array(self._keys, np.uint64)
        outside = np.arange(len(values))
        while len(outside):
            left, right = np.divmod(values[outside], b)
            for first, second in zip(keys[::2], keys[1::2], strict=True):
                left = (left + (_mix_many(first ^ right) >> one)) % a
                right = (right + (_mix_many(second ^ left) >> one)) % b
            values[outside] = walked = left * b + right
            outside = outside[walked >= np.uint64(self.n)]
        return values.astype(np.int64)


def _mix_many(value: np.ndarray) -> np.ndarray:
    """_mix on a uint64 array, whose arithmetic wraps by itself."""
    import numpy as np

    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


_NOTHING: tuple[int, array[int]] = (0, array("q"))


class LaneOrder:
    """The endless order in which the lanes of a run read a split of n samples: `order[lane, place]`.

    The split is cut into blocks of `block` neighbouring samples. Each epoch is a keyed permutation of the blocks, dealt to the
    lanes in turn; a lane reads MIXED blocks at a time, their samples in a keyed order. With block = 1 every epoch is a plain
    permutation of all samples. Larger blocks are for shards behind a network or on a spinning disk, where a sample alone costs
    as much as its neighbours together. In each epoch every sample has exactly one place.
    """

    MIXED = 4
    AHEAD = 512
    """Places worked out at once, at most."""
    EPOCHS = 8
    """That these may lie in."""

    def __init__(self, n: int, lanes: int, *key: object, block: int = 1) -> None:
        self.n, self.lanes, self.block, self._key = n, lanes, block, key
        self.blocks = -(-n // block)
        self._epochs: dict[int, Permutation] = {}
        self._ahead: dict[int, tuple[int, array[int]]] = {}

    def __getitem__(self, at: tuple[int, int]) -> int | None:
        """The sample at a lane's place 0, 1, 2, ...; None where the last block of an epoch has no sample left."""
        lane, place = at
        start, found = self._ahead.get(lane, _NOTHING)
        if not start <= place < start + len(found):
            start, found = self._ahead[lane] = place, self._samples(lane, place)
        sample = found[place - start]
        return sample if sample < self.n else None

    def _samples(self, lane: int, place: int) -> array[int]:
        import numpy as np

        # each epoch among the places needs a permutation of its own: no more than EPOCHS of them, however small the split
        ahead = max(1, min(self.AHEAD, self.EPOCHS * self.blocks // self.lanes))
        places = np.arange(place, place + ahead, dtype=np.int64)
        inside = np.zeros_like(places)
        if self.block > 1:
            group = self.MIXED * self.block
            for number in range(int(places[0] // group), int(places[-1] // group) + 1):
                chosen = places // group == number
                mixed = Permutation(group, keyed(*self._key, "inside", lane, number)).many(places[chosen] % group)
                places[chosen], inside[chosen] = number * self.MIXED + mixed // self.block, mixed % self.block
        dealt = places * self.lanes + lane
        blocks = np.empty_like(dealt)
        epochs = dealt // self.blocks
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            blocks[chosen] = self._epoch(epoch).many(dealt[chosen] % self.blocks)
        return array("q", (blocks * self.block + inside).tobytes())

    def _epoch(self, epoch: int) -> Permutation:
        if epoch not in self._epochs:
            if len(self._epochs) >= 8:  # lanes stand within an epoch or two of each other
                self._epochs.clear()
            self._epochs[epoch] = Permutation(self.blocks, keyed(*self._key, epoch))
        return self._epochs[epoch]
