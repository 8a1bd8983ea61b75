"""What a table is made of: blocks of rows of cells, and what each row cost. Filled by table.py, printed by render.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from ablations import statistics as st


@dataclass
class Cell:
    """A score in points. `difference` is to the baseline, a control's to its own run; `p_holm` is corrected within the block."""

    score: st.Combined
    difference: st.Difference | None = None
    difference_has_seeds: bool = False
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < 0.05


@dataclass
class Row:
    label: str
    control: str | None
    seeds: list[int]
    matched: bool
    cells: dict[int, Cell]


@dataclass
class Detectable:
    """Smallest true difference (points) found with power 0.8 at alpha 0.05: unpaired, and paired at the correlation seen."""

    unpaired: float
    paired: float
    correlation: float


@dataclass
class Block:
    """The mean over tasks (task None) or one task; rows with the baseline first."""

    task: str | None
    metric: str
    kind: str
    chance: float | None
    rows: list[Row]
    detectable: dict[int, Detectable]


@dataclass
class Resources:
    """What a variant is and took, per run (mean over its seeds). flops: total; seconds: wall time. `planned`: what a suite's plan
    said before training (tokens, images, flops, memory, ...); empty outside suites."""

    label: str
    seeds: list[int]
    parameters: dict[str, int]
    tokens: float
    loss_tokens: float
    images: float
    steps: float
    flops: float
    seconds: float
    mismatches: list[str]
    runs: list[str]
    planned: dict[str, float] = field(default_factory=dict)


@dataclass
class Table:
    scale: str
    corpus: str
    plan: str
    shots: list[int]
    blocks: list[Block]
    resources: list[Resources]
    notes: list[str]
