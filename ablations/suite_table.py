"""A suite's finished cells as one table: rows are the cells' labels in the suite's order, all seeds of a label one row.

    plan.json + cells/*.json (record.py) -> runs and the results folders that are the suite's -> Selection -> Table (table.py)
                                         -> effects of each axis (effects.py), TextCore and law (suite_extras.py)

Which results folder belongs to the suite says its record of evaluations, so other evaluations of the same run are never taken
for it. Cells and seeds that are not finished are left out and listed in `missing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ablations.cells import Table
from ablations.effects import Effects
from ablations.record import SuiteCell
from ablations.results import Run
from ablations.selection import Selection
from ablations.suite_extras import LawGrid, Textcore


@dataclass(frozen=True)
class SuiteRow:
    """One label. `cells`: one a seed, finished or not; `runs`: of those that are finished and evaluated, in the seeds' order;
    `paper`: points by number of shots; `mark`: how it differs from the baseline in what the suite matches, or None."""

    label: str
    choice: dict[str, str]
    cells: list[SuiteCell]
    runs: list[Run]
    paper: dict[int, float] = field(default_factory=dict)
    mark: str | None = None

    @property
    def finished_seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


@dataclass
class SuiteTable:
    """`rows`: the baseline's first, only those with a finished seed, the labels of `table.blocks[*].rows`. `axes`: axis -> its
    variants at this scale in the suite's order. `missing`: "avgpool.few.low.seed1: waiting". `effects`, `textcore`, `law`: None
    where the suite has no several axes, evaluates no TextCore, is no grid of learning rates."""

    name: str
    about: str
    scale: str
    matching: str
    axes: dict[str, list[str]]
    baseline: str
    table: Table
    rows: list[SuiteRow]
    selection: Selection
    missing: list[str]
    effects: Effects | None = None
    textcore: Textcore | None = None
    law: LawGrid | None = None

    def row(self, label: str) -> SuiteRow:
        """KeyError where no seed of that label is finished."""
        return {row.label: row for row in self.rows}[label]


def suite_table(
    suite: str,
    scale: str = "tiny",
    *,
    extra: Sequence[str] = (),
    folder: str | None = None,
    shots: Sequence[int] = (),
    evaluation: str | None = None,
    interval: str = "t",
    match_within: float = 0.01,
) -> SuiteTable:
    """The table of a suite that was started. `extra`: the overrides of all cells it was started with; `folder`: as given to
    ablations.run; `shots`, `evaluation`, `interval`, `match_within`: as in ablations.table.

    Raises UserError for an unknown suite, one that was never started, a folder of another suite, a baseline of which no seed is
    finished (naming the command that finishes it), damaged or half-written records and results, and results of other runs.
    """
    raise NotImplementedError
