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
from typing import TYPE_CHECKING, Any

import numpy as np

from ablations.statistics import Difference, Estimate, Scores, average_tasks, clustered_mean, difference, paired_estimate
from benchmarks.report import Row
from benchmarks.sparq_probe import Method
from configs.errors import UserError
from eval.results import score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


@dataclass
class Panel:
    """A cell's lines, family -> points: `nats` less dense attention's, `agreement` with its answers in per cent. control: nats of
    recall without anything to recall."""

    title: str
    nats: dict[str, list[Point]]
    agreement: dict[str, list[Point]]
    control: float | None = None


def family(method: str) -> str | None:
    """The line a method stands on; None for dense attention and the controls."""
    first = method.split()[0]
    if first == "sparq":
        return "answer" if "answer only" in method else "plain" if "no mean" in method else "sparq"
    if first == "local":
        return "sinks" if "sinks" in method else "local"
    return first if first in FAMILIES else None


def panels(folder: Path) -> Iterator[Panel]:
    """Of a plan's folder: of each probe the cell with the most shots, its tasks averaged."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    groups: dict[tuple[bool, int], list[tuple[str, Mapping[str, Records]]]] = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        if path.name != "runs.jsonl":
            task, count, *more = path.name.removesuffix(".jsonl").split(".")
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            groups[bool(more), int(count)].append((task, by_method(lines)))
    for recall in (False, True):
        most = max((shots for probe, shots in groups if probe == recall), default=None)
        if most is not None:
            yield _panel(about["run"], recall, most, groups[recall, most])


def _panel(run: str, recall: bool, shots: int, members: Sequence[tuple[str, Mapping[str, Records]]]) -> Panel:
    named = members[0][0] if len(members) == 1 else f"{len(members)} tasks"
    panel = Panel(f"{run}: {'recall' if recall else named}, {shots} shots", defaultdict(list), defaultdict(list))
    for method in members[0][1]:
        if not all(len(found.get(method, [])) == len(found["dense"]) for _, found in members):
            continue  # still under way
        nats, same = [], []
        for task, found in members:
            mine, dense = found[method], found["dense"]
            nats.append(paired_estimate(*(values(records, task, "nats", ("", "")) for records in (mine, dense))))
            alike = [100.0 * (a["prediction"] == b["prediction"]) for a, b in zip(mine, dense, strict=True)]
            same.append(clustered_mean(alike, [record["cluster"] for record in mine]))
        moved = float(np.mean([np.mean([record["moved"] for record in found[method]]) for _, found in members]))
        line = family(method)
        if line is not None:
            panel.nats[line].append(Point(moved, *interval(average_tasks(nats))))
            panel.agreement[line].append(Point(moved, *interval(average_tasks(same))))
        elif method == "absent":
            panel.control = interval(average_tasks(nats))[0]
    return panel


def draw(folders: Sequence[Path], path: Path) -> Path:
    """A column a cell: log-probability above, agreement below; a line a method. Raises UserError if nothing is kept."""
    from ablations.plots import MUTED, style

    plans = [plan for folder in folders for plan in sorted(folder.glob("*/about.json"))]
    drawn = [panel for plan in plans for panel in panels(plan.parent)]
    if not drawn:
        raise UserError(f"{', '.join(map(str, folders))}: nothing is kept to draw. Run without --plot first.")
    with style() as plt:
        size = (1.2 + 4.1 * len(drawn), 7.2)
        figure, axes = plt.subplots(2, len(drawn), figsize=size, squeeze=False, layout="constrained")
        for panel, above, below in zip(drawn, *axes, strict=True):
            above.set_title(panel.title, fontsize=10)
            above.axhline(0, color=MUTED, linewidth=1)
            if panel.control is not None:
                above.axhline(panel.control, color=MUTED, linewidth=1, linestyle=":")
                where = above.get_yaxis_transform()
                above.text(
                    0.99, panel.control, "nothing to recall", ha="right", va="bottom", fontsize=8, color=MUTED, transform=where
                )
            _lines(above, panel.nats)
            _lines(below, panel.agreement)
            below.set_ylim(0, 104)
            below.set_xlabel("elements moved a step, of dense attention's")
        axes[0][0].set_ylabel("log-probability of the reference,\nnats a token, less dense attention's")
        axes[1][0].set_ylabel("answers that are dense attention's,\nper cent")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Software": None})
        plt.close(figure)
    return path


def _lines(axis: Axes, lines: Mapping[str, list[Point]]) -> None:
    from ablations.plots import COLOURS

    for name, (label, colour, marker) in FAMILIES.items():
        points = sorted(lines.get(name, []), key=lambda point: point.moved)
        x, y = [p.moved for p in points], np.array([p.value for p in points])
        error = np.array([[p.value - p.low for p in points], [p.high - p.value for p in points]])
        style: dict[str, Any] = {
            "linestyle": "--" if name in ("oracle", "plain") else "-",
            "linewidth": 1.5,
            "elinewidth": 1,
            "capsize": 2,
        }
        if points:
            axis.errorbar(x, y, error, color=COLOURS[colour], marker=marker, markersize=5, label=label, **style)
    moved = [point.moved for points in lines.values() for point in points]
    axis.set_xscale("log", base=2)
    ticks = [2.0**-power for power in range(6) if min(moved) < 1.2 / 2**power]
    axis.set_xticks(ticks, [f"1/{round(1 / tick)}" if tick < 1 else "1" for tick in ticks])
    axis.set_xlim(min(moved) / 1.15, 1.08)
    axis.minorticks_off()
