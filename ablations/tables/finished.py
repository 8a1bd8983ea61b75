"""Which cells of a suite are finished, and which evaluations of their runs are the suite's.

    plan.json -> cells -> cells/HASH.json: {evaluation key: results folder} -> Evaluation, controls by kind

Another evaluation of the same run (by hand, or by a suite with other settings) is never taken for the suite's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ablations.results import Evaluation, Run, read_evaluation, read_run, with_repeats
from ablations.suites.planning import evaluation_keys
from ablations.suites.record import DAMAGED, SuiteCell, SuiteFolder, state_of
from ablations.suites.suite import SuiteConfig
from ablations.tables.selection import Variant
from configs.errors import UserError

SHOWN = 10
"""Cells that an error lists before it only counts."""


@dataclass(frozen=True)
class Done:
    """A finished cell: its run, its evaluation and the controls, by kind."""

    cell: SuiteCell
    run: Run
    evaluation: Evaluation
    controls: dict[str, Evaluation]


def finished_cells(
    place: SuiteFolder, cells: Sequence[SuiteCell], config: SuiteConfig, evaluation: str | None
) -> tuple[dict[str, list[Done]], list[str]]:
    """(label -> finished cells in the seeds' order, "NAME: STATE" of the others). `evaluation`: the beginning of a plan or a
    folder, in place of the suite's own evaluations.

    Raises UserError for what is damaged, half-written, of another run or another suite, and where it is not clear what to take.
    """
    keys = evaluation_keys(config.evaluation)
    finished: dict[str, list[Done]] = {}
    missing: list[str] = []
    for cell in sorted(cells, key=lambda cell: cell.seed):
        done = _recorded(place, cell, keys) if evaluation is None else _named(cell, evaluation)
        if done is not None:
            finished.setdefault(cell.label, []).append(done)
    names = {done.cell.name for members in finished.values() for done in members}
    for cell in cells:
        if cell.name in names:
            continue
        state = state_of(place, cell, keys, 0)
        if state.name == DAMAGED:
            raise UserError(f"{cell.name}: {state.note}")
        what = f"no evaluation {evaluation}" if evaluation is not None and cell.trained else state.name
        missing.append(f"{cell.name}: {what}")
    return finished, missing


def _recorded(place: SuiteFolder, cell: SuiteCell, keys: Sequence[str]) -> Done | None:
    """The cell with the evaluations that the suite's record names; None where it is not finished."""
    held = place.record(cell).get("evaluations", {})
    if not all(key in held for key in keys):
        return None
    folders = [cell.folder / "results" / held[key] for key in dict.fromkeys(keys) if held[key] is not None]
    if not all((folder / "summary.json").is_file() for folder in folders) or not cell.trained:
        return None
    run = _run(cell)
    return _done(cell, run, [read_evaluation(folder, run) for folder in dict.fromkeys(folders)])


def _named(cell: SuiteCell, beginning: str) -> Done | None:
    """The cell with the evaluation whose plan or folder begins so, and its controls on that plan."""
    if not cell.trained:
        return None
    run = _run(cell)
    plain = [found for e in run.evaluations if e.control is None and (found := e.named(beginning)) is not None]
    if not plain:
        return None
    controls = [e for e in run.evaluations if e.control is not None and e.protocol == plain[0].protocol]
    return _done(cell, run, [*plain, *controls], merged=True)


def _run(cell: SuiteCell) -> Run:
    run = read_run(cell.folder)
    if run.hash != cell.hash:
        raise UserError(f"{cell.folder} holds the run {run.hash}, not {cell.hash} of {cell.name}. Move it away.")
    return run


def _done(cell: SuiteCell, run: Run, evaluations: Sequence[Evaluation], *, merged: bool = False) -> Done:
    by_kind: dict[str | None, Evaluation] = {}
    for e in evaluations if merged else with_repeats(evaluations):
        if e.control in by_kind:
            other = by_kind[e.control]
            raise UserError(
                f"{cell.name}: {other.hash} and {e.hash} under {run.folder / 'results'} are two evaluations of one kind. "
                f"Choose one with evaluation={e.hash}, or move one away."
            )
        by_kind[e.control] = e
    if None not in by_kind:
        raise UserError(
            f"{cell.name}: only controls ({', '.join(str(kind) for kind in by_kind)}) were evaluated. Start the suite with "
            "evaluation.images=[true,...]."
        )
    return Done(cell, run, by_kind[None], {kind: e for kind, e in by_kind.items() if kind is not None})


def variant(label: str, members: Sequence[Done]) -> Variant:
    """A control's row wants that control of every seed."""
    kinds = set.intersection(*({*done.controls} for done in members))
    controls = {kind: [done.controls[kind] for done in members] for kind in sorted(kinds)}
    return Variant(label, [done.run for done in members], [done.evaluation for done in members], controls)


def one_protocol(finished: dict[str, list[Done]]) -> str:
    """The plan that all cells answered. Raises UserError that lists those with another."""
    held = {done.cell.name: done.evaluation.protocol for members in finished.values() for done in members}
    if len(set(held.values())) > 1:
        counts = Counter(held.values())
        most = counts.most_common(1)[0][0]
        odd = [f"  {name}: plan {plan}" for name, plan in held.items() if plan != most]
        more = f"\n  and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
        raise UserError(
            f"{len(odd)} of {len(held)} cells were evaluated on another plan than {most}, so their items cannot be paired:\n"
            + "\n".join(odd[:SHOWN])
            + f"{more}\nStart the suite again to evaluate them on one plan, or name one with evaluation=..."
        )
    return next(iter(held.values()))
