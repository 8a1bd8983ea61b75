"""What some suites have beside few-shot scores: TextCore, and the held-out losses of a grid of learning rates."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ablations.law import Law, fit, held_out_loss, optima_of
from ablations.results import Run
from ablations.suites.record import SuiteCell
from configs.errors import UserError


@dataclass(frozen=True)
class TextcoreCell:
    """Points, mean over training seeds. `se`: item-level error and, with several seeds, SD over seeds / sqrt(seeds) added; None
    where lm-eval gives none. `difference`: to the baseline, unpaired, for lm-eval's results keep no items."""

    mean: float
    se: float | None
    seeds: list[int]
    difference: float | None = None
    difference_se: float | None = None


@dataclass
class Textcore:
    """`cells[label][shots]`: the mean of the eight tasks; `tasks[label][task][shots]`: each task. Labels without finished
    TextCore are not there, nor is the mean where a task is missing."""

    shots: list[int]
    cells: dict[str, dict[int, TextcoreCell]]
    tasks: dict[str, dict[str, dict[int, TextcoreCell]]]


def textcore_of(runs: Mapping[str, Sequence[Run]], overrides: Sequence[str], baseline: str) -> Textcore | None:
    """`runs`: label -> its finished runs; `overrides`: the suite's settings of eval.textcore. None where no run has results.

    Raises UserError for a damaged file, one of another run, and several that fit the settings.
    """
    from eval.textcore import textcore_mean

    cells: dict[str, dict[int, TextcoreCell]] = {}
    tasks: dict[str, dict[str, dict[int, TextcoreCell]]] = {}
    for label, members in runs.items():
        held = [(run.seed, content) for run in members if (content := _textcore(run, overrides)) is not None]
        for shots in sorted({int(shots) for _, content in held for task in content["tasks"].values() for shots in task}):
            means = [(seed, mean.mean, mean.se) for seed, content in held if (mean := textcore_mean(content, shots))]
            if means:
                cells.setdefault(label, {})[shots] = _over_seeds(means)
            for task in dict.fromkeys(task for _, content in held for task in content["tasks"]):
                found = [
                    (seed, float(cell["mean"]), cell["se"])
                    for seed, content in held
                    if (cell := content["tasks"].get(task, {}).get(str(shots)))
                ]
                if found:
                    tasks.setdefault(label, {}).setdefault(task, {})[shots] = _over_seeds(found)
    if not tasks:
        return None
    for own, base in [(cells[label], cells.get(baseline, {})) for label in cells if label != baseline]:
        _compare(own, base)
    for label in (label for label in tasks if label != baseline):
        for task, own in tasks[label].items():
            _compare(own, tasks.get(baseline, {}).get(task, {}))
    return Textcore(sorted({shots for row in tasks.values() for task in row.values() for shots in task}), cells, tasks)


def _compare(own: dict[int, TextcoreCell], base: Mapping[int, TextcoreCell]) -> None:
    for shots, cell in own.items():
        if (other := base.get(shots)) is not None:
            error = None if cell.se is None or other.se is None else math.hypot(cell.se, other.se)
            own[shots] = replace(cell, difference=cell.mean - other.mean, difference_se=error)


def _over_seeds(found: Sequence[tuple[int, float, float | None]]) -> TextcoreCell:
    """The items are the same for all seeds, so their error does not shrink with the number of seeds; the seeds' spread does."""
    mean, spread = mean_and_spread([value for _, value, _ in found])
    errors = [se for _, _, se in found if se is not None]
    items = math.sqrt(sum(se * se for se in errors) / len(errors)) if len(errors) == len(found) else None
    se = items if spread is None or items is None else math.hypot(items, spread)
    return TextcoreCell(mean, se, [seed for seed, _, _ in found])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, SD / sqrt(n)); None for the latter with one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _textcore(run: Run, overrides: Sequence[str]) -> dict[str, Any] | None:
    """The run's results file that fits the settings; None where there is none."""
    from eval.textcore import TEXTCORE_VERSION, TextcoreConfig

    plain = {f.name: f.default for f in fields(TextcoreConfig)}
    given = dict(override.partition("=")[::2] for override in overrides)
    wanted = {key: given.get(key, str(plain[key])) for key in ("limit", "seed", "dtype")}
    fitting = []
    for path in sorted((run.folder / "results" / "textcore").glob("*.json")):
        content = _read(path)
        said = {key: str(content.get(key)).replace("None", "null") for key in wanted}
        if content.get("version") == TEXTCORE_VERSION and said == {k: v.replace("None", "null") for k, v in wanted.items()}:
            if content["run"].get("hash") != run.hash:
                raise UserError(f"{path}: results of run {content['run'].get('hash')}, but they lie in the folder of {run.hash}.")
            fitting.append((path, content))
    if len(fitting) > 1:
        listed = ", ".join(f"{path.name} (lm-eval {content.get('lm_eval')})" for path, content in fitting)
        raise UserError(f"{fitting[0][0].parent}: several results fit the suite's settings: {listed}. Move all but one away.")
    return fitting[0][1] if fitting else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _ = content["tasks"].items(), content["run"].get("hash")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Delete it and evaluate again.") from error
    assert isinstance(content, dict)
    return content


# ------------------------------------------------------------------------------------------------------------------ law


@dataclass(frozen=True)
class LossCell:
    """Held-out loss in nats a token: mean over seeds, its standard error over seeds (None with one)."""

    mean: float
    se: float | None
    seeds: list[int]


@dataclass
class LawGrid:
    """`losses[size][rate]`, by the suite's labels; what is not trained is not there. `law`: fitted, None where it cannot be;
    `reason`: then why."""

    size_axis: str
    rate_axis: str
    sizes: list[str]
    rates: list[str]
    losses: dict[str, dict[str, LossCell]]
    law: Law | None
    reason: str | None


def law_grid(cells: Sequence[SuiteCell], axes: Mapping[str, Sequence[str]], size_axis: str, rate_axis: str) -> LawGrid:
    """From all trained cells, evaluated or not. Raises UserError for a damaged run.json."""
    values: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for cell in cells:
        if cell.trained:
            place = (cell.choice[size_axis], cell.choice[rate_axis])
            values.setdefault(place, []).append((cell.seed, held_out_loss(cell.run.info)))
    losses: dict[str, dict[str, LossCell]] = {}
    for (size, rate), found in values.items():
        found.sort()
        losses.setdefault(size, {})[rate] = LossCell(*mean_and_spread([loss for _, loss in found]), [seed for seed, _ in found])
    law, reason = None, None
    try:
        law = fit(optima_of(cells, size_axis, rate_axis))
    except UserError as error:
        reason = str(error)
    return LawGrid(size_axis, rate_axis, list(axes[size_axis]), list(axes[rate_axis]), losses, law, reason)
