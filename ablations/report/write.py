"""A suite's report: one HTML file with its scores, figures, training, cost, answers and settings, that needs nothing else.

    SuiteTable (suite_table.py) + metrics.jsonl, run.json, answers of its runs
        -> report_tables.py, report_figures.py, report_forest.py, report_curves.py, report_samples.py -> report_page.py

All text of models, corpora and configurations is escaped, and the page's policy lets nothing else run or be fetched.

Size: with 5 tasks and 3 numbers of shots about 0.5 MB for 12 variants of 3 seeds, and 20 kB for each variant of a thousand, where
figures and long tables are folded up (report_figures.MANY); pictures have at most report_samples.PICTURE_BYTES of it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ablations.report import tables
from ablations.report.curves import FEW_POINTS, POINTS, Training, held_out, law_figures, loss_figures, training_of
from ablations.report.figures import MANY, Layout, cost, scores
from ablations.report.forest import forest, main_effects
from ablations.report.frozen import frozen_encoder
from ablations.report.page import Section, page, tabs
from ablations.report.samples import samples
from ablations.report.svg import figure
from ablations.tables.held_out import held_out_sections
from ablations.tables.render import duration, si
from ablations.tables.suite_table import SuiteTable
from data_pipelines.html_text import safe
from mm1.run import write_atomically

LISTED = 12
"""Missing cells listed at once; more of them are folded up."""


def write_report(suite: SuiteTable, path: Path) -> Path:
    """Write the page to `path` and return it. Raises UserError where a run's record, losses or answers are damaged."""
    points = POINTS if len(suite.rows) <= MANY else FEW_POINTS
    trainings = [training_of(row, points) for row in suite.rows]
    text = page(f"Suite {suite.name}, scale {suite.scale}", _head(suite), _sections(suite, trainings))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


# ----------------------------------------------------------------------------------------------------------------- head


def _head(suite: SuiteTable) -> str:
    table = suite.table
    seeds = sorted({seed for r in table.resources for seed in r.seeds})
    drawn = sorted({seed for v in suite.selection.variants for e in v.evaluations for seed in e.demonstration_seeds})
    runs = sum(len(r.runs) for r in suite.rows)
    facts = {
        "Scale": suite.scale,
        "Corpus": table.corpus,
        "Variants": f"{len(suite.rows)}, {runs} run{'s' * (runs != 1)}",
        "Training seeds": ", ".join(map(str, seeds)),
        "Demonstration seeds": ", ".join(map(str, drawn)),
        "Matched": f"equal {suite.matching}",
        "Baseline": suite.baseline,
        "Last result": _last_result(suite),
        "Trained": f"{duration(tables.taken_total(table.resources, 'seconds'))}, "
        f"{si(tables.taken_total(table.resources, 'tokens'))} tokens, {tables.taken_total(table.resources, 'flops'):.2e} FLOPs",
        "Plan": table.plan.partition(" ")[0],
    }
    listed = "".join(f"<div><dt>{safe(name)}</dt><dd>{safe(value)}</dd></div>" for name, value in facts.items())
    about = f'<p class="about">{safe(" ".join(suite.about.split()))}</p>' if suite.about else ""
    commands = safe("\n".join(_commands(suite)))
    return f"{about}<dl class='facts'>{listed}</dl>{_missing(suite.missing)}<pre>{commands}</pre>"


def _last_result(suite: SuiteTable) -> str:
    times = [(e.folder / "summary.json").stat().st_mtime for v in suite.selection.variants for e in v.evaluations]
    return datetime.fromtimestamp(max(times), UTC).strftime("%Y-%m-%d %H:%M UTC") if times else "none"


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    items = "<ul>" + "".join(f"<li>{safe(name)}</li>" for name in missing) + "</ul>"
    head = f"Not finished, and not in the scores: {len(missing)} cell{'s' * (len(missing) != 1)}"
    if len(missing) > LISTED:
        return f'<div class="banner"><details><summary>{head}</summary>{items}</details></div>'
    return f'<div class="banner missing">{head}{items}</div>'


def _commands(suite: SuiteTable) -> list[str]:
    """How to get these results and this report again."""
    named = started = [f"suite={suite.name}", f"scale={suite.scale}"]
    if suite.place is not None:
        named = suite.place.arguments(suite.name, suite.scale)
        # plans of older versions call `scale` and `suite` as they are called inside
        started = [re.sub(r"^(scale|suite)_name=", r"\1=", str(argument)) for argument in suite.place.plan()["arguments"]]
    return [f"python -m ablations.run {shlex.join(started)}", f"python -m ablations.table {shlex.join(named)}"]


# ------------------------------------------------------------------------------------------------------------- sections


def _sections(suite: SuiteTable, trainings: Sequence[Training]) -> list[Section]:
    table = suite.table
    layout = Layout(suite.axes, {row.label: row.choice for row in suite.rows}, table.shots)
    by_label = {t.label: t for t in trainings}
    names = ["Mean over tasks" if b.task is None else b.task for b in table.blocks]
    bodies = []
    for block in table.blocks:
        chance = "" if block.chance is None else f", chance {block.chance:.1f}"
        about = (
            f'<p class="note">{safe(block.metric)}{chance}. Points ± one standard error; Δ: {safe(suite.baseline)} subtracted, '
        )
        about += "with its 95 % interval; * p &lt; 0.05 after Holm. A column's head sorts.</p>"
        bodies.append(tables.grid(block, suite) + about + scores(block, layout) + forest(block, table.shots))
    sections = [Section("scores", "Scores", tabs(names, bodies))]
    if suite.effects is not None and suite.effects.main:
        drawn = main_effects(suite.effects, suite.axes, table.shots)
        sections.append(Section("effects", "What each axis does", drawn))
    if suite.law is not None:
        sections.append(Section("law", "Learning-rate law", law_figures(suite.law)))
    sections.append(Section("cost", "Cost and score", _cost(suite)))
    if suite.textcore is not None and suite.textcore.cells:
        labels = [row.label for row in suite.rows]
        note = '<p class="note">Mean of the eight tasks in points ± one standard error; differences are unpaired.</p>'
        sections.append(Section("textcore", "TextCore", tables.textcore(suite.textcore, labels) + note))
    losses = loss_figures(trainings, layout) + held_out(trainings)
    if suite.held_out is not None:
        losses += "".join(f"<h3>{safe(part.title)}</h3>" + tables.plain(part) for part in held_out_sections(suite.held_out))
    sections.append(Section("training", "Training", losses))
    if frozen := frozen_encoder(trainings):
        sections.append(Section("frozen", "Frozen encoder", frozen))
    sections.append(Section("answers", "Sample answers", samples(suite.selection, table.shots)))
    took = tables.resources(suite, by_label) + '<p class="note">Per run, means over seeds; "of": as planned.</p>'
    sections.append(Section("cells", "Cells", took + tables.cells(suite, by_label)))
    sections.append(Section("reading", "How to read this", _reading(suite)))
    return sections


def _cost(suite: SuiteTable) -> str:
    table = suite.table
    block = table.blocks[0]
    parts = []
    for name, key, unit in (("Training FLOPs", "flops", "FLOPs a run"), ("Wall time", "seconds", "seconds a run")):
        costs = {r.label: float(getattr(r, key)) for r in table.resources}
        if panels := cost(block, table.shots, costs, unit, suite.baseline):
            what = "the mean over tasks" if block.task is None else safe(block.task)
            caption = (
                f"{name} against {what}, in points. Blue, joined: no variant scores as high for less (Pareto front); "
                f"outlined: {safe(suite.baseline)}. Scores have the errors of the table."
            )
            closed = f"Show {len(table.resources)} variants" if len(table.resources) > MANY else ""
            parts.append(f"<h3>{name}</h3>" + figure(caption, panels, closed=closed, kind=key))
    return "".join(parts) or '<p class="note">No run has counted its FLOPs or its time.</p>'


def _reading(suite: SuiteTable) -> str:
    table = suite.table
    many = max((len(r.seeds) for r in table.resources), default=1) > 1
    seeds = (
        "and how much the score changes from seed to seed of training, which draws new weights and another order of data"
        if many
        else "but not how much another training seed would change, since every variant was trained once"
    )
    text = (
        f"An error holds how much the score would change with other test images (items on one image are one cluster), {seeds}. "
        "A difference is taken item by item on the same questions after the same demonstrations, so its interval is narrower "
        "than two scores' errors suggest: judge by the interval of the difference, not by whether error bars overlap. An "
        "interval that holds 0 says that this suite cannot tell the two apart, not that they are equal; the grey band of a "
        "forest plot says how large a difference it could have found. Holm's correction keeps the chance of even one false "
        "star in a table at 5 %."
    )
    if any(row.paper for row in suite.rows):
        text += " Scores of the paper are of other data and larger models: compare the order and the sign, not the height."
    notes = "".join(f"<li>{safe(note)}</li>" for note in table.notes)
    return f'<p class="prose">{text}</p><ul class="notes">{notes}</ul>'
