"""What the runner prints: the plan with its costs, the live table, the status of every cell."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

from ablations.suites.record import DAMAGED, FAILED, FINISHED, INTERRUPTED, RUNNING, TRAINED, WAITING, State, SuiteCell
from ablations.tables.render import aligned, duration, si

ORDER = (FINISHED, RUNNING, TRAINED, INTERRUPTED, WAITING, FAILED, DAMAGED)

SHOWN = 6
"""Variants that are the same training that are named before they are only counted."""


@dataclass(frozen=True)
class Tally:
    """How many cells are in which state."""

    counts: dict[str, int]

    @classmethod
    def of(cls, states: Iterable[State]) -> Tally:
        counted = Counter(state.name for state in states)
        return cls({name: counted[name] for name in ORDER if counted[name]})

    def __str__(self) -> str:
        total = sum(self.counts.values())
        return f"{total} runs: " + ", ".join(f"{count} {name}" for name, count in self.counts.items())


class Live:
    """On a terminal a table that is drawn again in place, elsewhere a line for what has changed."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self.out, self.drawn = out, 0
        self.terminal = out.isatty()

    def say(self, text: str) -> None:
        self._wipe()
        print(text, file=self.out, flush=True)

    def show(self, tally: Tally, rows: Sequence[str]) -> None:
        if not self.terminal:
            return
        self._wipe()
        lines = [*rows, str(tally)]
        print("\n".join(lines), file=self.out, flush=True)
        self.drawn = len(lines)

    def _wipe(self) -> None:
        if self.drawn:
            self.out.write(f"\x1b[{self.drawn}F\x1b[J")
            self.drawn = 0

    def close(self, tally: Tally) -> None:
        self.say(str(tally))


def plan_table(cells: Sequence[SuiteCell], states: Sequence[State], *, dollars_an_hour: float | None, devices: float) -> str:
    """One row a variant: what each of its seeds costs, how many there are, and the sum over all that is left to do."""
    header = ["cell", "seeds", "parameters", "trained", "steps", "tokens", "images"]
    header += ["FLOPs fwd", "FLOPs bwd", "memory", "time", "done"]
    rows: list[list[str]] = []
    groups: dict[str, list[tuple[SuiteCell, State]]] = {}
    for cell, state in zip(cells, states, strict=True):
        groups.setdefault(cell.label, []).append((cell, state))
    for label, members in groups.items():
        cell, cost = members[0][0], members[0][0].cost
        mark = " (baseline)" if cell.baseline else ""
        done = sum(state.name == FINISHED for _, state in members)
        rows.append([
            label + mark, str(len(members)), si(cost["parameters"]), si(cost["trained"]), f"{cell.steps:,}", si(cost["tokens"]),
            si(cost["images"]), f"{cost['forward_flops']:.3g}", f"{cost['backward_flops']:.3g}", f"{cost['memory'] / 1e9:.1f} GB",
            duration(cost["seconds"]) if "seconds" in cost else "?", f"{done}/{len(members)}",
        ])  # fmt: skip
    runs = {cell.hash: (cell, state) for cell, state in zip(cells, states, strict=True)}
    left = [cell for cell, _ in runs.values() if not cell.trained]
    lines = [aligned(header, rows), ""]
    also = _shared(cells)
    lines.append(f"{len(cells)} cells, {len(runs)} runs{also}; to train: {len(left)} runs, {sum_flops(left):.3g} FLOPs.")
    seconds = [cell.cost.get("seconds") for cell in left]
    if left and all(value is not None for value in seconds):
        hours = sum(value or 0.0 for value in seconds) / 3600
        text = f"{hours:,.1f} hours of training one run at a time"
        if devices > 1:
            text += f" ({hours * devices:,.0f} device hours on {devices:g} devices each)"
        if dollars_an_hour is not None:
            text += f", {hours * devices * dollars_an_hour:,.0f} dollars at {dollars_an_hour:g} a device hour"
        lines.append(text + ".")
    if any(cell.cost.get("assumed") for cell in cells):
        lines.append("The corpus is not prepared here: what a sequence holds is assumed, hashes are provisional.")
    return "\n".join(lines)


def _shared(cells: Sequence[SuiteCell]) -> str:
    """Which cells are the same training, which may be meant or a setting that undoes what their axis varies."""
    labels: dict[str, list[str]] = {}
    for cell in cells:
        labels.setdefault(cell.hash, []).append(cell.label)
    alike = list(dict.fromkeys(" = ".join(dict.fromkeys(same)) for same in labels.values() if len(same) > 1))
    if not alike:
        return ""
    listed = "; ".join(alike[:SHOWN]) + (f"; and {len(alike) - SHOWN} more" if len(alike) > SHOWN else "")
    return f" ({len(cells) - len(labels)} cells are the same run as another and cost nothing: {listed})"


def sum_flops(cells: Iterable[SuiteCell]) -> float:
    return sum(cell.cost["flops"] for cell in cells)


def status_table(cells: Sequence[SuiteCell], states: Sequence[State], marks: dict[str, str]) -> str:
    rows = []
    for cell, state in zip(cells, states, strict=True):
        note = state.note.strip().splitlines()[-1] if state.note.strip() else ""
        if state.name in (FINISHED, TRAINED) and cell.label in marks:
            note = f"≠ {marks[cell.label]}"
        rows.append([cell.name, state.name, f"{state.steps:,}/{cell.steps:,}", str(state.attempts), cell.folder.name, note])
    return aligned(["cell", "state", "steps", "attempts", "run", "note"], rows)
