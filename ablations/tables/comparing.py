"""One cell of a table: its mean with errors, and its paired difference to the row it is compared with (see statistics.py).

Training seeds of the two sides count as independent. In a suite, where a seed is missing on one side, the difference is over the
seeds that both sides have: those saw the same documents in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ablations import statistics as st
from ablations.tables.answers import Answers, Key
from ablations.tables.cells import Cell


@dataclass
class Compared:
    """A row's answers on one task at one number of shots, and what its difference is made of: `pair`, both sides at the same
    training seeds where those are paired. Estimates are kept: the mean over tasks needs them again."""

    own: Answers
    pair: tuple[Answers, Answers] | None

    @cached_property
    def deltas(self) -> np.ndarray:
        """(demonstration seeds, items), averaged over training seeds."""
        assert self.pair is not None
        return self.pair[0].shown - self.pair[1].shown

    @cached_property
    def paired(self) -> st.Estimate:
        return st.clustered_mean(self.deltas.mean(0), self.own.clusters)


def compared(own: Mapping[Key, Answers], other: Mapping[Key, Answers] | None, pair_seeds: bool) -> dict[Key, Compared]:
    """Each task and number of shots of a row beside that of the row it is compared with."""
    if other is None:
        return {key: Compared(a, None) for key, a in own.items()}
    a = next(iter(own.values()))
    both = shared_seeds(a.seeds, next(iter(other.values())).seeds) if pair_seeds else None
    if both is None:
        return {key: Compared(a, (a, other[key])) for key, a in own.items()}
    return {key: Compared(a, (a.of(both), other[key].of(both))) for key, a in own.items()}


def shared_seeds(own: Sequence[int], other: Sequence[int]) -> list[int] | None:
    """The training seeds that both have; None where that is none."""
    return [seed for seed in own if seed in other] or None


def cell_of(answers: list[Compared], interval: str) -> Cell:
    """The mean over the given tasks (one or all), and its paired difference."""
    own = [a.own for a in answers]
    shown = st.spread([(a.shown, a.clusters) for a in own])
    cell = Cell(st.combine(st.average_tasks([a.estimate for a in own]), seeds=[_seeds(own)], demonstrations=shown))
    if answers[0].pair is None:
        return cell
    one, other = ([a.pair[side] for a in answers if a.pair] for side in (0, 1))
    paired = st.average_tasks([a.paired for a in answers])
    if interval == "bootstrap":
        draws = [st.bootstrap_draws(a.deltas.mean(0), a.own.clusters, seed=number) for number, a in enumerate(answers)]
        cell.difference = st.bootstrap_difference(paired.mean, np.mean(draws, axis=0), paired.error[1])
        return cell
    # demonstrations are the same in all rows, so what they do to both sides of a difference is no error of it
    shown = st.spread([(a.deltas, a.own.clusters) for a in answers])
    combined = st.combine(paired, seeds=[_seeds(one), _seeds(other)], demonstrations=shown)
    cell.difference_has_seeds = combined.se_seeds is not None
    cell.difference = st.difference(combined.mean, combined.se, combined.df)
    return cell


def difference_of(answers: Sequence[Compared]) -> tuple[st.Difference, bool]:
    """(paired difference of the mean over tasks, whether it holds training-seed error)."""
    cell = cell_of(list(answers), "t")
    assert cell.difference is not None
    return cell.difference, cell.difference_has_seeds


def _seeds(answers: list[Answers]) -> st.Spread | None:
    if len(answers[0].seeds) < 2:
        return None
    return st.spread([(a.scores[:, 0] if a.scores.shape[1] == 1 else a.scores.mean(1), a.clusters) for a in answers])
