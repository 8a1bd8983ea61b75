"""Held-out loss of a suite's rows, compared seed by seed: where scores cannot tell variants apart yet, losses often can.

    run.json's `validation` of every trained cell -> loss of each kind of data (nats a token), and what the pictures are worth:
    captions with another's picture less captions with their own

All runs of a suite are measured on the same held-out sequences and, within a training seed, saw the same documents in the same
order. So a difference is taken within each seed, and its 95 % interval is Student's t over the seeds' differences; with one seed
there is none. An effect of an axis is averaged over the settings of the other axes that have both, as in effects.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ablations import statistics as st
from ablations.suites.record import SuiteCell
from ablations.tables.sections import Section

PREFIX, SHUFFLED, WORTH = "loss_", "_shuffled_images", "pictures' worth"
Losses = Mapping[str, float]
"""Kind of data -> nats a token."""


@dataclass(frozen=True)
class Change:
    """Of a loss, over `seeds`; `se` nan with one seed. `p_holm`: Holm over all changes of one table."""

    difference: st.Difference
    seeds: tuple[int, ...]
    p_holm: float = math.nan


@dataclass(frozen=True)
class LossRow:
    """`means`: over `seeds`; `changes`: against the baseline's, empty for the baseline and where no seed is in common."""

    label: str
    seeds: tuple[int, ...]
    means: dict[str, float]
    changes: dict[str, Change]


@dataclass(frozen=True)
class LossEffect:
    """Variant against the baseline's of one axis, averaged over `pairs` settings of the others."""

    axis: str
    variant: str
    against: str
    changes: dict[str, Change]
    pairs: int


@dataclass
class HeldOut:
    kinds: list[str]
    rows: list[LossRow]
    effects: list[LossEffect]


def held_out_of(cells: Sequence[SuiteCell], axes: Mapping[str, Sequence[str]]) -> HeldOut | None:
    """Of all trained cells, evaluated or not, the baseline first. None where no run was validated. Raises UserError for a damaged
    run.json."""
    losses: dict[str, dict[int, Losses]] = {}
    choices: dict[str, dict[str, str]] = {}
    for cell in cells:
        if cell.trained and (own := _losses(cell.run.info.get("validation") or {})):
            losses.setdefault(cell.label, {})[cell.seed] = own
            choices[cell.label] = cell.choice
    base = next((cell.label for cell in cells if cell.baseline), "")
    if base not in losses:
        return None
    kinds = list(dict.fromkeys(kind for seeds in losses.values() for own in seeds.values() for kind in own))
    order = [base, *(label for label in losses if label != base)]
    rows = []
    for label in order:
        by_seed = losses[label]
        means = {k: math.fsum(found) / len(found) for k in kinds if (found := [v[k] for v in by_seed.values() if k in v])}
        changes = {} if label == base else _changes(kinds, [(by_seed, losses[base])])
        rows.append(LossRow(label, tuple(sorted(by_seed)), means, changes))
    effects = _effects(kinds, losses, choices, axes, base)
    return HeldOut(
        kinds,
        [replace(row, changes=changes) for row, changes in zip(rows, _corrected([r.changes for r in rows]), strict=True)],
        [replace(e, changes=changes) for e, changes in zip(effects, _corrected([e.changes for e in effects]), strict=True)],
    )


def _losses(validation: Mapping[str, float]) -> dict[str, float]:
    """By kind of data; and by how much a picture of another's makes captions less likely, where that was measured."""
    found = {key.removeprefix(PREFIX): float(value) for key, value in validation.items() if key.startswith(PREFIX)}
    shuffled = {kind.removesuffix(SHUFFLED): found.pop(kind) for kind in list(found) if kind.endswith(SHUFFLED)}
    for kind, value in shuffled.items():
        if kind in found:
            found[WORTH if len(shuffled) == 1 else f"{WORTH}, {kind}"] = value - found[kind]
    return found


def _changes(kinds: Sequence[str], pairs: Sequence[tuple[Mapping[int, Losses], Mapping[int, Losses]]]) -> dict[str, Change]:
    """Each pair's first less its second, averaged over the pairs within a seed, over the seeds that all of them have."""
    found = {}
    for kind in kinds:
        held = [{s for s in one if s in other and kind in one[s] and kind in other[s]} for one, other in pairs]
        seeds = tuple(sorted(set.intersection(*held)))
        if seeds:
            values = [math.fsum(one[s][kind] - other[s][kind] for one, other in pairs) / len(pairs) for s in seeds]
            found[kind] = Change(_over_seeds(values), seeds)
    return found


def _over_seeds(values: Sequence[float]) -> st.Difference:
    mean, n = math.fsum(values) / len(values), len(values)
    if n < 2:
        return st.Difference(mean, math.nan, math.nan, math.nan, math.nan, 0)
    return st.difference(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n), n - 1)


def _corrected(tables: Sequence[dict[str, Change]]) -> list[dict[str, Change]]:
    known = [(i, kind) for i, changes in enumerate(tables) for kind, c in changes.items() if not math.isnan(c.difference.p)]
    corrected = st.holm([tables[i][kind].difference.p for i, kind in known])
    found = [dict(changes) for changes in tables]
    for (i, kind), p in zip(known, corrected, strict=True):
        found[i][kind] = replace(found[i][kind], p_holm=p)
    return found


def _effects(
    kinds: Sequence[str],
    losses: Mapping[str, Mapping[int, Losses]],
    choices: Mapping[str, Mapping[str, str]],
    axes: Mapping[str, Sequence[str]],
    base: str,
) -> list[LossEffect]:
    varied = [axis for axis, variants in axes.items() if len(variants) > 1]
    if len(varied) < 2:
        return []
    by_choice = {tuple(choice[axis] for axis in axes): label for label, choice in choices.items()}
    found = []
    for axis in varied:
        against = choices[base][axis]
        for variant in (v for v in axes[axis] if v != against):
            pairs = [
                (losses[label], losses[other])
                for label, choice in choices.items()
                if choice[axis] == variant and (other := by_choice.get(tuple(against if a == axis else choice[a] for a in axes)))
            ]
            if pairs and (changes := _changes(kinds, pairs)):
                found.append(LossEffect(axis, variant, against, changes, len(pairs)))
    return found


# ------------------------------------------------------------------------------------------------------------ as text


def held_out_sections(found: HeldOut) -> list[Section]:
    header = ["variant", *(name for kind in found.kinds for name in (kind, f"Δ {kind}")), "seeds"]
    lines = []
    for i, row in enumerate(found.rows):
        line = [row.label]
        for kind in found.kinds:
            line.append(f"{row.means[kind]:.3f}" if kind in row.means else "")
            line.append("baseline" if i == 0 else _change(row.changes.get(kind)))
        lines.append([*line, ", ".join(map(str, row.seeds))])
    notes = [
        "Nats a token on held-out sequences, mean over seeds; Δ: paired within each training seed, with Student's 95 % interval "
        f"over the seeds; *: p < 0.05 after Holm's correction over this table. {WORTH}: captions' loss with another's "
        "picture, less that with their own."
    ]
    sections = [Section("Held-out loss", header, lines, notes=notes)]
    if found.effects:
        header = ["axis", "step", *(f"Δ {kind}" for kind in found.kinds), "pairs", "seeds"]
        lines = [
            [
                e.axis, f"{e.variant} - {e.against}", *(_change(e.changes.get(kind)) for kind in found.kinds), str(e.pairs),
                ", ".join(map(str, next(iter(e.changes.values())).seeds)),
            ]
            for e in found.effects
        ]  # fmt: skip
        sections.append(Section("What each axis does to the held-out loss", header, lines, 2))
    return sections


def _change(change: Change | None) -> str:
    if change is None:
        return ""
    d = change.difference
    if math.isnan(d.se):
        return f"{d.value:+.3f} [?]"
    return f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{' *' if change.p_holm < 0.05 else ''}"
