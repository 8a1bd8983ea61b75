"""The figures of scores: bars or lines of every variant (MM1's Figures 4 and 5), and cost against score.

    one axis            x: its variants, a shade a number of shots
    several axes        a panel a number of shots; x: the other axes' variants, a colour a variant of the first one (Figure 4)
    an ordered axis     lines over it, where its variants are rising or falling numbers such as ratios or rates (Figure 5)

Every figure takes one block of the table (the mean over tasks, or a task) and draws all of its rows.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ablations.report.svg import (
    CHARACTER,
    Panel,
    brief,
    colour,
    figure,
    linear,
    log_ticks,
    logarithmic,
    padded,
    padded_log,
    shade,
    shortened,
    slot_margin,
    ticks,
)
from ablations.statistics import t_quantile
from ablations.tables.cells import Block, Cell, Row
from data_pipelines.html_text import safe

MANY = 40
"""Variants from which on a figure is folded up until the reader opens it."""


@dataclass(frozen=True)
class Layout:
    """What the figures need of a suite beside its scores. `axes`: axis -> variants; `choices`: label -> axis -> variant."""

    axes: Mapping[str, Sequence[str]]
    choices: Mapping[str, Mapping[str, str]]
    shots: Sequence[int]

    def variant(self, label: str, axis: str) -> str:
        return self.choices.get(label, {}).get(axis, label)

    @property
    def ordered(self) -> str | None:
        """The ordered axis with the most variants, at least three of them."""
        found = [axis for axis, names in self.axes.items() if len(names) > 2 and in_order(names)]
        return max(found, key=lambda axis: len(self.axes[axis]), default=None)

    def others(self, axis: str | None) -> list[str]:
        """The axes that vary, but for this one."""
        return [name for name, variants in self.axes.items() if name != axis and len(variants) > 1]

    def rest(self, label: str, axis: str | None) -> tuple[str, ...]:
        """A variant's place on all axes but this one."""
        return tuple(self.variant(label, name) for name in self.others(axis))

    def ranked(self, places: Iterable[tuple[str, ...]], axis: str | None) -> list[tuple[str, ...]]:
        """Places on all axes but this one, in the axes' order."""
        names = [list(self.axes[name]) for name in self.others(axis)]
        return sorted(
            places, key=lambda place: [own.index(v) if v in own else len(own) for own, v in zip(names, place, strict=True)]
        )


def in_order(names: Sequence[str]) -> bool:
    """Whether the numbers that the names begin with rise or fall: '1e-4', '3.2M', '67-33'."""
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}
    found = [re.match(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)([kMBG])?(?![\w.])", name) for name in names]
    values = [float(m[1]) * scale.get(m[2] or "", 1) for m in found if m]
    steps = {a < b for a, b in itertools.pairwise(values) if a != b}
    return len(values) == len(names) and len(set(values)) == len(values) and len(steps) == 1


def half_width(cell: Cell) -> float:
    """Of the score's 95 % interval; 0 where the error is not known."""
    return 0.0 if math.isnan(cell.score.se) else t_quantile(0.975, cell.score.df) * cell.score.se


def said(row: Row, shots: int) -> str:
    """What a mark tells under the pointer."""
    score = row.cells[shots].score
    return f"{row.label}, {shots}-shot: {score.mean:.1f}" + ("" if math.isnan(score.se) else f" ± {score.se:.1f}")


def scores(block: Block, layout: Layout) -> str:
    """Bars, or lines where an axis is ordered."""
    rows = [row for row in block.rows if row.control is None]
    closed = f"Show the scores of {len(rows)} variants" if len(rows) > MANY else ""
    chance = "" if block.chance is None else " Dashed: chance."
    control = " Notches: the score with images shuffled or left out." if any(row.control for row in block.rows) else ""
    if axis := layout.ordered:
        caption = f"Score in points over {safe(axis)}, with 95 % intervals.{chance}"
        return figure(caption, *_lines(block, rows, layout, axis), closed=closed, kind="lines")
    return figure(
        f"Score in points with 95 % intervals.{chance}{control}", *_bars(block, rows, layout), closed=closed, kind="bars"
    )


Drawn = tuple[list[Panel], list[tuple[str, str, float]]]
Place = Callable[[float], float]
Box = tuple[float, float, float, float]
"""left, top, right, bottom"""


def _bars(block: Block, rows: Sequence[Row], layout: Layout) -> Drawn:
    varied = layout.others(None)
    shots = layout.shots
    high = max([row.cells[k].score.mean + half_width(row.cells[k]) for row in rows for k in shots] + [block.chance or 0, 1e-3])
    controls = {row.label: row for row in block.rows if row.control}
    if len(varied) < 2:
        names = [(layout.variant(row.label, varied[0]) if varied else row.label,) for row in rows]
        panel, place, y, slot = _slots("", names, len(shots), high * 1.04, block)
        for i, row in enumerate(rows):
            for j, k in enumerate(shots):
                width = slot * 0.84 / len(shots)
                x = place(i) - slot * 0.42 + j * width
                _bar(panel, row, k, x, width, y, "fill mark main", shade(j, len(shots)), controls)
        return [panel], [(f"{k}-shot", "main", shade(j, len(shots))) for j, k in enumerate(shots)]
    first, rest = varied[0], layout.ranked({layout.rest(row.label, varied[0]) for row in rows}, varied[0])
    kinds = list(dict.fromkeys(layout.variant(row.label, first) for row in rows))
    kinds.sort(key=lambda kind: list(layout.axes[first]).index(kind) if kind in layout.axes[first] else len(kinds))
    panels = []
    for k in shots:
        panel, place, y, slot = _slots(f"{k}-shot", rest, len(kinds), high * 1.04, block)
        for row in rows:
            kind = kinds.index(layout.variant(row.label, first))
            width = slot * 0.84 / len(kinds)
            x = place(rest.index(layout.rest(row.label, first))) - slot * 0.42 + kind * width
            _bar(panel, row, k, x, width, y, f"fill mark {colour(kind)}", 1.0, controls)
        panels.append(panel)
    return panels, [(kind, colour(i), 1.0) for i, kind in enumerate(kinds)]


def _slots(title: str, names: Sequence[Sequence[str]], bars: int, high: float, block: Block) -> tuple[Panel, Place, Place, float]:
    """(panel, x of a slot's middle, y of a score, a slot's width)."""
    width = max(366 if title else 440, 50 + len(names) * max(24, 15 * bars))
    slot = (width - 50) / len(names)
    below = slot_margin(names, slot)
    left = 40 if below < 60 else 74  # the first of turned names reaches to the left
    panel = Panel(title, width + left - 40, 200 + below, left=left, bottom=below + 6, top=26 if title else 10)
    y = linear(0, high, panel.y0, panel.y1)
    panel.y_axis(ticks(0, high), y)

    def place(i: float) -> float:
        return panel.x0 + (i + 0.5) * slot

    panel.slots(names, place, slot)
    if block.chance is not None:
        panel.line(panel.x0, y(block.chance), panel.x1, y(block.chance), "chance")
    return panel, place, y, slot


def _bar(
    panel: Panel, row: Row, k: int, x: float, width: float, y: Place, classes: str, opacity: float, controls: Mapping[str, Row]
) -> None:
    cell = row.cells[k]
    top, half, middle = y(max(0.0, cell.score.mean)), half_width(cell), x + width / 2
    panel.rect(x + 0.5, top, width - 1, y(0) - top, classes, said(row, k), opacity)
    if half:
        panel.line(middle, y(max(0.0, cell.score.mean - half)), middle, y(cell.score.mean + half), "whisker")
    if row.label in controls and k in controls[row.label].cells:
        low = y(controls[row.label].cells[k].score.mean)
        panel.line(x, low, x + width, low, "notch")


def _lines(block: Block, rows: Sequence[Row], layout: Layout, axis: str) -> Drawn:
    names = [name for name in layout.axes[axis] if any(layout.variant(row.label, axis) == name for row in rows)]
    shots = layout.shots
    spread = [row.cells[k].score.mean + s * half_width(row.cells[k]) for row in rows for k in shots for s in (-1, 1)]
    low, high = padded([*spread, *([] if block.chance is None else [block.chance])])
    low = max(0.0, low)  # no score is below it, though an interval may be
    series = layout.ranked({layout.rest(row.label, axis) for row in rows}, axis)
    width = 366 if len(series) > 1 else 440
    slot = (width - 50) / len(names)
    labels = [(name,) for name in names]

    def start(title: str) -> Panel:
        below = slot_margin(labels, slot)
        panel = Panel(title, width=width, height=210 + below, bottom=below + 6, top=26 if title else 10)
        y = linear(low, high, panel.y0, panel.y1)
        panel.y_axis(ticks(low, high), y)
        panel.slots(labels, lambda i: panel.x0 + (i + 0.5) * slot, slot)
        if block.chance is not None:
            panel.line(panel.x0, y(block.chance), panel.x1, y(block.chance), "chance")
        return panel

    def draw(panel: Panel, own: Sequence[Row], k: int, kind: str, offset: float) -> None:
        y = linear(low, high, panel.y0, panel.y1)
        ranked = sorted(own, key=lambda row: names.index(layout.variant(row.label, axis)))
        points = []
        for row in ranked:
            cell, half = row.cells[k], half_width(row.cells[k])
            x = panel.x0 + (names.index(layout.variant(row.label, axis)) + 0.5) * slot + offset
            points.append((x, y(cell.score.mean)))
            panel.line(x, y(max(low, cell.score.mean - half)), x, y(cell.score.mean + half), f"stroke soft {kind}")
        panel.path(points, f"curve {kind}")
        for row, (x, height) in zip(ranked, points, strict=True):
            panel.circle(x, height, 3.5, f"fill mark {kind}", said(row, k))

    if len(series) == 1:
        panel = start("")
        for j, k in enumerate(shots):
            draw(panel, rows, k, colour(j), (j - (len(shots) - 1) / 2) * 4)
        return [panel], [(f"{k}-shot", colour(j), 1.0) for j, k in enumerate(shots)]
    panels = []
    for k in shots:
        panel = start(f"{k}-shot")
        for number, name in enumerate(series):
            own = [row for row in rows if layout.rest(row.label, axis) == name]
            draw(panel, own, k, colour(number), (number - (len(series) - 1) / 2) * 3)
        panels.append(panel)
    return panels, [(" ".join(name), colour(i), 1.0) for i, name in enumerate(series)]


# ----------------------------------------------------------------------------------------------------------------- cost


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (cost, score) no other point beats: none has its score at a lower cost, or a higher one at the same. By cost."""
    best, kept = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            kept.append(i)
            best = points[i][1]
    return kept


def cost(block: Block, shots: Sequence[int], costs: Mapping[str, float], unit: str, baseline: str) -> list[Panel]:
    """Cost (log) and score, a panel a number of shots; names on the Pareto front and on the baseline."""
    rows = [row for row in block.rows if row.control is None and costs.get(row.label, 0) > 0]
    if not rows:
        return []
    xs = padded_log([costs[row.label] for row in rows], 0.14)
    low, high = padded([row.cells[k].score.mean for row in rows for k in shots], 0.12)
    panels = []
    for k in shots:
        panel = Panel(f"{k}-shot", width=366, height=250, bottom=40)
        x, y = logarithmic(*xs, panel.x0, panel.x1), linear(low, high, panel.y0, panel.y1)
        panel.y_axis(ticks(low, high), y)
        narrow = xs[1] / xs[0] < 8
        panel.x_axis(ticks(*xs, 4) if narrow else log_ticks(*xs), x, unit)
        points = [(costs[row.label], row.cells[k].score.mean) for row in rows]
        front = pareto(points)
        panel.path([(x(points[i][0]), y(points[i][1])) for i in front], "front")
        places = [(x(a), y(b)) for a, b in points]
        for i, row in enumerate(rows):
            kind = "best" if i in front else "other"
            told = f"{said(row, k)}; {brief(points[i][0])} {unit}"
            panel.circle(*places[i], 4.5, f"dot mark {kind}" + (" base" if row.label == baseline else ""), told)
        taken: list[Box] = [(a - 5, b - 5, a + 5, b + 5) for a, b in places]
        named = dict.fromkeys([*(i for i, row in enumerate(rows) if row.label == baseline), *reversed(front)])
        for i in named:
            _name(panel, *places[i], rows[i].label, taken)
        panels.append(panel)
    return panels


def _name(panel: Panel, x: float, y: float, text: str, taken: list[Box]) -> None:
    """A point's name beside it where it covers no point and no other name; else it is left out (the pointer and the table tell
    it)."""
    text = shortened(text)
    width = len(text) * CHARACTER
    sides = [(x + 8, 4), (x - 8 - width, 4), (x - width / 2, -9), (x - width / 2, 17), (x + 6, 17), (x - 6 - width, -9)]
    for start, dy in sides:
        box = (start, y + dy - 9, start + width, y + dy + 2)
        inside = box[0] >= panel.x0 and box[2] <= panel.width and box[1] >= panel.y1 - 8 and box[3] <= panel.y0
        if inside and not any(box[0] < c and a < box[2] and box[1] < d and b < box[3] for a, b, c, d in taken):
            taken.append(box)
            panel.text(start, y + dy, text, "name", anchor="start")
            return
