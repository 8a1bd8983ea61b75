"""The mixture: which source fills what, held to the ratios much more closely than chance would.

    unit = sequence          Mixture: sources fill whole sequences, in exact quotas of every global batch
    unit = document, token   Balance: each piece of a lane's sequences comes from the source that most needs it

**Sequences.** With ratios r_k and L sequences a batch, source k gets floor(r_k L) or ceil(r_k L) sequences of *every* batch, and
after any number of batches it is off its share by less than one sequence. Independent draws would miss 45 % by 1.3 points (std)
over 512 sequences: noise that short ablations would take for an effect. Which batches round up is decided by the algorithm PF of
proportionate fairness (Baruah, Cohen, Plaxton and Varvel 1996), which meets both bounds for any ratios. Which slots a source gets
is a keyed permutation of the step, so that no rank or worker sees one source only.

**Documents and tokens.** How many of them a sequence takes is known only once it is packed, and a lane knows its own sequences
alone. So each lane holds the ratios by itself: with u_k the units taken from source k so far and U their sum, the next piece
comes from the source that makes the sum of (u_k - r_k U)^2 smallest, and no source strays by more than about one piece. The lanes
begin at phases that are spread evenly, so that their errors cancel in the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cmp_to_key, partial

from data_pipelines.order import Permutation, keyed


class Mixture:
    def __init__(self, ratios: Mapping[str, float], batch: int, seed: int) -> None:
        """`ratios` by source, summing to one; `batch`: sequences a global batch; sources of ratio 0 never appear."""
        exact = {name: Fraction(str(ratio)).limit_denominator(1_000_000) for name, ratio in ratios.items() if ratio > 0}
        total = sum(exact.values())
        self.sources: Sequence[str] = list(exact)
        self.batch, self.seed = batch, seed
        targets = [exact[name] / total * batch for name in self.sources]
        self._whole = [math.floor(target) for target in targets]
        # What is left of each target, as integer shares of a common denominator, and who has been rounded up how often.
        self._unit = math.lcm(*(target.denominator for target in targets))
        self._part = [int((target - whole) * self._unit) for target, whole in zip(targets, self._whole, strict=True)]
        self._given = [0] * len(targets)
        self._extra: list[list[int]] = []

    def counts(self, step: int) -> dict[str, int]:
        """Sequences of each source in the global batch of `step`; they sum to the batch exactly. Works out all steps before it
        first: microseconds a step, once."""
        while len(self._extra) <= step:
            self._extra.append(self._rounded_up(len(self._extra)))
        extra = self._extra[step]
        return {name: self._whole[k] + (k in extra) for k, name in enumerate(self.sources)}

    def _rounded_up(self, step: int) -> list[int]:
        """Which sources get ceil(target) at `step`: those that must, then those whose future is the most pressing."""
        room = sum(self._part) // self._unit
        urgent, contending = [], []
        for k, part in enumerate(self._part):
            lag, sign = part * step - self._given[k] * self._unit, self._sign(k, step)
            if part and lag > 0 and sign >= 0:
                urgent.append(k)
            elif part and not (lag < 0 and sign <= 0):
                contending.append(k)
        contending.sort(key=cmp_to_key(partial(self._compare, step)))
        chosen = (urgent + contending)[:room]
        for k in chosen:
            self._given[k] += 1
        return chosen

    def _sign(self, k: int, step: int) -> int:
        """PF's characteristic: would source k, had it had floor(share) so far, be behind (1), even (0) or ahead (-1) after one
        more at `step`?"""
        part, unit = self._part[k], self._unit
        value = part * (step + 1) - part * step // unit * unit - unit
        return (value > 0) - (value < 0)

    def _compare(self, step: int, a: int, b: int) -> int:
        """Order of two contending sources: their characteristics from the next step on, up to the first zero."""
        if self._part[a] == self._part[b]:
            return 0
        while True:
            step += 1
            first, second = self._sign(a, step), self._sign(b, step)
            if first != second:
                return second - first
            if first == 0:
                return 0

    def slots(self, step: int) -> list[str]:
        """The source of every slot of the global batch of `step`."""
        ordered = [name for name, count in self.counts(step).items() for _ in range(count)]
        permutation = Permutation(self.batch, keyed(self.seed, "mixture slots", step))
        return [ordered[permutation[slot]] for slot in range(self.batch)]


class Balance:
    """For one lane: the source whose next piece brings all of them closest to their shares."""

    def __init__(self, ratios: Sequence[float], lane: int, lanes: int, seed: int, unit: float) -> None:
        """`ratios` of the sources, summing to one; `unit`: what is taken at once at most (1 document, or a sequence's tokens)."""
        self.ratios = list(ratios)
        # A stratified phase in (-1/2, 1/2) of a unit for each source and lane; over the lanes they sum to zero exactly.
        strata = (Permutation(lanes, keyed(seed, "balance", k))[lane] for k in range(len(self.ratios)))
        self._phases = [unit * ((stratum + 0.5) / lanes - 0.5) for stratum in strata]

    def pick(self, taken: Sequence[int], sizes: Sequence[int]) -> int:
        """Index of the source to take from next. `taken`: units of each so far; `sizes`: units of each source's next piece."""
        total = sum(taken)
        errors = [u + phase - r * total for u, r, phase in zip(taken, self.ratios, self._phases, strict=True)]

        def squared(k: int) -> float:
            after = (e + sizes[k] * ((j == k) - r) for j, (e, r) in enumerate(zip(errors, self.ratios, strict=True)))
            return sum(error * error for error in after)

        return min(range(len(errors)), key=squared)
