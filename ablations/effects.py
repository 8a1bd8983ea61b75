"""What each axis of a suite does, over all settings of the other axes: main effects with 95 % intervals, and the mean score as a grid.

MM1 reads Figure 4 this way: the number of image tokens and the resolution matter more than the kind of connector.
"""

from __future__ import annotations

from dataclasses import dataclass

from ablations import statistics as st


@dataclass(frozen=True)
class Effect:
    """`variant` against `against`, the baseline's variant of `axis`: the paired difference averaged over the `pairs` settings
    of the other axes that have both; `p_holm`: Holm over all effects of one number of shots; `has_seeds`: the interval holds
    training-seed error."""

    axis: str
    variant: str
    against: str
    shots: int
    difference: st.Difference
    p_holm: float
    pairs: int
    has_seeds: bool


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
