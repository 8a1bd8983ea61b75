"""The report's tables: scores of a block, what each cell is and took, TextCore. Numbers carry the value they are sorted by.

A variant and its controls are one table body, so that sorting keeps them together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from ablations.report.curves import Training
from ablations.report.svg import label_html
from ablations.tables.cells import Block, Cell, Resources, Row
from ablations.tables.render import duration, si
from ablations.tables.sections import Section
from ablations.tables.suite_extras import Textcore, TextcoreCell
from ablations.tables.suite_table import SuiteRow, SuiteTable
from data_pipelines.html_text import safe
from mm1.run import config_differences

DIFFERENCES = 60
"""Of a configuration shown at most; more are counted."""


def grid(block: Block, suite: SuiteTable) -> str:
    """Scores ± one standard error, differences with intervals, the paper's values beside."""
    shots = suite.table.shots
    paper = [k for k in shots if any(k in row.paper for row in suite.rows)] if block.task is None else []
    compared = sum(row.control is None for row in block.rows) > 1
    many_seeds = any(len(r.seeds) > 1 for r in suite.table.resources)
    heads = ["variant"]
    for k in shots:
        heads += [f"{k}-shot"] + [f"Δ {k}-shot"] * compared + [f"paper, {k}-shot"] * (k in paper)
    by_label = {row.label: row for row in suite.rows}
    bodies: dict[str, list[str]] = {}
    for row in block.rows:
        cells = [_name(row, by_label.get(row.label), suite)]
        for k in shots:
            cells.append(_score(row.cells[k]))
            cells += [_difference(row.cells[k], many_seeds)] if compared else []
            if k in paper:
                own = by_label[row.label].paper.get(k) if row.control is None and row.label in by_label else None
                cells.append(number("" if own is None else f"{own:.1f}", own, "paper"))
        line = f"<tr{' class=control' if row.control else ''}>{''.join(cells)}</tr>"
        bodies.setdefault(row.label, []).append(line)
    return sortable(heads, ["".join(lines) for lines in bodies.values()])


def sortable(heads: Sequence[str], bodies: Sequence[str], classes: str = "") -> str:
    """A table whose bodies the page's script sorts by any column; with many bodies it scrolls within the page and can be
    filtered."""
    head = "".join(f'<th scope="col"><button type="button">{safe(h)}</button></th>' for h in heads)
    many = " many" if len(bodies) > 30 else ""
    finder = '<input type="search" class="find" placeholder="filter rows" aria-label="filter rows">' if many else ""
    rows = "".join(f"<tbody>{body}</tbody>" for body in bodies)
    return (
        f'{finder}<div class="scroll{many}"><table class="sortable {classes}"><thead><tr>{head}</tr></thead>{rows}</table></div>'
    )


def number(text: str, value: float | None, classes: str = "") -> str:
    """A cell that sorts by `value`; those without one come last."""
    held = "" if value is None or not math.isfinite(value) else f' data-v="{value:.6g}"'
    return f'<td class="n {classes}"{held}>{text}</td>' if classes else f'<td class="n"{held}>{text}</td>'


def _name(row: Row, own: SuiteRow | None, suite: SuiteTable) -> str:
    if row.control:
        return f'<th scope="row">↳ images {safe(row.control)}</th>'
    label = label_html(row.label)
    if own is not None and row.label != suite.baseline:
        label = f'<a href="#cell-{_anchor(suite, row.label)}">{label}</a>'
    reason = _unmatched(suite, row.label, own)
    mark = f' <abbr title="{safe(reason)}">≠</abbr><small>{safe(reason)}</small>' if reason else ""
    base = ' <span class="tag">baseline</span>' if row.label == suite.baseline else ""
    return f'<th scope="row">{label}{base}{mark}</th>'


def _anchor(suite: SuiteTable, label: str) -> int:
    return next(i for i, row in enumerate(suite.rows) if row.label == label)


def _unmatched(suite: SuiteTable, label: str, own: SuiteRow | None) -> str:
    """Why a row is marked: what it consumed more or less of than the baseline."""
    if own is not None and own.mark:
        return own.mark
    found = next((r for r in suite.table.resources if r.label == label), None)
    return ", ".join(found.mismatches) if found else ""


def _score(cell: Cell) -> str:
    """With the parts of the error that are training seeds' (s) and demonstration seeds' (d), where there are several."""
    s = cell.score
    error = "?" if math.isnan(s.se) else f"{s.se:.1f}"
    parts = (("s", s.se_seeds), ("d", s.se_demonstrations))
    apart = ", ".join(f"{sign} {value:.1f}" for sign, value in parts if value is not None)
    return number(f"{s.mean:.1f} <i>± {error}{f' ({apart})' if apart else ''}</i>", s.mean)


def _difference(cell: Cell, many_seeds: bool) -> str:
    d = cell.difference
    if d is None:
        return number("", None)
    level = " (items)" if many_seeds and not cell.difference_has_seeds else ""
    if math.isnan(d.se):
        return number(f"{d.value:+.1f} <i>[?]{level}</i>", d.value)
    kind = ("better" if d.value > 0 else "worse") if cell.significant else ""
    star = "*" if cell.significant else ""
    return number(f"<b>{d.value:+.1f}</b>{star} <i>[{d.low:+.1f}, {d.high:+.1f}]{level}</i>", d.value, kind)


# ------------------------------------------------------------------------------------------------------------- TextCore


def plain(section: Section) -> str:
    """A section of the text tables: its first columns are names, the others sort by the number they begin with."""
    bodies = []
    for line in section.lines:
        cells = [f'<th scope="row">{label_html(line[0])}</th>', *(f"<td>{safe(text)}</td>" for text in line[1 : section.text])]
        for text in line[section.text :]:
            begins = re.match(r"[+-]?\d+(\.\d+)?", text)
            cells.append(number(safe(text), float(begins[0]) if begins else None))
        bodies.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f'<p class="note">{safe(note)}</p>' for note in section.notes)
    return sortable(section.header, bodies) + notes


def textcore(held: Textcore, order: Sequence[str]) -> str:
    """Means of the eight tasks; what no row has is left out."""
    heads = ["variant"] + [h for k in held.shots for h in (f"{k}-shot", f"Δ {k}-shot")]
    bodies = []
    for label in order:
        if label not in held.cells:
            continue
        cells = [f'<th scope="row">{label_html(label)}</th>']
        for k in held.shots:
            cells += _textcore(held.cells[label].get(k))
        bodies.append(f"<tr>{''.join(cells)}</tr>")
    return sortable(heads, bodies)


def _textcore(cell: TextcoreCell | None) -> list[str]:
    if cell is None:
        return [number("", None), number("", None)]
    error = "" if cell.se is None else f" <i>± {cell.se:.1f}</i>"
    change = ""
    if cell.difference is not None:
        change = f"{cell.difference:+.1f}" + ("" if cell.difference_se is None else f" <i>± {cell.difference_se:.1f}</i>")
    return [number(f"{cell.mean:.1f}{error}", cell.mean), number(change, cell.difference)]


# ---------------------------------------------------------------------------------------------------------------- cells


def resources(suite: SuiteTable, trainings: Mapping[str, Training]) -> str:
    """What a run of each variant is and took, beside what was planned."""
    heads = ["variant", "trainable", "tokens", "images", "steps", "FLOPs", "wall time", "held-out loss", "seeds"]
    rows = {row.label: row for row in suite.rows}
    bodies = []
    for r in suite.table.resources:
        planned = rows[r.label].cells[0].cost if r.label in rows and rows[r.label].cells else {}
        losses = list(trainings[r.label].held_out.values()) if r.label in trainings else []
        loss = sum(losses) / len(losses) if losses else None
        cells = [
            f'<th scope="row">{label_html(r.label)}{" ≠" if r.mismatches else ""}</th>',
            number(si(r.parameters.get("trainable", 0)), r.parameters.get("trainable")),
            _planned(r.tokens, planned.get("tokens"), si),
            _planned(r.images, planned.get("images"), si),
            number(f"{r.steps:.0f}", r.steps),
            _planned(r.flops, planned.get("flops"), lambda v: f"{v:.2e}"),
            _planned(r.seconds, planned.get("seconds"), duration),
            _loss(loss),
            number(", ".join(map(str, r.seeds)), len(r.seeds)),
        ]
        bodies.append(f"<tr>{''.join(cells)}</tr>")
    return sortable(heads, bodies)


def _loss(value: float | None) -> str:
    return number("" if value is None else f"{value:.3f}" if math.isfinite(value) else "diverged", value)


def _planned(value: float, plan: float | None, say: Callable[[float], str]) -> str:
    return number(say(value) + (f" <i>of {say(plan)}</i>" if plan else ""), value)


def cells(suite: SuiteTable, trainings: Mapping[str, Training]) -> str:
    """Every variant folded up: its settings, how its configuration differs from the baseline's, and its runs."""
    base = suite.rows[0].runs[0].identity if suite.rows and suite.rows[0].runs else {}
    by_label = {r.label: r for r in suite.table.resources}
    parts = []
    for i, row in enumerate(suite.rows):
        taken = by_label.get(row.label)
        training = trainings.get(row.label)
        inner = [_runs(row, training)]
        if training and training.features_read + training.features_computed:
            inner.append(
                f'<p class="note">Frozen encoder: features of {training.features_read:,} pictures came from the store, '
                f"{training.features_computed:,} were computed.</p>"
            )
        if row.cells:
            inner.append(f"<h4>Overrides</h4><pre>{safe(chr(10).join(row.cells[0].overrides))}</pre>")
        if i == 0:
            inner.append('<p class="note">The baseline: the others are compared with this configuration.</p>')
        elif row.runs:
            inner.append(_changes(base, row.runs[0].identity))
        if taken:
            parameters = ", ".join(f"{name.replace('_', ' ')} {si(count)}" for name, count in taken.parameters.items())
            inner.append(f'<p class="note">Parameters: {safe(parameters)}.</p>')
        chosen = " · ".join(f"{axis} {variant}" for axis, variant in row.choice.items())
        head = f"<b>{safe(row.label)}</b> <span>{safe(chosen)}</span>"
        parts.append(f'<details class="cell" id="cell-{i}"><summary>{head}</summary>{"".join(inner)}</details>')
    return "".join(parts)


def _changes(base: Mapping[str, object], own: Mapping[str, object]) -> str:
    old, new = ({k: v for k, v in identity.items() if k != "seed"} for identity in (base, own))
    found = config_differences(old, new)
    if not found:
        return '<p class="note">Its configuration is the baseline\'s.</p>'
    more = f"<li>and {len(found) - DIFFERENCES} more</li>" if len(found) > DIFFERENCES else ""
    listed = "".join(f"<li>{safe(line)}</li>" for line in found[:DIFFERENCES])
    return f"<h4>Configuration against the baseline's</h4><ul class='diff'>{listed}{more}</ul>"


def _runs(row: SuiteRow, training: Training | None) -> str:
    by_folder = {run.folder.name: run for run in row.runs}
    lines = []
    for cell in row.cells:
        run = by_folder.get(cell.folder.name)
        loss = training.held_out.get(cell.seed) if training else None
        lines.append(
            f'<tr><th scope="row">{safe(cell.folder.name)}</th><td class="n">{cell.seed}</td>'
            + (
                '<td colspan="6">not finished</td>'
                if run is None
                else number(f"{run.steps} of {cell.steps}", run.steps)
                + _planned(run.tokens_seen, cell.cost.get("tokens"), si)
                + _planned(run.images_seen, cell.cost.get("images"), si)
                + _planned(run.flops, cell.cost.get("flops"), lambda v: f"{v:.2e}")
                + _planned(run.seconds, cell.cost.get("seconds"), duration)
                + _loss(loss)
            )
            + "</tr>"
        )
    heads = ("run", "seed", "steps", "tokens", "images", "FLOPs", "wall time", "held-out loss")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def taken_total(found: Sequence[Resources], key: str) -> float:
    """Over all runs: resources are means of a variant's seeds."""
    return sum(float(getattr(r, key)) * len(r.seeds) for r in found)
