"""What each axis of a suite does over all settings of the other axes: main effects with 95 % intervals, mean scores as a grid.

    effect of variant v of axis A against the baseline's b     mean over settings s of the other axes of (score of v, s - b, s)

Settings weigh alike; only those that have both v and b count. Per item, averaged over settings, this is one paired difference
like any other of the table: errors by image, training seeds (those that all cells of the effect have) and demonstration seeds as
statistics.py has them. MM1 reads Figure 4 so: the number of image tokens and the resolution matter more than the connector.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ablations import statistics as st
from ablations.tables.answers import Answers, Collected, Key
from ablations.tables.cells import Table
from ablations.tables.comparing import compared, difference_of


@dataclass(frozen=True)
class Effect:
    """`variant` against `against`, the baseline's variant of `axis`: the paired difference of the mean over tasks, averaged over
    the `pairs` settings of the other axes that have both; `p_holm`: Holm over all effects of the table; `has_seeds`: the interval
    holds training-seed error; `seeds`: the training seeds it is over."""

    axis: str
    variant: str
    against: str
    shots: int
    difference: st.Difference
    p_holm: float
    pairs: int
    has_seeds: bool
    seeds: tuple[int, ...]

    @property
    def significant(self) -> bool:
        return self.p_holm < 0.05


@dataclass
class Grid:
    """Mean score over tasks in points at one number of shots: rows are the settings of all axes but the last, columns the last
    axis' variants; `means[i][j]` (and its standard error `ses[i][j]`) is None where that cell is not finished."""

    shots: int
    row_axes: list[str]
    column_axis: str
    rows: list[tuple[str, ...]]
    columns: list[str]
    means: list[list[float | None]]
    ses: list[list[float | None]]


@dataclass
class Effects:
    main: list[Effect]
    grids: list[Grid]


def effects_of(
    held: Collected, table: Table, axes: Mapping[str, Sequence[str]], choices: Mapping[str, Mapping[str, str]], baseline: str
) -> Effects | None:
    """`choices`: label -> axis -> variant of the table's rows; `baseline`: a label. None with fewer than two axes of several
    variants."""
    varied = [axis for axis, variants in axes.items() if len(variants) > 1]
    if len(varied) < 2:
        return None
    labels = {tuple(choice[axis] for axis in axes): label for label, choice in choices.items()}
    found = []
    for axis in varied:
        place, against = list(axes).index(axis), choices[baseline][axis]
        for variant in (v for v in axes[axis] if v != against):
            pairs = [
                (label, labels[other])
                for setting, label in labels.items()
                if setting[place] == variant and (other := (*setting[:place], against, *setting[place + 1 :])) in labels
            ]
            if pairs:
                found += _effects(held, axis, variant, against, pairs)
    corrected = st.holm([effect.difference.p for effect in found])
    main = [replace(effect, p_holm=p) for effect, p in zip(found, corrected, strict=True)]
    return Effects(main, [_grid(table, axes, labels, shots) for shots in table.shots])


def _effects(held: Collected, axis: str, variant: str, against: str, pairs: Sequence[tuple[str, str]]) -> list[Effect]:
    """One for each number of shots, p not yet corrected."""
    one, other = ([held.plain[pair[side]] for pair in pairs] for side in (0, 1))
    key = next(iter(one[0]))
    seeds = tuple(s for s in one[0][key].seeds if all(s in answers[key].seeds for answers in (*one, *other)))
    both = compared(_averaged(one, seeds), _averaged(other, seeds), pair_seeds=False)
    found = []
    for shots in held.shots:
        difference, has_seeds = difference_of([both[task, shots] for task in held.tasks])
        found.append(Effect(axis, variant, against, shots, difference, math.nan, len(pairs), has_seeds, seeds))
    return found


def _averaged(settings: Sequence[Mapping[Key, Answers]], seeds: tuple[int, ...]) -> dict[Key, Answers]:
    """The mean over settings, item by item and seed by seed; with no seed in common each setting's mean over its own."""
    mean = {}
    for key, first in settings[0].items():
        parts = [answers[key].of(seeds).scores if seeds else answers[key].scores.mean(0, keepdims=True) for answers in settings]
        mean[key] = Answers(np.mean(parts, axis=0), first.clusters, seeds or (-1,))
    return mean


def _grid(table: Table, axes: Mapping[str, Sequence[str]], labels: Mapping[tuple[str, ...], str], shots: int) -> Grid:
    scores = {row.label: row.cells[shots].score for row in table.blocks[0].rows if row.control is None}
    *first, last = axes
    rows = [
        row
        for row in itertools.product(*(axes[axis] for axis in first))
        if any((*row, column) in labels for column in axes[last])
    ]
    held = [[scores[label] if (label := labels.get((*row, column))) else None for column in axes[last]] for row in rows]
    return Grid(
        shots=shots,
        row_axes=first,
        column_axis=last,
        rows=rows,
        columns=list(axes[last]),
        means=[[cell.mean if cell else None for cell in row] for row in held],
        ses=[[cell.se if cell else None for cell in row] for row in held],
    )
