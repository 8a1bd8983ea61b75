"""The mixture: how many sequences of each global batch come from each source, and which ones.

With ratios r_k and L sequences a batch, source k gets floor(r_k L) or ceil(r_k L) sequences of *every* batch, and r_k L on
average. The whole parts are fixed; the fractional parts are laid end to end and sampled systematically from an offset that moves
by the golden ratio each step. Independent draws would instead miss 45 % by 1.3 points (std) over 512 sequences: noise that short
ablations would take for an effect. Which slots a source gets is a keyed permutation of the step, so that no rank or worker sees
one source only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from data_pipelines.order import Permutation, keyed

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: multiples of it fill the unit interval evenly


class Mixture:
    def __init__(self, ratios: Mapping[str, float], batch: int, seed: int) -> None:
        """`ratios` by source, summing to one; `batch`: sequences a global batch; sources of ratio 0 never appear."""
        exact = {name: Fraction(str(ratio)).limit_denominator(1_000_000) for name, ratio in ratios.items() if ratio > 0}
        total = sum(exact.values())
        self.sources: Sequence[str] = list(exact)
        self.batch, self.seed = batch, seed
        self._target = [exact[name] / total * batch for name in self.sources]

    def counts(self, step: int) -> dict[str, int]:
        """Sequences of each source in the global batch of `step`; they sum to the batch exactly."""
        offset = Fraction((keyed(self.seed, "mixture offset") + step * _GOLDEN) % 2**32, 2**32)
        counts, edge = {}, offset
        for name, target in zip(self.sources, self._target, strict=True):
            whole = math.floor(target)
            next_edge = edge + (target - whole)
            counts[name] = whole + math.floor(next_edge) - math.floor(edge)
            edge = next_edge
        return counts

    def slots(self, step: int) -> list[str]:
        """The source of every slot of the global batch of `step`."""
        ordered = [name for name, count in self.counts(step).items() for _ in range(count)]
        permutation = Permutation(self.batch, keyed(self.seed, "mixture slots", step))
        return [ordered[permutation[slot]] for slot in range(self.batch)]
