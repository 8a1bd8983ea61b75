"""Fair comparison: what all cells of a suite consume alike, before training (steps) and after it (marks).

    tokens, images, flops    steps = baseline's steps x (a baseline's step holds) / (this cell's step holds)
    steps                    as configured

A step of another packing, mixture or number of image tokens holds other amounts (cost.py measures it on the corpus), so
equal steps are not equal data. Within half a per cent the steps stay as they are. The warm-up keeps its share of the steps.

What a run really consumed stands in its run.json; `mismatch` compares that, and rows that are more than a per cent off are
marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ablations.suites.cost import cost_of
from ablations.suites.suite import PlannedCell, SuiteConfig
from configs.errors import UserError
from mm1.config import TrainConfig

LEFT_ALONE = 0.005
WITHIN = 0.01
COUNTERS = {"tokens": "tokens_seen", "images": "images_seen", "flops": "flops", "steps": "steps"}
"""What a suite matches -> the counter of run.json."""


def per_step(config: TrainConfig, matching: str) -> float:
    """Tokens, images or FLOPs of one optimiser step on average."""
    if matching == "steps":
        return 1.0
    return float(getattr(cost_of(config), matching)) / config.train.steps


def match(suite: SuiteConfig, cells: Sequence[PlannedCell]) -> list[PlannedCell]:
    """The cells with as many steps as the suite's matching gives them.

    Raises UserError where a cell consumes nothing of what is matched (images, without any in its data).
    """
    if suite.matching == "steps":
        return list(cells)
    base = next(cell for cell in cells if cell.baseline).config
    wanted = per_step(base, suite.matching) * base.train.steps
    warmup = base.optim.warmup_steps / base.train.steps
    steps: dict[str, int] = {}
    for cell in cells:
        if cell.label not in steps:
            rate = per_step(cell.config, suite.matching)
            if rate == 0 or wanted == 0:
                empty = cell.label if rate == 0 else "the baseline"
                raise UserError(
                    f"suite {suite.name}: matching={suite.matching}, but {empty} has none in its data. "
                    "Match tokens or steps instead."
                )
            own = cell.config.train.steps
            steps[cell.label] = own if abs(rate * own / wanted - 1) < LEFT_ALONE else max(2, round(wanted / rate))
    matched = []
    for cell in cells:
        number = steps[cell.label]
        same = number == cell.config.train.steps
        matched.append(cell if same else cell.with_steps(number, min(number - 1, round(number * warmup))))
    return matched


def mismatch(matching: str, baseline: Mapping[str, Any], run: Mapping[str, Any], within: float = WITHIN) -> str | None:
    """How far a finished run is from the baseline's in what the suite matches, by their run.json: "tokens +3.1 %", or None."""
    counter = COUNTERS[matching]
    wanted, got = float(baseline.get(counter, 0)), float(run.get(counter, 0))
    if wanted == got:
        return None
    if wanted == 0:
        return f"{matching} {got:g}, the baseline none"
    return None if abs(got / wanted - 1) <= within + 1e-9 else f"{matching} {100 * (got / wanted - 1):+.1f} %"


def marks(matching: str, runs: Iterable[tuple[str, int, bool, Mapping[str, Any]]], within: float = WITHIN) -> dict[str, str]:
    """label -> mismatch of the rows that must be marked; `runs`: (label, seed, is the baseline's, its run.json).

    Each is compared with the baseline of its own seed, or of any where that one is not there yet.
    """
    runs = list(runs)
    bases = {seed: info for _, seed, baseline, info in runs if baseline}
    found: dict[str, str] = {}
    for label, seed, _, info in runs:
        base = bases.get(seed) or next(iter(bases.values()), None)
        if base is not None and (text := mismatch(matching, base, info, within)):
            found.setdefault(label, text)
    return found
