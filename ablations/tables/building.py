"""From runs and results to a Table: the mean over tasks and each task, every difference paired and corrected, marks and notes.

    Selection -> collect (answers.py) -> cells and differences (comparing.py) -> blocks, resources, notes

One block for the mean over tasks and one for each task. A cell holds the mean score in points, its standard error, and the
difference to the baseline on the same items with a confidence interval and a p-value; Holm's correction runs over all differences
of a block. A control's row (images shuffled) stands under its run and is compared with that run instead, in a family of its own.
Rows that consumed another amount of tokens, images or steps than the baseline are marked: there the difference is not of the
variant alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ablations import statistics as st
from ablations.tables.answers import Collected, Key, collect, demonstration_seeds
from ablations.tables.cells import Block, Cell, Detectable, Resources, Row, Table
from ablations.tables.comparing import Compared, cell_of, compared
from ablations.tables.selection import Selection, Variant
from configs.errors import UserError


@dataclass(frozen=True)
class Options:
    """How a table compares. `interval`, `match_within`: as the command's. `pair_seeds`: a difference is over the training seeds
    that both sides have. `marks`: by label, how a row differs in what its suite matches; None: tokens, images and steps are
    compared. `planned`: by label, what the plan said that a row would cost."""

    interval: str = "t"
    match_within: float = 0.01
    pair_seeds: bool = False
    marks: Mapping[str, str] | None = None
    planned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def build(selection: Selection, shots: Sequence[int] = (), *, interval: str = "t", match_within: float = 0.01) -> Table:
    """Raises UserError where an evaluation lacks a task or a number of shots, or where its items cannot be paired."""
    options = Options(interval, match_within)
    check_interval(selection, options)
    return build_from(collect(selection, shots), selection, options)


def check_interval(selection: Selection, options: Options) -> None:
    """Raises UserError for the bootstrap with several seeds of either kind."""
    if options.interval != "bootstrap":
        return
    if any(len(v.runs) > 1 for v in selection.variants):
        raise UserError(
            "interval=bootstrap draws items and knows nothing of training seeds; with several seeds a variant use interval=t."
        )
    if len(drawn := demonstration_seeds(selection.variants)) > 1:
        raise UserError(
            f"interval=bootstrap draws items and knows nothing of demonstration seeds; with several ({drawn}) use interval=t."
        )


def build_from(held: Collected, selection: Selection, options: Options) -> Table:
    """The table of scores that are read already."""
    variants, numbers = selection.variants, held.shots
    first = variants[0].evaluations[0]
    resources = [_resources(v, variants[0], options) for v in variants]
    lines: list[tuple[str, str | None, tuple[int, ...], dict[Key, Compared]]] = []
    base = held.plain[variants[0].label]
    for variant in variants:
        label, seeds = variant.label, tuple(run.seed for run in variant.runs)
        own = held.plain[label]
        against = None if own is base else base
        lines.append((label, None, seeds, compared(own, against, options.pair_seeds)))
        for kind, found in held.controls.get(label, {}).items():
            lines.append((label, kind, seeds, compared(found, own, options.pair_seeds)))

    matched = {r.label: not r.mismatches for r in resources}
    blocks = []
    for chosen in ([held.tasks] if len(held.tasks) > 1 else []) + [[task] for task in held.tasks]:
        rows = []
        for label, control, seeds, row_of in lines:
            cells = {k: cell_of([row_of[t, k] for t in chosen], options.interval) for k in numbers}
            rows.append(Row(label, control, list(seeds), matched[label], cells))
        for family in ([r for r in rows if r.control is None], [r for r in rows if r.control is not None]):
            _correct([cell for row in family for cell in row.cells.values()])
        summaries = [first.tasks[t] for t in chosen]
        chances = [s.chance for s in summaries if s.chance is not None]
        blocks.append(
            Block(
                task=chosen[0] if len(chosen) == 1 else None,
                metric=", ".join(dict.fromkeys(s.metric for s in summaries)),
                kind=", ".join(dict.fromkeys(s.kind for s in summaries)),
                chance=sum(chances) / len(chances) if len(chances) == len(summaries) else None,
                rows=rows,
                detectable=_detectable(rows, numbers),
            )
        )
    run = variants[0].runs[0]
    table = Table(run.scale, f"{run.corpus} {run.corpus_fingerprint[:8]}", selection.plan, numbers, blocks, resources, [])
    table.notes = _notes(table, selection, options, held.drawn)
    return table


def _correct(cells: Sequence[Cell]) -> None:
    compared = [cell for cell in cells if cell.difference is not None]
    for cell, p in zip(compared, st.holm([c.difference.p for c in compared if c.difference]), strict=True):
        cell.p_holm = p


def _detectable(rows: Sequence[Row], numbers: Sequence[int]) -> dict[int, Detectable]:
    """From the errors of the comparison that is hardest to decide, for each number of shots."""
    found = {}
    for k in numbers:
        base = rows[0].cells[k].score
        compared = [
            (r.cells[k], d) for r in rows[1:] if r.control is None and (d := r.cells[k].difference) and not math.isnan(d.se)
        ]
        if compared:
            cell, difference = max(compared, key=lambda pair: pair[1].se)
            one, other = (s.se if cell.difference_has_seeds else s.se_items for s in (base, cell.score))
            paired, unpaired = (st.detectable_from_se(se, df=difference.df) for se in (difference.se, math.hypot(one, other)))
            found[k] = Detectable(unpaired, paired, st.correlation(one, other, difference.se))
    return found


def _resources(variant: Variant, baseline: Variant, options: Options) -> Resources:
    def mean(pick: str, of: Variant = variant) -> float:
        return float(np.mean([getattr(run, pick) for run in of.runs]))

    marks, mismatches = options.marks, []
    if marks is not None:
        mismatches += [marks[variant.label]] if variant.label in marks else []
    for key, name in (("tokens_seen", "tokens"), ("images_seen", "images"), ("steps", "steps")) if marks is None else ():
        own, base = mean(key), mean(key, baseline)
        if abs(own - base) > options.match_within * base:
            mismatches.append(f"{name} {own / base - 1:+.1%}" if base else f"{name} {own:.0f} instead of 0")
    return Resources(
        label=variant.label,
        seeds=[run.seed for run in variant.runs],
        parameters=variant.runs[0].parameters,
        tokens=mean("tokens_seen"),
        loss_tokens=mean("loss_tokens_seen"),
        images=mean("images_seen"),
        steps=mean("steps"),
        flops=mean("flops"),
        seconds=mean("seconds"),
        mismatches=mismatches,
        runs=[run.label for run in variant.runs],
        planned=dict(options.planned.get(variant.label, {})),
    )


def _notes(table: Table, selection: Selection, options: Options, drawn: list[int]) -> list[str]:
    interval, match_within = options.interval, options.match_within
    first = selection.variants[0].evaluations[0]
    kinds = sorted({kind for v in selection.variants for kind in v.controls})
    counts = [len(r.seeds) for r in table.resources]
    method = "percentiles of 10,000 paired bootstrap draws of clusters" if interval == "bootstrap" else "Student's t"
    notes = [
        f"Scores in points, ± one standard error. Δ: difference to {table.resources[0].label} on the same items, with its 95 % "
        f"interval ({method}). *: p < 0.05 after Holm's correction over all differences of one table.",
    ]
    if max(counts) == 1:
        notes.append(
            "Errors are item-level only: one training seed a variant. How much another seed would change is not in them."
        )
    else:
        notes.append(
            "Errors add item and training-seed variance where a variant has several seeds; 's' is the part of the seeds. Δ "
            "marked '(items)' holds no training-seed error: one of its two sides has a single training seed."
        )
    if len(drawn) > 1:
        notes.append(
            f"Scores are means over the demonstration seeds {', '.join(map(str, drawn))}, of the same items; 'd' is what their "
            "spread adds to the error. Demonstrations are shared by all rows: Δ holds the spread of the paired difference only."
        )
    used = {e.label: sorted(set(e.demonstration_seeds) - set(drawn)) for v in selection.variants for e in v.evaluations}
    if unused := {name: seeds for name, seeds in used.items() if seeds}:
        listed = "; ".join(f"{name}: {', '.join(map(str, seeds))}" for name, seeds in unused.items())
        notes.append(f"Demonstration seeds that not every row has are left out ({listed}).")
    notes.append(
        "Errors are clustered by image. The mean weighs tasks equally, SE = sqrt(sum SE²)/k, as if tasks shared no images."
    )
    sizes = []
    for name, task in first.tasks.items():
        held = {(task.shots[k].n, task.shots[k].clusters) for k in table.shots}
        n, clusters = max(held)
        sizes.append(
            f"{name} {n} items on {clusters} images" + (f", chance {task.chance:.1f}" if task.chance is not None else "")
        )
    notes.append(f"Sample: {'; '.join(sizes)}. Seed {first.seed}, plan {table.plan}, corpus {table.corpus}.")
    for block in table.blocks[:1]:
        if block.detectable:
            parts = [
                f"{k}-shot {d.unpaired:.1f} unpaired, {d.paired:.1f} at the correlation seen ({d.correlation:.2f})"
                for k, d in block.detectable.items()
            ]
            what = "means over tasks" if block.task is None else block.task
            notes.append(f"Smallest detectable difference of {what} (power 0.8, α 0.05, before Holm): {'; '.join(parts)}.")
    if kinds:
        notes.append(
            f"Controls ({', '.join(kinds)}): the same questions with other images, or with none. Their Δ is to the run "
            "above them, in a Holm family of their own; what they keep of the score is owed to text alone."
        )
    for r in table.resources:
        if r.mismatches and options.marks is None:
            notes.append(
                f"≠ {r.label} was not trained on as much as {table.resources[0].label} ({', '.join(r.mismatches)}; more than "
                f"{match_within:.0%} apart): its difference is not of the variant alone."
            )
    if selection.left_out:
        notes.append(f"Not in this table: {', '.join(selection.left_out)}.")
    return notes
