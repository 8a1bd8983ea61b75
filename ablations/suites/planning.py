"""From a suite to a plan: cells composed, matched, costed, hashed, found among the runs; and what a cell's process is told.

    suite + scale + seeds + overrides -> plan_cells (suite.py) -> match (matching.py) -> SuiteCell with hash, run folder and cost

`suite_cells` is what a table asks: which run stands in which row.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ablations.suites.composing import Composer
from ablations.suites.cost import check_sources, cost_of, fingerprint
from ablations.suites.matching import match
from ablations.suites.record import RECORD_VERSION, SuiteCell, SuiteFolder, runs_by_hash, suites_folder
from ablations.suites.suite import EvaluationConfig, PlannedCell, SuiteConfig, load_suite, plan_cells
from configs.command import quote
from configs.errors import UserError
from data_pipelines import paths
from mm1.run import write_atomically

COSTS = ("parameters", "trained", "tokens", "images", "forward_flops", "backward_flops", "flops", "memory", "assumed")


QUICK_START = 100.0


def suite_folder(suite: str, scale: str, extra: Sequence[str] = (), folder: str | None = None) -> SuiteFolder:
    """<home>/suites/connector-tiny; with overrides for all cells a hash of them behind. `folder`: a path, or a name there."""
    if folder:
        given = Path(folder).expanduser()
        return SuiteFolder(given if given.is_absolute() or len(given.parts) > 1 else suites_folder() / folder)
    name = f"{suite}-{scale}"
    if extra:
        name += "-" + hashlib.sha256(json.dumps(sorted(extra)).encode()).hexdigest()[:6]
    return SuiteFolder(suites_folder() / name)


def suite_cells(
    suite: str | SuiteConfig,
    scale: str = "tiny",
    *,
    seeds: Sequence[int] | None = None,
    extra: Sequence[str] = (),
    folder: str | None = None,
) -> list[SuiteCell]:
    """The cells of a suite with the folders of their runs, the baseline's first: rows of a table are the labels, in this order.

    Reads the plan where the suite was started (all seeds that were ever planned in it), and composes it otherwise. A cell's run
    may not be there yet (`cell.trained`). Raises UserError for an unknown suite, and for a damaged plan.
    """
    config = load_suite(suite) if isinstance(suite, str) else suite
    place = suite_folder(config.name, scale, extra, folder)
    if place.plan_path.is_file():
        cells = place.cells()
        return [cell for cell in cells if seeds is None or cell.seed in seeds]
    return build_cells(config, scale, seeds=list(seeds) if seeds is not None else list(range(config.seeds)), extra=extra)


def build_cells(
    suite: SuiteConfig, scale: str, *, seeds: Sequence[int], extra: Iterable[str] = (), processes: int = 1
) -> list[SuiteCell]:
    """Compose, match, cost and hash every cell. Raises UserError that lists all that is invalid."""
    planned = plan_cells(suite, scale, seeds=seeds, extra=extra)
    problems: dict[str, str] = {}
    for label, cell in {cell.label: cell for cell in planned}.items():
        try:
            check_sources(cell.config)
            cost_of(cell.config)
        except UserError as error:
            problems[label] = str(error)
    if problems:
        listed = "\n  ".join(f"{label}: {text}" for label, text in list(problems.items())[:20])
        raise UserError(f"suite {suite.name}, scale {scale}: {len(problems)} cells cannot be trained:\n  {listed}")
    cells = match(suite, planned)
    costs: dict[str, dict[str, float]] = {}
    for label, cell in {cell.label: cell for cell in cells}.items():
        cost = cost_of(cell.config, processes)
        costs[label] = {key: float(getattr(cost, key)) for key in COSTS}
    known = runs_by_hash()
    return [_suite_cell(suite, cell, known, costs[cell.label]) for cell in cells]


def _suite_cell(suite: SuiteConfig, cell: PlannedCell, known: dict[str, Path], cost: dict[str, float]) -> SuiteCell:
    key = cell.config.hash(fingerprint(cell.config))
    folder = known.get(key, paths.runs() / f"{cell.config.run_name}-{key}")
    own = folder.name.rpartition("-")[0]
    # a run that was begun under another name goes on under it
    overrides = tuple(f"name={own}" if o.startswith("name=") else o for o in cell.overrides)
    paper = {str(shots): value for shots, value in suite.paper.get(cell.label, {}).items()}
    steps = cell.config.train.steps
    return SuiteCell(
        suite.name, cell.label, dict(cell.choice), cell.seed, cell.baseline, key, folder, overrides, steps, cost, paper
    )


def with_seconds(
    cells: Sequence[SuiteCell], composer: Composer, *, threads: int, processes: int, measure: bool
) -> list[SuiteCell]:
    """The cells with `seconds` of training in their cost, where they are known (calibrate.py, or a finished seed of the cell)."""
    from ablations.suites.calibrate import OVERHEAD, seconds_per_flop

    kinds = list({cell.label: cell for cell in cells}.values())
    taken = {cell.label: float(cell.run.info.get("seconds", 0)) for cell in cells if cell.trained}
    unknown = [cell for cell in kinds if cell.label not in taken]
    configs = [composer.compose(cell.overrides) for cell in unknown]
    rates = seconds_per_flop(configs, [c.overrides for c in unknown], threads=threads, processes=processes, measure=measure)
    for cell, rate in zip(unknown, rates, strict=True):
        if rate is not None:
            taken[cell.label] = rate * cell.cost["flops"]
    return [
        replace(cell, cost=cell.cost | ({"seconds": taken[cell.label] + OVERHEAD} if cell.label in taken else {}))
        for cell in cells
    ]


# ---------------------------------------------------------------------------------------------------------------- jobs


def evaluation_key(overrides: Sequence[str]) -> str:
    return hashlib.blake2b(json.dumps(list(overrides)).encode(), digest_size=6).hexdigest()


def evaluation_keys(evaluation: EvaluationConfig) -> list[str]:
    """One for each evaluation a cell must have to be finished."""
    keys = [evaluation_key(overrides) for overrides in evaluation.fewshot()]
    return keys + ([evaluation_key(["textcore", *evaluation.textcore])] if evaluation.textcore is not None else [])


def evaluation_seconds(evaluation: EvaluationConfig) -> float:
    """Of one cell at scale tiny on one core, from the quick start's: 100 s for 200 queries a task at 0, 4 and 8 shots.

    A prompt's cost goes with its images, one more than its shots.
    """
    prompts = (evaluation.limit or 1000) / 200 * sum(shots + 1 for shots in evaluation.shots) / 15
    return QUICK_START * prompts * len(evaluation.fewshot())


def write_job(
    place: SuiteFolder, cell: SuiteCell, evaluation: EvaluationConfig, *, train: Sequence[str] = (), threads: int | None = None
) -> Path:
    """What execute.py shall do for a cell. `train`: the launcher's own way to start `-m mm1.train`; empty: this Python."""
    python = [sys.executable, "-m"]
    own_threads = any(override.startswith("engine.threads=") for override in cell.overrides)
    more = [f"engine.threads={threads}"] if threads and not own_threads else []
    commands: list[dict[str, Any]] = [
        {"kind": "train", "argv": [*(train or [*python, "mm1.train"]), *cell.overrides, *more]},
    ]
    own = [f"threads={threads}"] if threads else []
    for overrides in evaluation.fewshot():
        given = [f"run={quote(str(cell.folder))}", *overrides]
        commands.append(
            {
                "kind": "fewshot",
                "key": evaluation_key(overrides),
                "overrides": given,
                "argv": [*python, "eval.fewshot", *given, *own],
            }
        )
    if evaluation.textcore is not None:
        key = evaluation_key(["textcore", *evaluation.textcore])
        argv = [*python, "eval.textcore", f"run={quote(str(cell.folder))}", *evaluation.textcore, *own]
        commands.append({"kind": "textcore", "key": key, "argv": argv})
    environment = {"TOKENIZERS_PARALLELISM": "false"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    job = {
        "version": RECORD_VERSION,
        "suite": cell.suite,
        "cell": cell.name,
        "run": str(cell.folder),
        "record": str(place.record_path(cell)),
        "log": str(place.log_path(cell)),
        "environment": environment,
        "commands": commands,
    }
    path = place.job_path(cell)
    write_atomically(path, json.dumps(job, indent=1) + "\n")
    return path
