"""A suite's folder: what was planned, how each cell fares, its logs. The cells' runs lie under <home>/runs like all others.

    <home>/suites/connector-tiny/
        plan.json            the suite's settings, the command, every cell with its overrides and the folder of its run
        cells/<hash>.json    attempts, state, the error if it failed, the folders of its evaluations
        jobs/<hash>.json     what a cell's process is told to do (execute.py)
        logs/<name>.log      everything a cell printed
        .lock                held by the runner

A run is known by its hash, whatever its name: a cell that another suite (or mm1.train itself) has trained is found and not
repeated.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ablations.reading import read_object
from configs.errors import UserError
from data_pipelines import paths
from mm1.run import Run, write_atomically

RECORD_VERSION = 1


@dataclass(frozen=True)
class SuiteCell:
    """A cell as the table and the runner need it. `folder`: its run's, whether or not that is there yet."""

    suite: str
    label: str
    choice: dict[str, str]
    seed: int
    baseline: bool
    hash: str
    folder: Path
    overrides: tuple[str, ...]
    steps: int
    cost: dict[str, float] = field(default_factory=dict)
    """Of the plan: parameters, trained, tokens, images, flops, memory, and seconds where they are known."""
    paper: dict[str, float] = field(default_factory=dict)
    """The paper's value by number of shots, where there is one."""

    @property
    def name(self) -> str:
        return f"{self.label}.seed{self.seed}"

    @property
    def run(self) -> Run:
        return Run(self.folder)

    @property
    def trained(self) -> bool:
        return self.run.finished


def suites_folder() -> Path:
    return paths.home() / "suites"


def runs_by_hash() -> dict[str, Path]:
    """hash -> folder of a run, under whatever name; of several the finished one, else the one that got furthest."""
    found: dict[str, list[Path]] = {}
    for path in sorted(paths.runs().glob("*/run.json")):
        found.setdefault(path.parent.name.rpartition("-")[2], []).append(path.parent)

    def progress(folder: Path) -> tuple[bool, int]:
        run = Run(folder)
        return run.finished, int(run.info.get("steps", 0))

    return {key: folders[0] if len(folders) == 1 else max(folders, key=progress) for key, folders in found.items()}


@dataclass
class SuiteFolder:
    folder: Path
    _locked: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()

    @property
    def plan_path(self) -> Path:
        return self.folder / "plan.json"

    def plan(self) -> dict[str, Any]:
        """Raises UserError where there is none, or it is damaged or of another version."""
        if not self.plan_path.is_file():
            known = ", ".join(sorted(path.parent.name for path in suites_folder().glob("*/plan.json"))) or "none yet"
            raise UserError(f"{self.folder} holds no suite (no plan.json). Suites that were started: {known}.")
        return read_object(
            self.plan_path, RECORD_VERSION, f"Delete {self.folder} and start the suite again; trained cells are found again."
        )

    def cells(self) -> list[SuiteCell]:
        """As planned last."""
        cells = self._planned()
        if twice := [name for name, count in Counter(cell.name for cell in cells).items() if count > 1]:
            raise UserError(
                f"{self.plan_path} has {', '.join(sorted(twice)[:6])} twice: one row would count a seed doubly. Start the suite "
                "again, which writes the plan anew; trained cells are found again."
            )
        return cells

    def _planned(self) -> list[SuiteCell]:
        plan = self.plan()
        try:
            return [
                SuiteCell(**cell | {"folder": Path(cell["folder"]), "overrides": tuple(cell["overrides"])})
                for cell in plan["cells"]
            ]
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.plan_path} is damaged ({error}). Delete {self.folder} and start the suite again.") from error

    def check(self, suite: str, scale: str) -> None:
        """Raises UserError where the folder belongs to another suite or scale, or is no suite's."""
        if self.plan_path.is_file():
            there = self.plan()
            if (name := there["suite"].get("name"), there["scale"]) != (suite, scale):
                raise UserError(
                    f"{self.folder} holds suite {name}, scale {there['scale']}, not {suite}, {scale}. "
                    "Give this one another folder=..."
                )
        elif self.folder.is_dir() and any(path.name != ".lock" for path in self.folder.iterdir()):
            raise UserError(f"{self.folder} holds something else than a suite (no plan.json). Give another folder=...")

    def save(self, suite: dict[str, Any], scale: str, arguments: Sequence[str], cells: Sequence[SuiteCell]) -> None:
        """Write the plan. Cells of other seeds stay in it while their row's settings are the same.

        Raises UserError, with nothing written, where the folder belongs to another suite or scale.
        """
        self.check(suite["name"], scale)
        kept = self._of_other_seeds(cells) if self.plan_path.is_file() else []
        for name in ("cells", "jobs", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        plan = {"version": RECORD_VERSION, "suite": suite, "scale": scale, "arguments": list(arguments)}
        plan["cells"] = [asdict(cell) | {"folder": str(cell.folder)} for cell in (*cells, *kept)]
        write_atomically(self.plan_path, json.dumps(plan, indent=1) + "\n")

    def _of_other_seeds(self, cells: Sequence[SuiteCell]) -> list[SuiteCell]:
        """Those of the plan that is there whose row is in the new one, with the same settings, but not their seed."""
        rows, known = {cell.label: cell for cell in cells}, {(cell.label, cell.seed) for cell in cells}
        kept = []
        for old in self._planned():
            row = rows.get(old.label)
            if row is None or (old.label, old.seed) in known or old.steps != row.steps:
                continue
            if _without_seed(old.overrides) == _without_seed(row.overrides):
                kept.append(replace(old, baseline=row.baseline, choice=row.choice, paper=row.paper))
                known.add((old.label, old.seed))
        return kept

    def arguments(self, suite: str, scale: str) -> list[str]:
        """The suite as other commands are told of it: `suite=`, `scale=`, and `folder=` where it is not the usual one."""
        usual = self.folder == suites_folder().resolve() / f"{suite}-{scale}"
        name = self.folder.name if self.folder.parent == suites_folder().resolve() else str(self.folder)
        return [f"suite={suite}", f"scale={scale}", *([] if usual else [f"folder={name}"])]

    def record_path(self, cell: SuiteCell) -> Path:
        return self.folder / "cells" / f"{cell.hash}.json"

    def record(self, cell: SuiteCell) -> dict[str, Any]:
        """What is known of a cell's attempts; empty before the first. Raises UserError for a record damaged or of others."""
        path = self.record_path(cell)
        if not path.is_file():
            return {}
        record = read_object(path, RECORD_VERSION, "Delete that file; the cell's run is found again.")
        if record.get("suite") != cell.suite or record.get("hash") != cell.hash:
            raise UserError(
                f"{path} is of {record.get('suite')} {record.get('hash')}, not of {cell.suite} {cell.hash}. Move it away."
            )
        return record

    def job_path(self, cell: SuiteCell) -> Path:
        return self.folder / "jobs" / f"{cell.hash}.json"

    def log_path(self, cell: SuiteCell) -> Path:
        return self.folder / "logs" / f"{file_name(cell.name)}.log"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Raises UserError where another runner holds the suite. Within a lock of this object it is held already."""
        if self._locked:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as file:
            if not take(file.fileno()):
                raise UserError(f"{self.folder}: another runner works on this suite. Wait for it or stop it.")
            self._locked = True
            try:
                yield
            finally:
                self._locked = False


def file_name(text: str) -> str:
    """The text as the name of a file: other signs than letters, digits, `.`, `-`, `+` and `_` become `_`."""
    return re.sub(r"[^\w.+-]", "_", text, flags=re.ASCII)


def _without_seed(overrides: Sequence[str]) -> tuple[str, ...]:
    return tuple(o for o in overrides if not o.startswith(("seed=", "train.steps=", "optim.warmup_steps=", "name=")))


def update_record(path: Path, **values: Any) -> None:
    """Merge values into a cell's record."""
    old = read_object(path, RECORD_VERSION, "Delete that file; the cell's run is found again.") if path.is_file() else {}
    write_atomically(path, json.dumps({"version": RECORD_VERSION} | old | values, indent=1) + "\n")


def take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------- states

FINISHED, TRAINED, RUNNING, WAITING, INTERRUPTED, FAILED, DAMAGED = (
    "finished", "trained", "running", "waiting", "interrupted", "failed", "damaged",
)  # fmt: skip


@dataclass(frozen=True)
class State:
    """How a cell fares. `steps`: done; `note`: the error of a failed or damaged one."""

    name: str
    steps: int = 0
    attempts: int = 0
    note: str = ""


def evaluated(record: dict[str, Any], cell: SuiteCell, evaluations: Sequence[str]) -> bool:
    """Whether every evaluation that is asked for has its results. Raises UserError for one that is half-written."""
    done = record.get("evaluations", {})
    for key in evaluations:
        if key not in done:
            return False
        if done[key] is None:
            if not has_textcore(cell.run):
                return False
            continue
        path = cell.folder / "results" / done[key] / "summary.json"
        if not path.is_file():
            return False
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no UTF-8
            raise UserError(f"{path} is half-written ({error}). Delete {path.parent} to evaluate again.") from error
    return True


def has_textcore(run: Run) -> bool:
    """Whether results of eval.textcore are there still. They have no folder of their own, so a cell's record names none."""
    return any((run.results / "textcore").glob("*.json"))


def state_of(suite: SuiteFolder, cell: SuiteCell, evaluations: Sequence[str], retries: int) -> State:
    """From the files alone: a runner need not be there."""
    try:
        record = suite.record(cell)
        info = cell.run.info if cell.folder.is_dir() else {}
        attempts, steps = int(record.get("attempts", 0)), int(info.get("steps", 0))
        if info and info.get("hash") != cell.hash:
            raise UserError(f"{cell.folder} holds the run {info.get('hash')}, not {cell.hash}. Move it away.")
        trained = cell.trained
        if trained and evaluated(record, cell, evaluations):
            return State(FINISHED, steps, attempts)
    except UserError as error:
        return State(DAMAGED, note=str(error))
    if claimed(cell.hash):
        return State(RUNNING, max(steps, logged_step(cell.run)), attempts)
    if record.get("state") == FAILED and int(record.get("failures", 0)) > retries:
        return State(FAILED, steps, attempts, str(record.get("error", "")))
    if trained:
        return State(TRAINED, steps, attempts)
    return State(INTERRUPTED if steps or attempts else WAITING, steps, attempts)


def logged_step(run: Run) -> int:
    """The last step that metrics.jsonl has; it is ahead of run.json, which is written with checkpoints."""
    try:
        with open(run.metrics, "rb") as file:
            file.seek(max(0, run.metrics.stat().st_size - 2000))
            lines = file.read().split(b"\n")
        return int(json.loads(lines[-2])["step"])
    except (OSError, IndexError, ValueError, KeyError):
        return 0


# ---------------------------------------------------------------------------------------------------------------- claims


def claim_path(key: str) -> Path:
    return suites_folder() / ".claims" / f"{key}.lock"


def claim(key: str) -> int | None:
    """A descriptor that holds the claim on a run, for the process that works on it; None where another one has it.

    The kernel's lock, inherited by the cell's processes: it lasts until the last of them is gone, though their runner was killed.
    """
    path = claim_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")  # noqa: SIM115 (detached below)
    if not take(file.fileno()):
        file.close()
        return None
    descriptor = os.dup(file.fileno())
    file.close()
    return descriptor


def claimed(key: str) -> bool:
    """Whether a process works on that run now."""
    path = claim_path(key)
    if not path.is_file():
        return False
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
