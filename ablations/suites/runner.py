"""Runs a plan to its end: so many cells at once, each in a process of its own; none that fails stops another.

    waiting -> running -> finished
                  |  \\-> failed, tried again up to `retries` times, then reported
                  \\-> interrupted, goes on from its checkpoint

The state is in files (record.py), so the runner may be killed at any moment and started again. A run that another suite's runner
is training is waited for, not trained twice. Ctrl-C stops the cells after their current step, with a checkpoint; a second Ctrl-C
kills.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from ablations.suites.launchers import Handle, Launcher
from ablations.suites.record import (
    DAMAGED,
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    WAITING,
    State,
    SuiteCell,
    SuiteFolder,
    claim,
    logged_step,
    state_of,
    update_record,
)
from ablations.suites.show import Live, Tally

POLL = 0.5
GRACE = 120.0
"""Seconds that stopped cells get to save before they are killed."""


@dataclass
class Running:
    cell: SuiteCell
    handle: Handle
    slot: int
    claim: int
    """A descriptor; its processes hold the same one, so that the run stays claimed if this runner is killed."""
    began: float


class Runner:
    """`run()` returns the final state of every cell, by hash.

    `make_job(cell)` writes the cell's job and returns its path. Cells of one hash are run once.
    """

    def __init__(
        self,
        place: SuiteFolder,
        cells: Sequence[SuiteCell],
        launcher: Launcher,
        make_job: Callable[[SuiteCell], Path],
        *,
        evaluations: Sequence[str],
        parallel: int,
        retries: int,
        poll: float = POLL,
        out: TextIO = sys.stdout,
    ) -> None:
        self.place, self.launcher, self.make_job = place, launcher, make_job
        self.cells = {cell.hash: cell for cell in reversed(cells)}
        # seed by seed: a suite that is looked at, or stopped, halfway has compared all its variants
        self.order = list(dict.fromkeys(cell.hash for cell in sorted(cells, key=lambda cell: cell.seed)))
        self.evaluations, self.retries, self.poll = evaluations, retries, poll
        self.parallel = min(parallel, launcher.parallel or parallel)
        self.running: dict[str, Running] = {}
        self.states: dict[str, State] = {}
        self.stopping = 0
        self.live = Live(out)

    def run(self) -> dict[str, State]:
        """Until every cell is finished, failed for good, or stopped. Raises UserError where another runner holds the suite."""
        with self.place.lock():
            previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                self.states = {key: self._state(key) for key in self.order}
                self._forget_failures()
                self._loop()
            finally:
                for running in self.running.values():
                    running.handle.kill()
                for number, handler in previous.items():
                    signal.signal(number, handler)
                self.live.close(self.tally())
        return self.states

    def _forget_failures(self) -> None:
        """A suite that is started again tries failed cells again."""
        for key, state in self.states.items():
            if state.name == FAILED:
                update_record(self.place.record_path(self.cells[key]), failures=0, state=INTERRUPTED)
                self.states[key] = self._state(key)

    def _loop(self) -> None:
        stopped_at = None
        while True:
            self._reap()
            if not self.stopping:
                self._start()
            elif stopped_at is None:
                stopped_at = time.monotonic()
                self.live.say(f"Stopping: {len(self.running)} cells save their last step. Once more kills them.")
                for running in self.running.values():
                    running.handle.stop()
            elif self.stopping > 1 or time.monotonic() - stopped_at > GRACE:
                for running in self.running.values():
                    running.handle.kill()
            if not self.running and (self.stopping or not self._open()):
                return
            self.live.show(self.tally(), self._rows())
            time.sleep(self.poll)

    def _open(self) -> list[str]:
        """Cells that may still be started, in order; those that failed come after the others."""
        waiting = [k for k in self.order if k not in self.running and self.states[k].name not in (FINISHED, FAILED, DAMAGED)]
        return sorted(waiting, key=lambda key: self._record_failures(key))

    def _record_failures(self, key: str) -> int:
        return int(self.place.record(self.cells[key]).get("failures", 0))

    def _start(self) -> None:
        if len(self.running) >= self.parallel:
            return
        for key in self._open():
            if len(self.running) >= self.parallel:
                return
            cell = self.cells[key]
            descriptor = claim(key)
            if descriptor is None:  # another runner's, or the last processes of an attempt that was killed
                self.states[key] = State(RUNNING, logged_step(cell.run), self.states[key].attempts)
                continue
            try:
                self.states[key] = self._state(key, own=True)
                if self.states[key].name in (FINISHED, DAMAGED):
                    self._report(cell, self.states[key])
                    continue
                slot = min(set(range(self.parallel)) - {running.slot for running in self.running.values()})
                attempts = self.states[key].attempts + 1
                told = {"suite": cell.suite, "label": cell.label, "seed": cell.seed, "hash": key, "run": str(cell.folder)}
                update_record(self.place.record_path(cell), **told, attempts=attempts, state=RUNNING)
                handle = self.launcher.start(self.make_job(cell), f"{cell.suite}.{cell.name}", descriptor, slot)
                self.running[key] = Running(cell, handle, slot, descriptor, time.monotonic())
                self.states[key] = State(RUNNING, self.states[key].steps, attempts)
                again = f", attempt {attempts}" if attempts > 1 else ""
                self.live.say(f"started   {cell.name}{again}")
            finally:
                if key not in self.running:
                    os.close(descriptor)

    def _reap(self) -> None:
        for key, running in list(self.running.items()):
            status = running.handle.poll()
            if status is None:
                continue
            del self.running[key]
            os.close(running.claim)
            cell, path = running.cell, self.place.record_path(running.cell)
            record = self.place.record(cell)
            if record.get("state") == RUNNING:  # killed before it could say so itself
                error = f"the cell's process ended with status {status} and no word; was it killed, or out of memory?"
                stopped = bool(self.stopping)
                failures = int(record.get("failures", 0)) + (0 if stopped else 1)
                update_record(path, state=INTERRUPTED if stopped else FAILED, failures=failures, error=error)
            self.states[key] = self._state(key, own=True)
            self._report(cell, self.states[key])

    def _report(self, cell: SuiteCell, state: State) -> None:
        record = self.place.record(cell) if state.name != DAMAGED else {}
        tried = int(record.get("failures", 0))
        if state.name == FINISHED:
            self.live.say(f"finished  {cell.name}")
        elif state.name == DAMAGED:
            self.live.say(f"damaged   {cell.name}: {state.note}")
        elif record.get("state") == FAILED:
            last = str(record.get("error") or "").strip().splitlines()
            what = "failed" if tried > self.retries else f"failed {tried} of {self.retries + 1} times, will be tried again"
            self.live.say(f"{what}: {cell.name}: {last[-1] if last else ''}  ({self.place.log_path(cell)})")
        else:
            self.live.say(f"stopped   {cell.name}")

    def _state(self, key: str, own: bool = False) -> State:
        state = state_of(self.place, self.cells[key], self.evaluations, self.retries)
        if own and state.name == RUNNING:  # the last of its processes may hold the claim for a moment longer
            record = self.place.record(self.cells[key])
            failed = record.get("state") == FAILED and int(record.get("failures", 0)) > self.retries
            name = FAILED if failed else INTERRUPTED if state.steps else WAITING
            return State(name, state.steps, state.attempts, str(record.get("error") or ""))
        return state

    def tally(self) -> Tally:
        return Tally.of(self.states.values())

    def _rows(self) -> list[str]:
        now = time.monotonic()
        rows = []
        for running in self.running.values():
            done = logged_step(running.cell.run)
            doing = "evaluating" if running.cell.trained else f"step {done:,} of {running.cell.steps:,}"
            rows.append(f"  {running.cell.name:<44} {doing:<24} {now - running.began:6.0f} s")
        return rows

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping += 1
