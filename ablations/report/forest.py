"""Differences as forest plots: a line a variant, the smallest detectable difference as a grey band; main effects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ablations.report.figures import MANY
from ablations.report.svg import Panel, figure, label_margin, linear, padded, shortened, ticks
from ablations.statistics import Difference
from ablations.tables.cells import Block
from ablations.tables.effects import Effects
from data_pipelines.html_text import safe


@dataclass(frozen=True)
class Line:
    """One line of a forest plot."""

    label: str
    difference: Difference
    significant: bool
    told: str


def forest(block: Block, shots: Sequence[int]) -> str:
    """Differences to the baseline with their intervals; empty where there is nothing to compare."""
    rows = [row for row in block.rows if row.control is None]
    bands = {k: detectable.paired for k, detectable in block.detectable.items()}
    panels = []
    for k in shots:
        lines = [
            Line(row.label + ("" if row.matched else " ≠"), d, row.cells[k].significant, f"{row.label}, {k}-shot: {_interval(d)}")
            for row in rows
            if (d := row.cells[k].difference) is not None
        ]
        panels.append((f"Δ {k}-shot", lines, bands.get(k)))
    if not any(lines for _, lines, _ in panels):
        return ""
    caption = (
        f"Difference to {safe(block.rows[0].label)} in points, on the same items, with 95 % intervals. Filled: p &lt; 0.05 after "
        "Holm. Grey band: true differences as small as these are found less than 8 times in 10, before Holm."
    )
    closed = f"Show the differences of {len(rows) - 1} variants" if len(rows) > MANY else ""
    return figure(caption, _forest(panels), closed=closed, kind="forest")


def main_effects(effects: Effects, axes: Mapping[str, Sequence[str]], shots: Sequence[int]) -> str:
    """What each axis does over all settings of the others, a panel an axis, a line a variant and a number of shots."""
    panels = []
    for axis in axes:
        lines = [
            Line(
                f"{e.variant}, {e.shots}-shot",
                e.difference,
                e.significant,
                f"{e.variant} against {e.against}, {e.shots}-shot: {_interval(e.difference)}, mean of {e.pairs} pairs",
            )
            for e in sorted(
                effects.main, key=lambda e: (list(axes[axis]).index(e.variant), e.shots) if e.axis == axis else (0, 0)
            )
            if e.axis == axis and e.shots in shots
        ]
        against = next((e.against for e in effects.main if e.axis == axis), "")
        if lines:
            panels.append((f"{axis}, against {against}", lines, None))
    caption = (
        "Main effects on the mean over tasks, in points with 95 % intervals: the paired difference to the baseline's variant, "
        "averaged over all settings of the other axes. Filled: p &lt; 0.05 after Holm over all of them."
    )
    return figure(caption, _forest(panels), kind="effects") if panels else ""


def _interval(d: Difference) -> str:
    return f"{d.value:+.1f}" if math.isnan(d.se) else f"{d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}]"


def _forest(wanted: Sequence[tuple[str, Sequence[Line], float | None]]) -> list[Panel]:
    """Panels of one scale: (title, lines, half the width of the grey band)."""
    every = [line for _, lines, _ in wanted for line in lines]
    edges = [v for d in (line.difference for line in every) for v in ((d.value,) if math.isnan(d.se) else (d.low, d.high))]
    low, high = padded([*edges, 0.0, *(s * band for _, _, band in wanted if band is not None for s in (-1, 1))])
    left = label_margin([line.label for line in every])
    panels = []
    for title, lines, band in wanted:
        panel = Panel(title, width=max(left + 220, 366), height=56 + 20 * len(lines), left=left, top=24, bottom=28, right=14)
        x = linear(low, high, panel.x0, panel.x1)
        if band is not None:
            told = f"smallest detectable difference {band:.1f} points (power 0.8, before Holm)"
            panel.rect(x(-band), panel.y1, x(band) - x(-band), panel.y0 - panel.y1, "band", told)
        panel.x_axis(ticks(low, high, 5), x)
        panel.line(x(0), panel.y0, x(0), panel.y1, "zero")
        for i, line in enumerate(lines):
            y, d = panel.y1 + 12 + 20 * i, line.difference
            kind = "flat" if not line.significant else "better" if d.value > 0 else "worse"
            panel.text(left - 8, y + 4, shortened(line.label), "name", anchor="end")
            if not math.isnan(d.se):
                panel.line(x(d.low), y, x(d.high), y, f"interval {kind}")
            panel.circle(x(d.value), y, 4, f"point mark {kind}", line.told)
        panels.append(panel)
    return panels
