"""A Table as sections of text, which Markdown (render.py) and LaTeX (latex.py) print alike: the scores of each block, and what
each row is and took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ablations.tables.cells import Block, Cell, Resources, Row, Table


@dataclass
class Section:
    """One table. `text`: how many of its first columns are words (left) and not numbers (right); `notes`: of this table alone."""

    title: str
    header: list[str]
    lines: list[list[str]]
    text: int = 1
    notes: list[str] = field(default_factory=list)


Paper = Mapping[str, Mapping[int, float]]
"""label -> number of shots -> the paper's points."""


def table_sections(table: Table, paper: Paper | None = None) -> list[Section]:
    """The mean over tasks, each task, and the resources. `paper`: printed beside the mean where a row has such a value."""
    many = any(len(r.seeds) > 1 for r in table.resources)
    found = []
    for block in table.blocks:
        title = "Mean over tasks" if block.task is None else f"{block.task} ({block.metric})"
        title += f", chance {block.chance:.1f}" if block.chance is not None else ""
        header, lines = _scores(block, table.shots, many_seeds=many, paper=paper or {} if block.task is None else {})
        found.append(Section(title, header, lines))
    return [*found, resources_section(table.resources)]


def _scores(block: Block, shots: Sequence[int], *, many_seeds: bool, paper: Paper) -> tuple[list[str], list[list[str]]]:
    is_compared = len(block.rows) > 1
    printed = {k for k in shots if any(k in paper.get(row.label, {}) for row in block.rows)}
    header = ["variant"]
    for k in shots:
        header += [f"{k}-shot", *([f"Δ {k}-shot"] if is_compared else []), *([f"paper {k}-shot"] if k in printed else [])]
    lines = []
    for row in block.rows:
        line = [label_of(row)]
        for k in shots:
            line.append(value_of(row.cells[k]))
            if is_compared:
                line.append(difference_of(row.cells[k], many_seeds))
            if k in printed:
                points = None if row.control else paper.get(row.label, {}).get(k)
                line.append("" if points is None else f"{points:.1f}")
        lines.append(line)
    return header, lines


def label_of(row: Row) -> str:
    return f"↳ images {row.control}" if row.control else row.label + ("" if row.matched else " ≠")


def value_of(cell: Cell) -> str:
    parts = (("s", cell.score.se_seeds), ("d", cell.score.se_demonstrations))
    kept_apart = ", ".join(f"{sign} {value:.1f}" for sign, value in parts if value is not None)
    return f"{cell.score.mean:.1f} ± {number(cell.score.se)}" + (f" ({kept_apart})" if kept_apart else "")


def number(value: float | None) -> str:
    return "?" if value is None or math.isnan(value) else f"{value:.1f}"


def difference_of(cell: Cell, many_seeds: bool) -> str:
    d = cell.difference
    if d is None:
        return "baseline"
    level = " (items)" if many_seeds and not cell.difference_has_seeds else ""
    if math.isnan(d.se):
        return f"{d.value:+.1f} [?]{level}"
    return f"{d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}]{level}{' *' if cell.significant else ''}"


def resources_section(resources: Sequence[Resources]) -> Section:
    """Where there was a plan, what it said stands behind a stroke: "657k / 660k"."""
    planned = any(r.planned for r in resources)
    counted = ["tokens", "images", "steps", "FLOPs"]
    header = ["variant", "encoder", "connector", "decoder", "trainable", *counted, "wall time", "seeds"]
    if planned:
        header = [f"{name} / plan" if name in counted else name for name in header]

    def beside(r: Resources, key: str, text: str, form: str) -> str:
        if not planned:
            return text
        return f"{text} / {'?' if key not in r.planned else si(r.planned[key]) if form == 'si' else format(r.planned[key], form)}"

    lines = [
        [
            r.label + (" ≠" if r.mismatches else ""),
            *(si(r.parameters.get(key, 0)) for key in ("image_encoder", "connector", "decoder", "trainable")),
            beside(r, "tokens", si(r.tokens), "si"),
            beside(r, "images", si(r.images), "si"),
            beside(r, "steps", f"{r.steps:.0f}", ".0f"),
            beside(r, "flops", f"{r.flops:.2e}", ".2e"),
            duration(r.seconds),
            ", ".join(map(str, r.seeds)),
        ]
        for r in resources
    ]
    notes = (
        ["Each run's own count, mean over its seeds; behind the stroke what the plan said before training."] if planned else []
    )
    return Section("What each variant is and took", header, lines, notes=notes)


def si(value: float) -> str:
    """1234567 -> '1.23M'; whole numbers below a thousand as they are."""
    for limit, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:  # what rounds to 1000 of the smaller unit is 1 of this one
            return f"{value / limit:.3g}{sign}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """'43 s', '12 min 3 s', '5 h 20 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
