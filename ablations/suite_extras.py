"""What some suites have beside few-shot scores: TextCore, and the held-out losses of a grid of learning rates."""

from __future__ import annotations

from dataclasses import dataclass

from ablations.law import Law


@dataclass(frozen=True)
class TextcoreCell:
    """Mean of the eight tasks in points, over training seeds. `se`: item-level error and, with several seeds, theirs; None
    where there is none. `difference` to the baseline: unpaired, lm-eval keeps no items; with its standard error."""

    mean: float
    se: float | None
    seeds: list[int]
    difference: float | None = None
    difference_se: float | None = None


@dataclass
class Textcore:
    """`cells[label][shots]`; labels without finished TextCore are not there. `tasks[label][task][shots]` likewise."""

    shots: list[int]
    cells: dict[str, dict[int, TextcoreCell]]
    tasks: dict[str, dict[str, dict[int, TextcoreCell]]]


@dataclass(frozen=True)
class LossCell:
    """Held-out loss in nats a token: mean over seeds, its standard error over seeds (None with one)."""

    mean: float
    se: float | None
    seeds: list[int]


@dataclass
class LawGrid:
    """`losses[size][rate]`, by the suite's labels. `law`: fitted, None where it cannot be; `reason`: then why."""

    size_axis: str
    rate_axis: str
    sizes: list[str]
    rates: list[str]
    losses: dict[str, dict[str, LossCell]]
    law: Law | None
    reason: str | None
