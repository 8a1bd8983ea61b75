"""Per-item scores of a table's runs, read once: Answers by variant, task and number of shots, all items in one order.

    results/<evaluation>/TASK.SHOTS.jsonl -> ScoreReader -> Scores -> Answers (training seeds, demonstration seeds, items)

A thousand cells are nine thousand files of hundreds of lines, of which a table needs three fields. Runs that were evaluated on
one plan hold the same items in the same order, so after the first file of a task a line is only compared with its known
beginning (`{"id": ..., "cluster": ...,`) and its last field, the score, is read. Whatever deviates is parsed in full by
results.py, with its checks and messages; the number of items and their mean are compared with the summary either way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ablations import statistics as st
from ablations.results import MEAN_TOLERANCE, Evaluation, Run
from ablations.tables.selection import Selection, Variant
from configs.errors import UserError

Key = tuple[str, int]
"""(task, number of shots)."""


@dataclass
class Answers:
    """Scores of one variant on one task at one number of shots, in points, items in the baseline's order.

    `scores`: (training seeds, demonstration seeds, items); `clusters`: of the items; `seeds`: the training
    seeds of the first axis."""

    scores: np.ndarray
    clusters: st.Clusters
    seeds: tuple[int, ...]

    def of(self, seeds: Sequence[int]) -> Answers:
        """Those training seeds alone, in that order."""
        if tuple(seeds) == self.seeds:
            return self
        return Answers(self.scores[[self.seeds.index(seed) for seed in seeds]], self.clusters, tuple(seeds))

    @cached_property
    def shown(self) -> np.ndarray:
        """(demonstration seeds, items): averaged over training seeds."""
        return np.asarray(self.scores.mean(0))

    @cached_property
    def estimate(self) -> st.Estimate:
        """Of the per-item scores averaged over all seeds."""
        return st.clustered_mean(self.shown.mean(0), self.clusters)


@dataclass
class Collected:
    """All scores of a table. `drawn`: the demonstration seeds that every row has; `plain[label]`, `controls[label][kind]`."""

    tasks: list[str]
    shots: list[int]
    drawn: list[int]
    plain: dict[str, dict[Key, Answers]]
    controls: dict[str, dict[str, dict[Key, Answers]]] = field(default_factory=dict)


def collect(selection: Selection, shots: Sequence[int] = ()) -> Collected:
    """Raises UserError where an evaluation lacks a task or a number of shots, or where its items cannot be paired."""
    first = selection.variants[0].evaluations[0]
    tasks, numbers = list(first.tasks), list(shots) or first.shots
    if not numbers:
        raise UserError(
            f"{first.folder / 'summary.json'}: its tasks have no number of shots in common; say which with shots=[...]."
        )
    drawn, reader = demonstration_seeds(selection.variants), ScoreReader()
    _check(first, tasks, numbers)
    reference = {(t, k): reader.scores(first, t, k) for t in tasks for k in numbers}
    clusters = {key: st.Clusters.of(scores.clusters) for key, scores in reference.items()}

    def aligned(key: Key, e: Evaluation) -> np.ndarray:
        wanted, found = reference[key], reader.scores(e, *key)
        same = found.ids is wanted.ids and found.clusters is wanted.clusters
        return found.scores if same else st.align(wanted, found).scores

    def answers(evaluations: Sequence[Evaluation], runs: Sequence[Run]) -> dict[Key, Answers]:
        repeats = [[e.of_seed(seed) for seed in drawn] for e in evaluations]
        for e in (e for row in repeats for e in row):
            _check(e, tasks, numbers)
        seeds = tuple(run.seed for run in runs)
        return {
            key: Answers(np.array([[aligned(key, e) for e in row] for row in repeats]), clusters[key], seeds) for key in reference
        }

    plain = {v.label: answers(v.evaluations, v.runs) for v in selection.variants}
    controls = {
        v.label: {kind: answers(found, v.runs) for kind, found in v.controls.items()} for v in selection.variants if v.controls
    }
    return Collected(tasks, numbers, drawn, plain, controls)


def _check(evaluation: Evaluation, tasks: Sequence[str], numbers: Sequence[int]) -> None:
    lacking = [
        f"{t} at {k} shots" for t in tasks for k in numbers if t not in evaluation.tasks or k not in evaluation.tasks[t].shots
    ]
    if lacking or set(evaluation.tasks) != set(tasks):
        extra = sorted(set(evaluation.tasks) - set(tasks))
        what = f"lacks {', '.join(lacking)}" if lacking else f"has tasks that the baseline lacks: {', '.join(extra)}"
        raise UserError(
            f"{evaluation.folder / 'summary.json'} {what}. Ask for other shots=[...], or evaluate again: python -m eval.fewshot "
            f"run={evaluation.run_name}-{evaluation.run_hash[:8]} tasks=[{','.join(tasks)}] shots=[{','.join(map(str, numbers))}]"
        )


def demonstration_seeds(variants: Sequence[Variant]) -> list[int]:
    """The demonstration seeds that every row was evaluated with, controls too. Raises UserError if there is none."""
    evaluations = [e for v in variants for found in (v.evaluations, *v.controls.values()) for e in found]
    common = set.intersection(*(set(e.demonstration_seeds) for e in evaluations))
    if common:
        return sorted(common)
    listed = "\n".join(f"  {e.label}: {', '.join(map(str, e.demonstration_seeds))}" for e in evaluations)
    raise UserError(
        f"runs: these were evaluated with demonstrations of different seeds, so their items cannot be paired:\n{listed}\n"
        "Evaluate all of them with one: python -m eval.fewshot run=NAME demonstration_seed=..."
    )


# --------------------------------------------------------------------------------------------------------------- reading


@dataclass
class _Known:
    """What the items of a task look like: the beginnings of their lines, and the ids and clusters these hold."""

    beginnings: list[bytes]
    ids: tuple[str, ...]
    clusters: tuple[str, ...]


class ScoreReader:
    """`scores(evaluation, task, shots)`: the same as Evaluation.scores, quickly where the items are those of the file before."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def scores(self, evaluation: Evaluation, task: str, shots: int) -> st.Scores:
        """Raises UserError as Evaluation.scores."""
        known = self._known.get(task)
        values = _quickly(evaluation, task, shots, known) if known else None
        if known and values is not None:
            return st.Scores(task, known.ids, values, known.clusters)
        found = evaluation.scores(task, shots)
        if known and (found.ids, found.clusters) == (known.ids, known.clusters):
            return st.Scores(task, known.ids, found.scores, known.clusters)
        if known is None:
            # as eval/results.py writes a line
            texts = [
                json.dumps({"id": i, "cluster": c}, ensure_ascii=False) for i, c in zip(found.ids, found.clusters, strict=True)
            ]
            self._known[task] = _Known([text[:-1].encode() + b"," for text in texts], found.ids, found.clusters)
        return found


def _quickly(evaluation: Evaluation, task: str, shots: int, known: _Known) -> np.ndarray | None:
    """The scores in points of a file whose lines begin as known and end with the score; None where any does not.

    In a valid line `"score": 12.5}` at its very end can only be a field of the object itself: a string would go on with its
    closing quote, an inner object with a second brace.
    """
    try:
        lines = (evaluation.folder / f"{task}.{shots}.jsonl").read_bytes().split(b"\n")
    except OSError:
        return None
    summary = evaluation.tasks[task].shots[shots]
    if lines.pop() or len(lines) != summary.n or len(lines) != len(known.beginnings):
        return None
    if not all(map(bytes.startswith, lines, known.beginnings)):
        return None
    ends = b",".join([line[line.rfind(b'"score": ') + 9 :] for line in lines])
    if ends.count(b"}") != len(lines) or not ends.endswith(b"}"):
        return None
    try:
        # "12.5},0.0}" as a list of numbers; an end that is no number with its brace is no JSON either
        values = np.array(json.loads(b"[" + ends[:-1].replace(b"},", b",") + b"]"), np.float64)
    except (ValueError, TypeError):
        return None
    if values.shape != (len(lines),):
        return None
    return values if abs(math.fsum(values) / len(values) - summary.mean) <= MEAN_TOLERANCE else None
