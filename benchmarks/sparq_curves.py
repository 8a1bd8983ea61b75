"""From kept answers to rows and to the picture: paired differences to dense attention, against the bytes a step moves.

Every difference is paired by item, with CR2 errors clustered by image and t intervals of 95 %; a mean
over tasks weighs them equally (ablations/statistics.py).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ablations.statistics import Difference, Estimate, Scores, average_tasks, difference, paired_estimate
from benchmarks.report import Row
from benchmarks.sparq_probe import Method
from configs.errors import UserError
from eval.results import score

Records = Sequence[Mapping[str, Any]]
Kinds = Mapping[str, tuple[str, str]]
"""Task -> its kind and metric."""
LEAST_GAIN = 0.05
"""Nats a token; of less there are no shares worth giving."""
FAMILIES = {
    "sparq": ("SparQ, question and answer", 0, "o"),
    "plain": ("the same without the mean value (step 5)", 5, "o"),
    "answer": ("SparQ, answer only", 2, "D"),
    "oracle": ("exact scores of all keys", 6, "^"),
    "h2o": ("H2O", 1, "s"),
    "local": ("latest tokens", 3, "v"),
    "sinks": ("latest tokens and 4 sinks", 4, "P"),
}


@dataclass(frozen=True)
class Cell:
    run: str
    task: str
    shots: int
    probe: str = "task"

    @property
    def file(self) -> str:
        return f"{self.task}.{self.shots}{'.recall' if self.probe == 'recall' else ''}.jsonl"

    @property
    def title(self) -> str:
        return f"{self.run}: {self.task}{', recall' if self.probe == 'recall' else ''}, {self.shots} shots"


@dataclass
class ScoreRow(Row):
    """ours, peer: scores of the method and of dense attention; limit: those of exact scores with the same k. moved: elements of
    a step relative to dense. points, nats: the differences to dense in points and in nats a token of the reference, with their
    intervals; agreement: per cent of answers that are dense attention's, word for word; kept: of recall's gain, per cent."""

    moved: float
    points: tuple[float, float, float]
    nats: tuple[float, float, float]
    agreement: float
    kept: float | None
    items: int


@dataclass
class RunRow(Row):
    """ours, peer: items a second of a whole run with SparQ and of a dense one."""

    points: tuple[float, float, float]
    agreement: float
    items: int


def values(records: Records, task: str, of: str, kind: tuple[str, str]) -> Scores:
    """of: `points` or `nats`."""
    ids = tuple(str(record["id"]) for record in records)
    clusters = tuple(str(record["cluster"]) for record in records)
    found = [r["logprob"] for r in records] if of == "nats" else score(*kind, [dict(record) for record in records])
    return Scores(task, ids, np.asarray(found, np.float64), clusters)


def interval(estimate: Estimate) -> tuple[float, float, float]:
    """(difference, low, high), rounded."""
    d: Difference = difference(estimate.mean, *estimate.error)
    return round(d.value, 4), round(d.low, 4), round(d.high, 4)


def by_method(records: Records) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        found[record["method"]].append(record)
    for one in found.values():
        one.sort(key=lambda record: record["id"])
    return found


def score_rows(cells: Mapping[Cell, Records], kinds: Kinds, methods: Sequence[Method]) -> Iterator[ScoreRow]:
    """A row for each method of each cell, and for their mean where several tasks have one probe and number of shots."""
    groups: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.probe, cell.shots].append(cell)
    for (probe, shots), members in groups.items():
        found = {cell: by_method(cells[cell]) for cell in members}
        whole = [([cell], f"{cell.task}{' recall' if probe == 'recall' else ''}@{shots}") for cell in members]
        for some, name in whole if len(members) == 1 else [*whole, (members, f"mean@{shots}")]:
            for method in methods:
                if all(method.name in found[cell] for cell in some):
                    exact = next((m for m in methods if m.family == "oracle" and m.k == method.k), None)
                    yield _row(name, {cell: found[cell] for cell in some}, method, exact, kinds)


def _row(name: str, cells: Mapping[Cell, Mapping[str, Records]], method: Method, exact: Method | None, kinds: Kinds) -> ScoreRow:
    mine, dense, bound, alike, moved, kept = [], [], [], [], [], []
    deltas: dict[str, list[Estimate]] = {"points": [], "nats": []}
    for cell, found in cells.items():
        kind = kinds[cell.task]
        for of, into in deltas.items():
            pair = [values(found[m], cell.task, of, kind) for m in (method.name, "dense")]
            into.append(paired_estimate(*pair))
            if of == "points":
                mine.append(float(pair[0].scores.mean()))
                dense.append(float(pair[1].scores.mean()))
                bound.append(float(values(found[exact.name], cell.task, of, kind).scores.mean()) if exact else math.nan)
        alike += [a["prediction"] == b["prediction"] for a, b in zip(found[method.name], found["dense"], strict=True)]
        moved.append(float(np.mean([record["moved"] for record in found[method.name]])))
        if "absent" in found:
            ours, full, none = (np.mean([r["logprob"] for r in found[m]]) for m in (method.name, "dense", "absent"))
            if full - none > LEAST_GAIN:
                kept.append(100 * float((ours - none) / (full - none)))
    ours, peer = float(np.mean(mine)), float(np.mean(dense))
    best = float(np.mean(bound))
    return ScoreRow(
        case=f"{name} {method.name}",
        ours=ours,
        peer=peer,
        ratio=ours / peer if peer else 0.0,
        limit=peer if math.isnan(best) else best,
        unit="points",
        peer_name="dense attention",
        limit_name="dense attention" if math.isnan(best) else f"exact scores, k {method.k}",
        moved=round(float(np.mean(moved)), 4),
        points=interval(average_tasks(deltas["points"])),
        nats=interval(average_tasks(deltas["nats"])),
        agreement=round(100 * float(np.mean(alike)), 1),
        kept=round(float(np.mean(kept)), 1) if kept else None,
        items=len(alike),
    )


def run_rows(run: str, records: Records, kinds: Kinds, shots: Sequence[int]) -> Iterator[RunRow]:
    """Whole runs against the dense one of the same cell."""
    found = {(r["task"], r["shots"], r["method"]): r for r in records}
    for (task, count, name), one in found.items():
        dense = found.get((task, count, "dense"))
        if name == "dense" or dense is None or task not in kinds or count not in shots:
            continue
        pair = [values(r["records"], task, "points", kinds[task]) for r in (one, dense)]
        same = [a["prediction"] == b["prediction"] for a, b in zip(one["records"], dense["records"], strict=True)]
        mine, peer = (len(r["records"]) / r["seconds"] for r in (one, dense))
        points = interval(paired_estimate(*pair))
        case = f"run {task}@{count} {name}"
        yield RunRow(
            case,
            mine,
            peer,
            mine / peer,
            peer,
            "items/s",
            "eval.fewshot, dense",
            "dense",
            points,
            100 * float(np.mean(same)),
            len(same),
        )


# -------------------------------------------------------------------------------------------------------------- picture


@dataclass(frozen=True)
class Point:
    moved: float
    value: float
    low: float
    high: float


def family(method: str) -> str | None:
    """The line a method stands on; None for dense attention and the control."""
    first = method.split()[0]
    if first == "sparq":
        return "answer" if "answer only" in method else "plain" if "no mean" in method else "sparq"
    if first == "local":
        return "sinks" if "sinks" in method else "local"
    return first if first in FAMILIES else None


def panels(folder: Path) -> Iterator[tuple[str, dict[str, list[Point]], float | None]]:
    """(title, lines of points in nats, recall's control) of each cell kept in a plan's folder, few-shot tasks averaged."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    groups: dict[tuple[str, int], list[tuple[str, dict[str, list[Mapping[str, Any]]]]]] = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        if path.name == "runs.jsonl":
            continue
        task, count, *more = path.name.removesuffix(".jsonl").split(".")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        groups["recall" if more else "task", int(count)].append((task, by_method(lines)))
    for (probe, shots), members in sorted(groups.items(), key=lambda pair: (pair[0][0] == "recall", pair[0][1])):
        named = members[0][0] if len(members) == 1 else f"{len(members)} tasks"
        title = f"{about['run']}: {'a caption to find' if probe == 'recall' else named}, {shots} shots"
        curves: dict[str, list[Point]] = defaultdict(list)
        control = None
        for method in members[0][1]:
            if not all(len(found.get(method, [])) == len(found["dense"]) for _, found in members):
                continue  # still under way
            pairs = [[values(f[m], task, "nats", ("", "")) for m in (method, "dense")] for task, f in members]
            value = interval(average_tasks([paired_estimate(*pair) for pair in pairs]))
            moved = float(np.mean([np.mean([r["moved"] for r in found[method]]) for _, found in members]))
            line = family(method)
            if line is not None:
                curves[line].append(Point(moved, *value))
            elif method == "absent":
                control = value[0]
        yield title, curves, control


def draw(folders: Sequence[Path], path: Path) -> Path:
    """A panel a cell, a line a method. Raises UserError if nothing is kept."""
    from ablations.plots import COLOURS, MUTED, style

    plans = [plan for folder in folders for plan in sorted(folder.glob("*/about.json"))]
    drawn = [panel for plan in plans for panel in panels(plan.parent)]
    if not drawn:
        raise UserError(f"{', '.join(map(str, folders))}: nothing is kept to draw. Run without --plot first.")
    with style() as plt:
        columns = min(3, len(drawn))
        rows = -(-len(drawn) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.5 * rows + 0.7), squeeze=False, layout="constrained")
        for axis in axes.flat[len(drawn) :]:
            axis.remove()
        for axis, (title, lines, control) in zip(axes.flat, drawn, strict=False):
            axis.axhline(0, color=MUTED, linewidth=1)
            if control is not None:
                axis.axhline(control, color=MUTED, linewidth=1, linestyle=":")
                axis.text(
                    0.99,
                    control,
                    "without the find",
                    ha="right",
                    va="bottom",
                    fontsize=8,
                    color=MUTED,
                    transform=axis.get_yaxis_transform(),
                )
            for name, (label, colour, marker) in FAMILIES.items():
                points = sorted(lines.get(name, []), key=lambda point: point.moved)
                if not points:
                    continue
                y = np.array([p.value for p in points])
                error = np.array([[p.value - p.low for p in points], [p.high - p.value for p in points]])
                axis.errorbar(
                    [p.moved for p in points],
                    y,
                    error,
                    color=COLOURS[colour],
                    marker=marker,
                    markersize=5,
                    linewidth=1.5,
                    elinewidth=1,
                    capsize=2,
                    label=label,
                    linestyle="--" if name == "oracle" else "-",
                )
            axis.set_title(title, fontsize=9.5)
            axis.set_xscale("log", base=2)
            ticks = [
                t for t in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1) if any(p.moved < 1.3 * t for line in lines.values() for p in line)
            ]
            axis.set_xticks(ticks, [f"1/{round(1 / t)}" if t < 1 else "1" for t in ticks])
            axis.minorticks_off()
        for row in axes:
            row[0].set_ylabel("log-probability of the reference,\nnats a token, less dense attention's")
        for axis in axes[-1]:
            axis.set_xlabel("elements moved a step, of dense attention's")
        handles, labels = max(
            (axis.get_legend_handles_labels() for axis in axes.flat if axis.figure), key=lambda found: len(found[0])
        )
        figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Software": None})
        plt.close(figure)
    return path
