"""`python -m ablations.run suite=connector scale=tiny seeds=3`: a table or figure of the paper, planned, trained and evaluated.

    suite -> plan with costs (planning.py) -> cells trained and evaluated (runner.py) -> ablations/table.py

What is no setting of this command is one of every cell: `data=shapes train.steps=100`.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ablations.suites.composing import named
from ablations.suites.launchers import LauncherConfig
from ablations.suites.record import (
    DAMAGED,
    FAILED,
    FINISHED,
    TRAINED,
    State,
    SuiteCell,
    SuiteFolder,
    claimed,
    state_of,
    suites_folder,
)
from ablations.suites.suite import SCALES, SuiteConfig, suite_names
from configs.command import command
from configs.errors import UserError

ACTIONS = ("run", "plan", "status", "resume", "list")
BASE_MEMORY = 1.5e9
"""Bytes of a cell's processes beside the model: Python, torch and DeepSpeed, the loader's worker."""
HELD = 2.0
"""What a process on a CPU holds of memory for each byte alive: freed blocks are kept (loader.keep_freed_memory), and no two
steps have the same sizes. 1.8 GB alive at tiny became 5.1 after 150 steps and stayed there."""


@dataclass
class RunConfig:
    suite: SuiteConfig | None = None
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    action: str = "run"
    scale_name: str = "tiny"
    seeds: Any = None
    steps: int | None = None
    cells: list[str] = field(default_factory=list)
    parallel: int | None = None
    threads: int | None = None
    retries: int = 2
    dry_run: bool = False
    calibrate: bool = True
    processes: int = 1
    tflops: float | None = None
    mfu: float = 0.4
    price_per_hour: float | None = None
    folder: str | None = None

    def validate(self) -> None:
        if self.action not in ACTIONS:
            raise UserError(f"action={self.action}: must be one of {', '.join(ACTIONS)}.")
        if self.scale_name not in SCALES:
            raise UserError(f"scale={self.scale_name}: must be one of {', '.join(SCALES)}.")
        for key in ("steps", "parallel", "threads", "processes"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}={value}: must be at least 1.")
        if self.retries < 0:
            raise UserError(f"retries={self.retries}: must be 0 or more.")
        if not 0 < self.mfu <= 1 or (self.tflops is not None and self.tflops <= 0):
            raise UserError(f"mfu={self.mfu}, tflops={self.tflops}: a share in (0, 1], and TFLOP/s a device above 0.")
        self.launcher.validate()
        if self.suite is not None:
            self.suite.validate()
        elif self.action in ("run", "plan") or (self.action in ("status", "resume") and self.folder is None):
            raise UserError(f"suite=...: which one? {', '.join(suite_names())}.")
        self.seed_list()

    def seed_list(self) -> list[int]:
        given = self.seeds if self.seeds is not None else self.suite.seeds if self.suite is not None else 1
        if isinstance(given, bool) or not (isinstance(given, int) or (isinstance(given, list) and given)):
            raise UserError(f"seeds={given}: a number of them, or a list such as [0,1,2].")
        seeds = list(range(given)) if isinstance(given, int) else given
        if not seeds or len(set(seeds)) < len(seeds) or any(type(seed) is not int or seed < 0 for seed in seeds):
            raise UserError(f"seeds={given}: a number of them from 1 up, or a list of different numbers such as [0,1,2].")
        return seeds


def gathered(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments of this command, overrides of every cell): a bare first word is the action, evaluation.* the suite's."""
    own, cells = [], []
    names = {f.name for f in fields(RunConfig)}
    for number, argument in enumerate(arguments):
        key = argument.partition("=")[0].lstrip("+~")
        if number == 0 and argument in ACTIONS:
            own.append(f"action={argument}")
        elif key == "scale":
            own += named([argument], ["scale"])
        elif key.startswith("evaluation."):
            own.append(f"suite.{argument}")
        elif argument.startswith("-") or key.partition(".")[0] in {*names, "hydra"}:
            own.append(argument)
        else:
            cells.append(argument)
    return own, cells


@command("run", schema=RunConfig)
def _main(config: RunConfig) -> int:
    """Run a suite: every cell trained and evaluated, as many at once as this machine carries. Kill it and start it again at will.

    python -m ablations.run suite=connector scale=tiny seeds=3 dry_run=true    the plan with its costs, and stop
    python -m ablations.run suite=connector scale=tiny seeds=3
    python -m ablations.run status suite=connector         how every cell fares; list: every suite that was started
    python -m ablations.run resume suite=connector         the command it was started with, again

    scale=tiny            tiny, small or mm1: the same suite at every scale
    seeds=3               training seeds 0, 1, 2, or a list; null: as many as the suite says. A later, larger number adds to them
    steps=100             of the baseline, warm-up in proportion; the other cells follow by the suite's matching
    KEY=VALUE             what is no setting of this command is one of every cell: data=shapes image_encoder=vit_tiny
    evaluation.limit=50   how cells are evaluated: tasks, shots, limit, seed, demonstration_seeds, images, textcore
    cells=[LABEL,...]     only these of the suite's cells (and the baseline) are run now; all stay planned
    parallel=2 threads=1  cells at once, and CPU threads each; null: what cores, GPUs and memory allow
    retries=2             further attempts of a cell that failed
    launcher=local        or submitit, hostfile: docs/cluster.md
    calibrate=true        time a few real steps of each kind of cell for the plan (once a machine; then it is remembered)
    tflops=989 mfu=0.4 processes=64 price_per_hour=2   time and price on other machines: peak TFLOP/s a device, the share of it
                          that is reached, devices a cell, dollars a device and hour
    folder=NAME_OR_PATH   in place of <home>/suites/SUITE-SCALE
    """
    return act(config, _EXTRA)


_EXTRA: list[str] = []
"""Overrides of every cell from the command line; `main` fills it, for Hydra's grammar has no place for them."""


def main() -> None:
    own, cells = gathered(sys.argv[1:])
    sys.argv[1:] = own
    _EXTRA[:] = cells
    _main()


def act(config: RunConfig, extra: Sequence[str]) -> int:
    if config.action == "list":
        return _list()
    from ablations.suites.composing import step_overrides

    extra = [*extra, *step_overrides(config.scale_name, config.steps, extra)]
    if config.action in ("status", "resume"):
        from ablations.suites.planning import suite_folder

        name = config.suite.name if config.suite is not None else ""
        place = suite_folder(name, config.scale_name, extra, config.folder)
        return _status(place) if config.action == "status" else _resume(place)
    assert config.suite is not None
    _check_name(config.suite)
    return _run(config, extra)


def _check_name(suite: SuiteConfig) -> None:
    """A suite copied from another and left with its name would go into that one's folder."""
    from hydra.core.hydra_config import HydraConfig

    chosen = HydraConfig.get().runtime.choices.get("suite") if HydraConfig.initialized() else None
    if chosen is not None and chosen != suite.name:
        raise UserError(
            f"configs/suite/{chosen}.yaml: name: {suite.name}; it must be {chosen}, the file's own name, by which folders and "
            "tables go."
        )


# --------------------------------------------------------------------------------------------------------------- actions


@dataclass
class Plan:
    """What a call of this command is to do. `everything`: all cells of the suite, `cells`: those to be run now (cells=[...])."""

    suite: SuiteConfig
    place: SuiteFolder
    everything: list[SuiteCell]
    cells: list[SuiteCell]
    states: list[State]
    parallel: int
    threads: int
    gpus: int

    @property
    def runs(self) -> list[tuple[SuiteCell, State]]:
        """One of each hash: cells that are the same training are run once."""
        return list({cell.hash: (cell, state) for cell, state in zip(self.cells, self.states, strict=True)}.values())


def _run(config: RunConfig, extra: Sequence[str]) -> int:
    dry = config.dry_run or config.action == "plan"
    plan = _plan(config, extra, prepare=not dry)
    _show(config, plan)
    return 0 if dry else _train(config, plan)


def _plan(config: RunConfig, extra: Sequence[str], prepare: bool) -> Plan:
    """All that can be wrong is said here. `prepare`: corpora that are not there are made, for hashes need them."""
    from ablations.suites.composing import Composer
    from ablations.suites.evaluation import check_evaluation
    from ablations.suites.planning import build_cells, evaluation_keys, suite_folder, with_seconds
    from ablations.suites.suite import plan_cells
    from data_pipelines.prepare import ensure_corpus

    suite, scale = config.suite, config.scale_name
    assert suite is not None
    corpora = list(dict.fromkeys(cell.config.data.corpus for cell in plan_cells(suite, scale, extra=extra)))
    for name in corpora if prepare else ():
        ensure_corpus(name)
    check_evaluation(suite.evaluation, corpora)
    everything = build_cells(suite, scale, seeds=config.seed_list(), extra=extra, processes=config.processes)
    cells = everything
    if config.cells:
        if unknown := set(config.cells) - {cell.label for cell in everything}:
            known = ", ".join(dict.fromkeys(cell.label for cell in everything))
            raise UserError(f"cells: {', '.join(sorted(unknown))} are not in the suite. There are: {known}.")
        cells = [cell for cell in everything if cell.baseline or cell.label in config.cells]
    place = suite_folder(suite.name, scale, extra, config.folder)
    place.check(suite.name, scale)
    if config.tflops is not None:
        peak = config.tflops * 1e12 * config.mfu * config.processes
        cells = [replace(cell, cost=cell.cost | {"seconds": cell.cost["flops"] / peak}) for cell in cells]
        parallel, threads, gpus = 1, 1, 0
    else:
        parallel, threads, gpus = carried(config, max(cell.cost["memory"] for cell in cells))
        measure = config.calibrate and _fits(cells, gpus)
        cells = with_seconds(cells, Composer(), threads=threads, processes=parallel, measure=measure)
    keys = evaluation_keys(suite.evaluation)
    states = [state_of(place, cell, keys, config.retries) for cell in cells]
    return Plan(suite, place, everything, cells, states, parallel, threads, gpus)


def _show(config: RunConfig, plan: Plan) -> None:
    from ablations.suites.planning import evaluation_seconds
    from ablations.suites.show import plan_table

    suite = plan.suite
    print(f"Suite {suite.name} at scale {config.scale_name}: {suite.about}\nMatched by {suite.matching}. Per seed:\n")
    print(plan_table(plan.cells, plan.states, dollars_an_hour=config.price_per_hour, devices=config.processes))
    if config.tflops is not None:
        print(f"Assumed: {config.tflops:g} TFLOP/s a device, {config.mfu:.0%} of it reached (MFU), evaluation left out.")
        return
    left = sum(cell.cost.get("seconds", math.nan) for cell, _ in plan.runs if not cell.trained)
    wall = "time unknown"
    if not math.isnan(left):
        evaluating = evaluation_seconds(suite.evaluation) * sum(state.name != FINISHED for _, state in plan.runs)
        also = f"{evaluating / plan.parallel / 3600:.1f} of evaluation" if config.scale_name == "tiny" else "the evaluations"
        wall = f"about {left / plan.parallel / 3600:.1f} hours of training and {also}"
    print(f"{plan.parallel} at once, {plan.threads} threads each{f', {plan.gpus} GPUs' if plan.gpus else ''}: {wall}.")


def _train(config: RunConfig, plan: Plan) -> int:
    """Returns the exit status: 0, 1 with cells that failed, 130 where a signal stopped it."""
    from dataclasses import asdict

    from ablations.suites.launchers import make_launcher
    from ablations.suites.planning import evaluation_keys, write_job
    from ablations.suites.runner import Runner

    suite, place, cells = plan.suite, plan.place, plan.cells
    launcher = make_launcher(config.launcher, place.folder, plan.gpus)
    submitted = config.launcher.kind == "submitit"
    threads = plan.threads if config.launcher.kind == "local" and not plan.gpus else None

    def job(cell: SuiteCell) -> Path:
        return write_job(place, cell, suite.evaluation, train=launcher.train, threads=threads)

    with place.lock():  # a plan is written only by the one runner that works on it
        costed = {cell.name: cell for cell in cells}
        planned = [costed.get(cell.name, cell) for cell in plan.everything]
        place.save(asdict(suite), config.scale_name, as_typed([*sys.argv[1:], *_EXTRA], place.folder), planned)
        print(f"Logs and state: {place.folder}", flush=True)
        runner = Runner(
            place,
            cells,
            launcher,
            job,
            evaluations=evaluation_keys(suite.evaluation),
            parallel=len(plan.runs) if submitted and config.parallel is None else plan.parallel,
            retries=config.retries,
        )
        final = runner.run()
    itself = shlex.join(place.arguments(suite.name, config.scale_name))
    if runner.stopping:
        print(f"Stopped. Go on with the same command, or: python -m ablations.run resume {itself}")
        return 130
    if failed := [cell.name for cell in runner.cells.values() if final[cell.hash].name != FINISHED]:
        print(f"{len(failed)} runs are not finished: {', '.join(failed[:10])}. See {place.folder / 'logs'}", file=sys.stderr)
        for cell in runner.cells.values():
            if final[cell.hash].name == FAILED and not claimed(cell.hash):
                print(f"\n{cell.name}:\n{final[cell.hash].note}", file=sys.stderr)
        return 1
    what = f"Finished: {', '.join(dict.fromkeys(cell.label for cell in cells))}." if config.cells else "All finished."
    print(f"{what} Table and report: python -m ablations.table {itself}")
    return 0


def as_typed(arguments: Sequence[str], folder: Path) -> list[str]:
    """This command's arguments for another call, from any directory: `scale` as it is given, `folder` whole, no action."""
    found = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "scale_name":
            argument = f"scale={value}"
        elif key == "folder" and value != "null":
            argument = f"folder={folder if folder.parent != suites_folder().resolve() else folder.name}"
        if key != "action":
            found.append(argument)
    return found


def _fits(cells: Sequence[Any], gpus: int) -> bool:
    from ablations.suites.calibrate import LARGEST

    return gpus > 0 or max(cell.cost["parameters"] for cell in cells) <= LARGEST


def carried(config: RunConfig, memory: float) -> tuple[int, int, int]:
    """(cells at once, CPU threads each, GPUs): one cell a GPU, or one a core as long as memory lasts; what is given holds.

    memory: bytes that the largest cell needs.
    """
    import torch

    gpus = torch.cuda.device_count() if config.launcher.kind == "local" else 0
    cores = len(os.sched_getaffinity(0))
    if config.parallel is not None:
        parallel = config.parallel
    elif gpus:
        parallel = gpus
    else:
        parallel = max(1, min(cores // (config.threads or 1), int(available_memory() // (HELD * memory + BASE_MEMORY))))
    return parallel, config.threads or max(1, cores // parallel), gpus


def available_memory() -> float:
    """Bytes that new processes can have without swapping (Linux)."""
    text = Path("/proc/meminfo").read_text(encoding="utf-8")
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return float(found[1]) * 1024 if found else 4e9


def _status(place: SuiteFolder) -> int:
    from ablations.suites.matching import marks
    from ablations.suites.planning import evaluation_keys
    from ablations.suites.show import Tally, status_table
    from ablations.suites.suite import EvaluationConfig

    plan, cells = place.plan(), place.cells()
    keys = evaluation_keys(EvaluationConfig(**plan["suite"]["evaluation"]))
    states = [state_of(place, cell, keys, 0) for cell in cells]
    whole = [cell for cell, state in zip(cells, states, strict=True) if state.name in (FINISHED, TRAINED)]
    done = [(cell.label, cell.seed, cell.baseline, cell.run.info) for cell in whole]
    print(status_table(cells, states, marks(plan["suite"]["matching"], done)))
    print(f"\n{Tally.of({cell.hash: state for cell, state in zip(cells, states, strict=True)}.values())}  ({place.folder})")
    return 0


def _resume(place: SuiteFolder) -> int:
    """Starts the recorded command in this process's place."""
    arguments = place.plan()["arguments"]
    print(f"python -m ablations.run {shlex.join(arguments)}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "ablations.run", *arguments])


def _list() -> int:
    found = sorted(suites_folder().glob("*/plan.json"))
    for path in found:
        place = SuiteFolder(path.parent)
        try:
            cells = place.cells()
            states = [state_of(place, cell, [], 0).name for cell in cells]
            again = shlex.join(as_typed(place.plan()["arguments"], place.folder))
        except UserError as error:  # the others are listed all the same
            print(f"{path.parent.name:<32} {error}")
            continue
        trained, damaged = states.count(FINISHED), states.count(DAMAGED)
        also = f", {damaged} damaged" if damaged else ""
        print(f"{path.parent.name:<32} {trained:>4} of {len(cells):>4} trained{also}   python -m ablations.run {again}")
    if not found:
        print(f"No suite was started yet. There are: {', '.join(suite_names())}.")
    return 0


if __name__ == "__main__":
    main()
