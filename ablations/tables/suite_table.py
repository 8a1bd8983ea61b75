"""A suite's finished cells as one table: rows are the cells' labels in the suite's order, all seeds of a label one row.

    plan.json + cells/*.json (record.py) -> runs and the results folders that are the suite's -> Selection -> Table (table.py)
                                         -> effects of each axis (effects.py), TextCore and law (suite_extras.py)

Which results folder belongs to the suite says its record of evaluations, so other evaluations of the same run are never taken
for it. Cells and seeds that are not finished are left out and listed in `missing`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from ablations.results import Run
from ablations.suites.matching import COUNTERS, marks
from ablations.suites.planning import suite_folder
from ablations.suites.record import SuiteCell, SuiteFolder
from ablations.suites.suite import SCALES, EvaluationConfig, SuiteConfig, load_suite, variants_at
from ablations.tables.answers import collect
from ablations.tables.building import Options, build_from, check_interval
from ablations.tables.cells import Table
from ablations.tables.effects import Effects, effects_of
from ablations.tables.finished import Done, finished_cells, one_protocol, variant
from ablations.tables.held_out import HeldOut, held_out_of
from ablations.tables.selection import Selection
from ablations.tables.suite_extras import LawGrid, Textcore, law_grid, textcore_of
from configs.errors import UserError

LISTED = 40
"""Unfinished cells that a note lists before it only counts."""


@dataclass(frozen=True)
class SuiteRow:
    """One label. `cells`: one a seed, finished or not; `runs`: of those that are finished and evaluated, in the seeds' order;
    `paper`: points by number of shots; `mark`: how it differs from the baseline in what the suite matches, or None."""

    label: str
    choice: dict[str, str]
    cells: list[SuiteCell]
    runs: list[Run]
    paper: dict[int, float] = field(default_factory=dict)
    mark: str | None = None

    @property
    def finished_seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


@dataclass
class SuiteTable:
    """`rows`: the baseline's first, only those with a finished seed, the labels of `table.blocks[*].rows`. `axes`: axis -> its
    variants at this scale in the suite's order. `missing`: "avgpool.few.low.seed1: waiting". `effects`, `textcore`, `law`: None
    where the suite has no several axes, evaluates no TextCore, is no grid of learning rates; `held_out`: where no run was
    validated."""

    name: str
    about: str
    scale: str
    matching: str
    axes: dict[str, list[str]]
    baseline: str
    table: Table
    rows: list[SuiteRow]
    selection: Selection
    missing: list[str]
    effects: Effects | None = None
    textcore: Textcore | None = None
    law: LawGrid | None = None
    held_out: HeldOut | None = None
    place: SuiteFolder | None = None
    """Where the suite is."""

    def row(self, label: str) -> SuiteRow:
        """KeyError where no seed of that label is finished."""
        return {row.label: row for row in self.rows}[label]


def suite_table(
    suite: str,
    scale: str = "tiny",
    *,
    extra: Sequence[str] = (),
    folder: str | None = None,
    shots: Sequence[int] = (),
    evaluation: str | None = None,
    interval: str = "t",
    match_within: float = 0.01,
) -> SuiteTable:
    """The table of a suite that was started. `extra`: the overrides of all cells it was started with; `folder`: as given to
    ablations.run; `shots`, `evaluation`, `interval`, `match_within`: as in ablations.table.

    Raises UserError for an unknown suite, one that was never started, a folder of another suite, a baseline of which no seed is
    finished (naming the command that finishes it), damaged or half-written records and results, and results of other runs.
    """
    place = suite_folder(suite, scale, extra, folder)
    config, axes = _started(place, suite, scale)
    cells = place.cells()
    finished, missing = finished_cells(place, cells, config, evaluation)
    first = next(cell for cell in cells if cell.baseline)
    if first.label not in finished:
        own = ", ".join(text for text in missing if text.startswith(f"{first.label}.seed"))
        raise UserError(
            f"suite {suite}, scale {scale}: the baseline {first.label}, which all others are compared with, has no finished seed "
            f"({own}). Finish it: python -m ablations.run {shlex.join(place.plan()['arguments'])}"
        )
    labels = [first.label, *dict.fromkeys(cell.label for cell in cells if cell.label != first.label)]
    marked = marks(config.matching, [_consumed(done) for members in finished.values() for done in members], match_within)
    rows = [
        SuiteRow(
            label=label,
            choice=dict(next(cell for cell in members if cell.label == label).choice),
            cells=members,
            runs=[done.run for done in finished[label]],
            paper={int(shots): float(points) for shots, points in members[0].paper.items()},
            mark=marked.get(label),
        )
        for label in labels
        if label in finished and (members := sorted((c for c in cells if c.label == label), key=lambda c: c.seed))
    ]
    selection = Selection([variant(label, finished[label]) for label in labels if label in finished], one_protocol(finished))
    options = Options(
        interval=interval,
        match_within=match_within,
        pair_seeds=True,
        marks=marked,
        planned={row.label: {"steps": float(row.cells[0].steps)} | row.cells[0].cost for row in rows},
    )
    check_interval(selection, options)
    held = collect(selection, shots)
    table = build_from(held, selection, options)
    found = SuiteTable(
        name=suite,
        about=config.about,
        scale=scale,
        matching=config.matching,
        axes=axes,
        baseline=first.label,
        table=table,
        rows=rows,
        selection=selection,
        missing=missing,
        effects=effects_of(held, table, axes, {row.label: row.choice for row in rows}, first.label),
        held_out=held_out_of(cells, axes),
        place=place,
    )
    if config.evaluation.textcore is not None:
        found.textcore = textcore_of({row.label: row.runs for row in rows}, config.evaluation.textcore, first.label)
    if config.law is not None:
        found.law = law_grid(cells, axes, config.law["size"], config.law["rate"])
    table.notes = _notes(found)
    return found


def _started(place: SuiteFolder, name: str, scale: str) -> tuple[SuiteConfig, dict[str, list[str]]]:
    """The suite as it was started last, and its axes at this scale."""
    if scale not in SCALES:
        raise UserError(f"scale={scale}: must be one of {', '.join(SCALES)}.")
    if not place.plan_path.is_file():
        load_suite(name)  # an unknown suite is said first
        hint = (
            f"Start it: python -m ablations.run suite={name} scale={scale}; or add the settings, or folder=, it was started with."
        )
        try:
            place.plan()
        except UserError as error:
            raise UserError(f"{error} {hint}") from None
    plan = place.plan()
    try:
        written = plan["suite"]
        there = (written["name"], plan["scale"])
        if there != (name, scale):
            raise UserError(
                f"{place.folder} holds suite {there[0]}, scale {there[1]}, not {name}, {scale}. Ask for that one, or for another "
                "folder=..."
            )
        known = {f.name for f in fields(SuiteConfig)}
        config = SuiteConfig(**{key: value for key, value in written.items() if key in known})
        config.evaluation = EvaluationConfig(**written["evaluation"])
        config.validate()
        axes = {axis: list(variants) for axis, variants in variants_at(config, scale).items()}
    except (KeyError, TypeError) as error:
        raise UserError(f"{place.plan_path} is damaged ({error!r}). Delete {place.folder} and start the suite again.") from error
    return config, axes


def _consumed(done: Done) -> tuple[str, int, bool, dict[str, float]]:
    """What matching.marks compares."""
    counted = {counter: float(getattr(done.run, counter)) for counter in COUNTERS.values()}
    return done.cell.label, done.cell.seed, done.cell.baseline, counted


# ----------------------------------------------------------------------------------------------------------------- notes


def _seed_notes(found: SuiteTable) -> list[str]:
    """One for each set of training seeds that is not the baseline's."""
    base = tuple(next(row for row in found.rows if row.label == found.baseline).finished_seeds)
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for row in found.rows[1:]:
        by_seeds.setdefault(tuple(row.finished_seeds), []).append(row.label)
    notes = []
    for own, labels in by_seeds.items():
        if own == base:
            continue
        shared = [seed for seed in own if seed in base]
        over = (
            f"over the seeds that both have ({', '.join(map(str, shared))})"
            if shared
            else "with none in common over all of both, which saw other orders of the data"
        )
        named = ", ".join(labels[:LISTED]) + (f" and {len(labels) - LISTED} more" if len(labels) > LISTED else "")
        have, its = ("has", "its") if len(labels) == 1 else ("have", "their")
        notes.append(
            f"{named} {have} the training seeds {', '.join(map(str, own))}, {found.baseline} has {', '.join(map(str, base))}: "
            f"{its} Δ is {over}."
        )
    return notes


def _notes(found: SuiteTable) -> list[str]:
    """The table's notes, and what a suite adds to them: its matching, seeds that are missing, the paper's values."""
    table = found.table
    notes = list(table.notes)
    marked = [f"{row.label} ({row.mark})" for row in found.rows if row.mark]
    matching = f"All rows were to consume as many {'FLOPs' if found.matching == 'flops' else found.matching} as {found.baseline}"
    if marked:
        notes.append(f"{matching}. ≠: these did not, so their difference is not of the variant alone: {'; '.join(marked)}.")
    else:
        notes.append(f"{matching}, and did.")
    notes += _seed_notes(found)
    corpora = {f"{run.corpus} {run.corpus_fingerprint[:8]}" for row in found.rows for run in row.runs}
    if len(corpora) > 1:
        notes.append(f"The rows were trained on different corpora: {', '.join(sorted(corpora))}.")
    if any(row.paper for row in found.rows):
        notes.append(
            "paper: what MM1 (arXiv 2403.09611) reports for this row, its own models at its own scale on its eight tasks"
            + ("" if found.scale == "mm1" else f"; at scale {found.scale} only the order of the rows can be compared")
            + "."
        )
    if found.missing:
        more = f"; and {len(found.missing) - LISTED} more" if len(found.missing) > LISTED else ""
        losses = "; those that are trained are in the held-out losses" if found.held_out is not None else ""
        notes.append(f"Not finished, and left out of the scores: {'; '.join(found.missing[:LISTED])}{more}{losses}.")
    return notes
