"""The figures of training: loss curves, held-out loss, and the learning-rate law.

    metrics.jsonl of every seed -> at most 100 means of neighbouring steps -> smoothed (plots.smooth)
    run.json's validation       -> held-out loss, a mark a seed

A variant has a panel of its own: its seeds thin, their mean bold, the baseline's mean in grey for comparison. All panels of a
kind share their axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ablations.law import MM1, held_out_loss
from ablations.plots import LOSSES, logged, smooth
from ablations.report.figures import MANY, Layout, Place
from ablations.report.svg import (
    Panel,
    brief,
    colour,
    figure,
    label_margin,
    linear,
    log_ticks,
    logarithmic,
    padded,
    padded_log,
    shortened,
    ticks,
)
from ablations.tables.suite_extras import LawGrid, LossCell
from ablations.tables.suite_table import SuiteRow
from data_pipelines.html_text import safe
from mm1.run import Run as TrainingRun

POINTS, FEW_POINTS = 100, 40
"""Of a curve at most, of few and of many variants; a panel is 200 pixels wide."""

Curve = tuple[np.ndarray, np.ndarray]


@dataclass
class Training:
    """One variant's training. `curves`: kind of loss -> a smoothed curve (steps, nats a token) a seed; `held_out`: seed -> mean
    held-out loss; `unlogged`: runs without a curve. Losses that are not finite are left out of curves."""

    label: str
    curves: dict[str, list[Curve]] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    features_read: int = 0
    """Pictures of a frozen encoder, over all seeds, that came from the store; and those that were encoded."""
    features_computed: int = 0
    windows: list[tuple[float, float]] = field(default_factory=list)
    """Of logged steps with a frozen encoder: (share of the pictures read from the store, images a second); see frozen.py."""
    unlogged: list[str] = field(default_factory=list)

    def mean(self, kind: str) -> Curve | None:
        """Over the seeds, at the steps that all of them have."""
        found = self.curves.get(kind, [])
        if not found:
            return None
        steps = found[0][0]
        for other, _ in found[1:]:
            steps = np.intersect1d(steps, other)
        if not len(steps):
            return None
        return steps, np.mean([losses[np.searchsorted(own, steps)] for own, losses in found], axis=0)


def training_of(row: SuiteRow, points: int = POINTS) -> Training:
    """From metrics.jsonl and run.json of every run of the row, curves of at most `points` points. Raises UserError for damage."""
    made = Training(row.label)
    for run in row.runs:
        info = TrainingRun(run.folder).info
        if info.get("validation"):
            made.held_out[run.seed] = held_out_loss(info)
        made.features_read += int(info.get("features_read", 0))
        made.features_computed += int(info.get("features_computed", 0))
        lines = run.metrics() if (run.folder / "metrics.jsonl").is_file() else []
        if "features_read" in info:  # without the first window, in which things are compiled and memory is laid out
            made.windows += [(line.get("features_read", 0.0), line["images_per_second"]) for line in lines[1:]]
        if len(lines) < 2:
            made.unlogged.append(run.label)
        for kind in LOSSES:
            found = [(step, loss) for step, loss in logged(lines, kind) if math.isfinite(loss)]
            if len(found) > 1:
                made.curves.setdefault(kind, []).append(thinned([p[0] for p in found], [p[1] for p in found], points))
    return made


def thinned(steps: Sequence[float], losses: Sequence[float], most: int = POINTS) -> Curve:
    """At most `most` means of neighbours, smoothed over a tenth of the curve. Chunks begin at the same steps in every seed."""
    size = -(-len(steps) // most)
    cut = range(0, len(steps), size)
    means = [float(np.mean(losses[i : i + size])) for i in cut]
    middle = np.array([np.mean(steps[i : i + size]) for i in cut])
    return middle, smooth(means, len(means) // 10)


def loss_figures(trainings: Sequence[Training], layout: Layout) -> str:
    """All variants' means in one panel a kind of data, then a panel a variant."""
    kinds = [kind for kind in LOSSES if any(kind in t.curves for t in trainings)]
    if not kinds:
        return '<p class="note">No run has logged a loss.</p>'
    kinds = kinds[1:] if len(kinds) == 2 else kinds  # with one kind of data "all" is the same curve again
    varied = layout.others(None)
    axis = varied[0] if varied else None
    names = list(layout.axes[axis]) if axis else []
    folded = f"Show the loss curves of {len(trainings)} variants" if len(trainings) > MANY else ""

    def kind_of(label: str) -> int:
        name = layout.variant(label, axis) if axis else ""
        return names.index(name) if name in names else 0

    overview = []
    for kind in kinds:
        drawn = [(t, mean) for t in trainings if (mean := t.mean(kind)) is not None]
        panel = Panel(LOSSES[kind], width=270, height=215, bottom=40)
        extent = extent_of([mean for _, mean in drawn])
        x, y = extent.places(panel)
        panel.y_axis(ticks(extent.low, extent.high), y)
        panel.x_axis(ticks(0, extent.last, 4), x, "step")
        for t, curve in reversed(drawn):  # the baseline last, on top
            classes = f"mean {colour(kind_of(t.label))}" + (" first" if t is trainings[0] else "")
            panel.path(_points(panel, curve, x, y), classes, t.label)
        overview.append(panel)
    legend = [(name, colour(i), 1.0) for i, name in enumerate(names)] if axis else []
    by = f", coloured by {safe(axis)}" if axis else ""
    first = f"Training loss in nats a token by kind of data, means over seeds{by}; {safe(trainings[0].label)} drawn bold."
    every = figure(first, overview, legend, closed=folded, kind="losses")
    return every + _own_panels(trainings, kinds[0], kind_of, folded)


def _own_panels(trainings: Sequence[Training], kind: str, kind_of: Callable[[str], int], folded: str) -> str:
    extent = extent_of([curve for t in trainings for curve in t.curves.get(kind, [])])
    reference = trainings[0].mean(kind)
    panels = []
    for t in trainings:
        if kind not in t.curves:
            continue
        panel = Panel(shortened(t.label), width=212, height=156, left=32, bottom=24)
        x, y = extent.places(panel)
        panel.y_axis(ticks(extent.low, extent.high, 4), y)
        panel.x_axis(ticks(0, extent.last, 3), x)
        if reference is not None and t is not trainings[0]:
            panel.path(_points(panel, reference, x, y), "reference")
        for curve in t.curves[kind]:
            width = "seed" if len(t.curves[kind]) > 1 else "mean"
            panel.path(_points(panel, curve, x, y), f"{width} {colour(kind_of(t.label))}")
        if (mean := t.mean(kind)) is not None and len(t.curves[kind]) > 1:
            panel.path(_points(panel, mean, x, y), f"mean {colour(kind_of(t.label))}")
        panels.append(panel)
    caption = (
        f"Training loss ({LOSSES[kind]}), a panel a variant: seeds thin, their mean bold, {safe(trainings[0].label)} in grey. "
        "Curves are local straight-line fits over a tenth of the run; what lies above a panel runs along its upper edge."
    )
    missing = [name for t in trainings for name in t.unlogged]
    gone = f'<p class="note">Without a logged loss: {safe(", ".join(missing))}.</p>' if missing else ""
    return figure(caption, panels, closed=folded, kind="own-losses") + gone


def _points(panel: Panel, curve: Curve, x: Place, y: Place) -> list[tuple[float, float]]:
    """From where the curve enters the panel; what leaves it again runs along its upper edge."""
    points = [(x(float(step)), y(float(loss))) for step, loss in zip(*curve, strict=True)]
    first = next((i for i, (_, height) in enumerate(points) if height >= panel.y1), 0)
    return [(across, max(panel.y1, height)) for across, height in points[first:]]


@dataclass(frozen=True)
class Extent:
    """What panels of one kind show: steps up to `last`, losses from `low` to `high`."""

    last: float
    low: float
    high: float

    def places(self, panel: Panel) -> tuple[Place, Place]:
        return linear(0, self.last, panel.x0, panel.x1), linear(self.low, self.high, panel.y0, panel.y1)


def extent_of(curves: Sequence[Curve]) -> Extent:
    """From the lowest loss to the highest after the first tenth of a run: the fall from chance would flatten all the rest, and so
    would one run that diverged, so nothing counts beyond 2.5 times what the middle one of the curves spans."""
    low = min(float(losses.min()) for _, losses in curves)
    tops = [float(losses[min(len(losses) - 1, len(losses) // 10) :].max()) for _, losses in curves]
    high = min(max(tops), low + 2.5 * (float(np.median(tops)) - low))
    return Extent(max(float(steps[-1]) for steps, _ in curves), *padded([low, max(high, low + 0.1)], 0.04))


def held_out(trainings: Sequence[Training]) -> str:
    """A line a variant: the seeds' held-out losses and their mean."""
    found = [t for t in trainings if any(math.isfinite(v) for v in t.held_out.values())]
    if not found:
        return '<p class="note">No run has a held-out loss (train.validation_sequences=0).</p>'
    left = label_margin([t.label for t in found])
    panel = Panel("Held-out loss", width=left + 300, height=56 + 18 * len(found), left=left, bottom=28, right=16)
    low, high = padded([v for t in found for v in t.held_out.values()])
    x = linear(low, high, panel.x0, panel.x1)
    panel.x_axis(ticks(low, high), x)
    for i, t in enumerate(found):
        y = panel.y1 + 10 + 18 * i
        panel.text(left - 8, y + 4, shortened(t.label), "name", anchor="end")
        values = [v for v in t.held_out.values() if math.isfinite(v)]
        panel.line(x(min(values)), y, x(max(values)), y, "interval flat")
        for seed, value in t.held_out.items():
            if math.isfinite(value):
                panel.circle(x(value), y, 2.5, "fill main seed-mark", f"{t.label}, seed {seed}: {value:.3f}", 0.6)
        mean = sum(values) / len(values)
        panel.circle(x(mean), y, 4.5, "fill main mark", f"{t.label}: {mean:.3f}, mean of {len(values)} seeds")
    diverged = [f"{t.label}, seed {s}" for t in trainings for s, v in t.held_out.items() if not math.isfinite(v)]
    caption = "Held-out loss in nats a token, mean over kinds of data: small marks are seeds, the large one their mean."
    caption += f" Diverged: {safe(', '.join(diverged))}." if diverged else ""
    folded = f"Show the held-out losses of {len(found)} variants" if len(found) > MANY else ""
    return figure(caption, [panel], closed=folded, kind="held-out")


# ------------------------------------------------------------------------------------------------------------------ law


def law_figures(grid: LawGrid) -> str:
    """Held-out loss over the rate, a curve a size, with the parabola's optimum; and the fitted line in logarithms."""
    numbers = {rate: float(rate) for rate in grid.rates if _is_number(rate)}
    cells = [
        (size, numbers[rate], cell) for size in grid.sizes for rate, cell in grid.losses.get(size, {}).items() if rate in numbers
    ]
    cells = [(size, rate, cell) for size, rate, cell in cells if math.isfinite(cell.mean)]
    if not cells:
        return '<p class="note">No cell of the grid has a finite held-out loss yet.</p>'
    panels = [_grid_panel(grid, cells)]
    if grid.law is not None:
        panels.append(_line_panel(grid))
        law = grid.law
        a, b = (f" [{i[0]:.3f}, {i[1]:.3f}]" if i else "" for i in (law.a_interval, law.b_interval))
        caption = (
            "Held-out loss by peak rate, ± one standard error over seeds; ring: the optimum of the parabola through the best one "
            f"and its neighbours. The best rates by size with their line: log(η) = a log(N) + b with a = {law.a:.3f}{a}, "
            f"b = {law.b:.3f}{b}; dashed: MM1's a = {MM1[0]}, b = {MM1[1]}. N: decoder parameters without embeddings."
        )
    else:
        caption = f"Held-out loss by peak rate. No line is fitted: {safe(grid.reason or 'no reason is given')}"
    return figure(caption, panels, [(size, colour(i), 1.0) for i, size in enumerate(grid.sizes)], kind="law")


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def _grid_panel(grid: LawGrid, cells: Sequence[tuple[str, float, LossCell]]) -> Panel:
    panel = Panel("Held-out loss, nats a token", width=400, height=290, bottom=40)
    xs = padded_log([rate for _, rate, _ in cells])
    low, high = padded([c.mean + s * (c.se or 0) for _, _, c in cells for s in (-1, 1)])
    x, y = logarithmic(*xs, panel.x0, panel.x1), linear(low, high, panel.y0, panel.y1)
    panel.y_axis(ticks(low, high), y)
    panel.x_axis(log_ticks(*xs), x, "peak learning rate")
    optima = {o.size: o for o in grid.law.optima} if grid.law else {}
    for number, size in enumerate(grid.sizes):
        own = sorted(((rate, cell) for s, rate, cell in cells if s == size), key=lambda pair: pair[0])
        panel.path([(x(rate), y(cell.mean)) for rate, cell in own], f"thin {colour(number)}")
        for rate, cell in own:
            if cell.se:
                panel.line(x(rate), y(cell.mean - cell.se), x(rate), y(cell.mean + cell.se), f"stroke soft {colour(number)}")
            told = f"{size}, rate {brief(rate)}: {cell.mean:.3f}, mean of {len(cell.seeds)} seeds"
            panel.circle(x(rate), y(cell.mean), 3.5, f"fill mark {colour(number)}", told)
        if size in optima:
            rates = sorted(optima[size].losses)
            best = min(range(len(rates)), key=lambda i: optima[size].losses[rates[i]])
            near = rates[best - 1 : best + 2]
            curve = np.polyfit(np.log(near), [optima[size].losses[r] for r in near], 2)
            along = np.linspace(math.log(near[0]), math.log(near[-1]), 24)
            panel.path([(x(math.exp(v)), y(float(np.polyval(curve, v)))) for v in along], f"curve {colour(number)}")
            at = optima[size].rate
            told = f"{size}: best rate {brief(at)}"
            panel.circle(x(at), y(float(np.polyval(curve, math.log(at)))), 6, f"ring {colour(number)}", told)
    return panel


def _line_panel(grid: LawGrid) -> Panel:
    assert grid.law is not None
    law = grid.law
    panel = Panel("Best rate by size", width=340, height=290, bottom=40, left=46)
    xs = padded_log([o.parameters for o in law.optima], 0.15)
    paper = [math.exp(MM1[0] * math.log(n) + MM1[1]) for n in xs]
    ys = padded_log([*(o.rate for o in law.optima), *map(law.rate, xs), *paper])
    x, y = logarithmic(*xs, panel.x0, panel.x1), logarithmic(*ys, panel.y0, panel.y1)
    panel.y_axis(log_ticks(*ys), y)
    panel.x_axis(log_ticks(*xs), x, "decoder parameters")
    panel.path([(x(n), y(rate)) for n, rate in zip(xs, paper, strict=True)], "chance")
    panel.path([(x(n), y(law.rate(n))) for n in xs], "curve ink")
    for number, size in enumerate(grid.sizes):
        for optimum in law.optima:
            if optimum.size == size:
                told = f"{size}: {optimum.parameters:,} parameters, best rate {brief(optimum.rate)}"
                panel.circle(x(optimum.parameters), y(optimum.rate), 5, f"fill mark {colour(number)}", told)
    return panel
