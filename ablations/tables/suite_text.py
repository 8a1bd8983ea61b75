"""A SuiteTable as Markdown, CSV and LaTeX: the table of runs, and what a suite adds to it.

blocks with the paper's values -> what each axis does -> grids -> held-out losses -> TextCore -> what each row is and took
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ablations.tables.cells import Row
from ablations.tables.effects import Effect, Grid
from ablations.tables.held_out import held_out_sections
from ablations.tables.latex import render_latex
from ablations.tables.render import CSV_COLUMNS, markdown, render_csv
from ablations.tables.sections import Section, number, table_sections
from ablations.tables.suite_extras import LawGrid, LossCell, Textcore, TextcoreCell
from ablations.tables.suite_table import SuiteTable


def title_of(found: SuiteTable) -> str:
    return f"Suite {found.name} (scale {found.scale}, corpus {found.table.corpus})"


def suite_sections(found: SuiteTable) -> list[Section]:
    """In the order in which they are printed."""
    *scores, resources = table_sections(found.table, {row.label: row.paper for row in found.rows})
    sections = list(scores)
    if found.effects is not None:
        sections.append(effects_section(found.effects.main, found.table.shots))
        sections += [grid_section(grid) for grid in found.effects.grids]
    if found.held_out is not None:
        sections += held_out_sections(found.held_out)
    if found.textcore is not None:
        sections += textcore_sections(found.textcore, [row.label for row in found.rows])
    if found.law is not None:
        sections.append(law_section(found.law))
    return [*sections, resources]


def render_suite_markdown(found: SuiteTable) -> str:
    done = sum(len(row.runs) for row in found.rows)
    about = f"{found.about} Matched by {found.matching}. {done} of {done + len(found.missing)} runs are finished."
    return markdown(title_of(found), about, suite_sections(found), found.table.notes)


def render_suite_latex(found: SuiteTable) -> str:
    return render_latex(title_of(found), suite_sections(found), found.table.notes)


def render_suite_csv(found: SuiteTable) -> str:
    """The columns of a table of runs; before them the suite and each axis, behind them the paper's value and the plan's costs."""
    axes = [f"axis_{axis}" for axis in found.axes]
    columns = ["suite", *axes, *CSV_COLUMNS, "paper", "planned_tokens", "planned_flops", "mark"]
    rows = {row.label: row for row in found.rows}
    planned = {r.label: r.planned for r in found.table.resources}

    def more(row: Row, shots: int, is_mean: bool) -> dict[str, Any]:
        own = rows[row.label]
        return {
            "suite": found.name,
            **{f"axis_{axis}": variant for axis, variant in own.choice.items()},
            "paper": own.paper.get(shots) if row.control is None and is_mean else None,
            "planned_tokens": planned[row.label].get("tokens"),
            "planned_flops": planned[row.label].get("flops"),
            "mark": own.mark,
        }

    return render_csv(found.table, columns, more)


# -------------------------------------------------------------------------------------------------------------- sections


def effects_section(effects: Sequence[Effect], shots: Sequence[int]) -> Section:
    kinds: dict[tuple[str, str], dict[int, Effect]] = {}
    for effect in effects:
        kinds.setdefault((effect.axis, effect.variant), {})[effect.shots] = effect
    lines = []
    for (axis, variant), by_shots in kinds.items():
        first = next(iter(by_shots.values()))
        level = "" if first.has_seeds else " (items)"
        lines.append([
            axis, f"{variant} - {first.against}", *(_effect(by_shots[k]) + level for k in shots), str(first.pairs),
            ", ".join(map(str, first.seeds)) or "none shared",
        ])  # fmt: skip
    notes = [
        "Paired difference of the mean over tasks, averaged over the settings of the other axes that have both, with its 95 % "
        "interval; *: p < 0.05 after Holm's correction over all of this table. (items): without training-seed error."
    ]
    return Section("What each axis does", ["axis", "step", *(f"Δ {k}-shot" for k in shots), "pairs", "seeds"], lines, 2, notes)


def _effect(effect: Effect) -> str:
    d = effect.difference
    if d.se != d.se:
        return f"{d.value:+.1f} [?]"
    return f"{d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}]{' *' if effect.significant else ''}"


def grid_section(grid: Grid) -> Section:
    lines = [
        [*row, *("" if mean is None else f"{mean:.1f} ± {number(se)}" for mean, se in zip(means, ses, strict=True))]
        for row, means, ses in zip(grid.rows, grid.means, grid.ses, strict=True)
    ]
    title = f"Mean over tasks at {grid.shots} shots by {grid.column_axis}"
    return Section(title, [*grid.row_axes, *grid.columns], lines, len(grid.row_axes))


def textcore_sections(found: Textcore, labels: Sequence[str]) -> list[Section]:
    """The mean of the eight with differences where it is there, and each task."""
    sections = []
    if found.cells:
        header = ["variant", *(name for k in found.shots for name in (f"{k}-shot", f"Δ {k}-shot"))]
        lines = [
            [label, *(text for k in found.shots for text in _textcore_pair(found.cells[label].get(k), label == labels[0]))]
            for label in labels
            if label in found.cells
        ]
        notes = ["Mean of MM1's eight text tasks by lm-eval. Δ is unpaired, ± one standard error: lm-eval keeps no items."]
        sections.append(Section("TextCore", header, lines, notes=notes))
    tasks = list(dict.fromkeys(task for row in found.tasks.values() for task in row))
    for k in found.shots:
        lines = [
            [label, *(_textcore(found.tasks[label].get(task, {}).get(k)) for task in tasks)]
            for label in labels
            if label in found.tasks
        ]
        sections.append(Section(f"TextCore tasks at {k} shots", ["variant", *tasks], lines))
    return sections


def _textcore(cell: TextcoreCell | None) -> str:
    return "" if cell is None else f"{cell.mean:.1f} ± {number(cell.se)}"


def _textcore_pair(cell: TextcoreCell | None, baseline: bool) -> tuple[str, str]:
    if cell is None or cell.difference is None:
        return _textcore(cell), "baseline" if baseline else ""
    return _textcore(cell), f"{cell.difference:+.1f} ± {number(cell.difference_se)}"


def law_section(found: LawGrid) -> Section:
    """Sizes down, rates across; the lowest loss of a size is marked <."""
    rates = [rate for rate in found.rates if any(rate in row for row in found.losses.values())]
    lines = []
    for size in (size for size in found.sizes if size in found.losses):
        row = found.losses[size]
        best = min((cell for cell in row.values() if math.isfinite(cell.mean)), key=lambda cell: cell.mean, default=None)
        lines.append([size, *("" if rate not in row else _loss(row[rate], row[rate] is best) for rate in rates)])
    notes = ["Held-out loss in nats a token, mean over captions, pages and text and over seeds, ± standard error over seeds."]
    if found.law is not None:
        law = found.law
        notes.append(
            f"log(rate) = {law.a:.4f} log(N) {'-' if law.b < 0 else '+'} {abs(law.b):.4f}, N decoder parameters without "
            "embeddings; MM1: -0.4214, -0.5535."
        )
        intervals = [f"{k} [{i[0]:.4f}, {i[1]:.4f}]" for k, i in (("slope", law.a_interval), ("offset", law.b_interval)) if i]
        notes.append(f"95 % intervals: {', '.join(intervals)}." if intervals else "Two sizes give no intervals.")
        best_rates = "; ".join(f"{o.size} {o.rate:.2e} (law {law.rate(o.parameters):.2e})" for o in law.optima)
        notes.append(f"Best rate of each size: {best_rates}.")
    else:
        notes.append(f"No law yet: {found.reason}")
    return Section(f"Held-out loss by {found.size_axis} and {found.rate_axis}", [found.size_axis, *rates], lines, 1, notes)


def _loss(cell: LossCell, best: bool) -> str:
    if not math.isfinite(cell.mean):
        return "diverged"
    return f"{cell.mean:.3f}" + ("" if cell.se is None else f" ± {cell.se:.3f}") + (" <" if best else "")
