"""A finished or half-finished evaluation, read back from its folder, and the tasks that it was made on.

    <results>/plan.json      -> Saved: plan, settings, control     -> open_tasks: the corpus or official files, by fingerprint
    <results>/*.jsonl        -> Saved.cells: records in the plan's order; what is missing is said, never left out in silence

Everything is checked before it is used: the plan against its own fingerprint, a cell's items against the plan, and the corpus
against the fingerprint that the plan was made on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipelines import paths
from data_pipelines.shards import Manifest
from eval.again import command
from eval.plan import Plan, TaskPlan
from eval.prompts import PROMPTS
from eval.results import RESULTS_VERSION, Results
from eval.tasks.official.tasks import official_names
from eval.tasks.pool import TaskData
from eval.tasks.settings import TaskSettings
from eval.tasks.sources import read_sources
from mm1.attention.settings import SparqSettings

Record = dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """One evaluation's folder. `cells`: (task, shots) -> records, of the finished ones; `missing`: (task, shots) -> how many
    items were answered so far, of the others."""

    folder: Path
    label: str
    plan: Plan
    settings: dict[str, TaskSettings]
    control: str | None
    dtype: str
    weights: str
    cells: dict[tuple[str, int], list[Record]] = field(repr=False)
    missing: dict[tuple[str, int], int]
    sparq: SparqSettings | None = None

    @property
    def again(self) -> str:
        """What to do, with the command at its end."""
        return f"Go on where it stopped: {command(self)}"

    def results(self, tasks: Mapping[str, TaskData]) -> Results:
        """What eval/fewshot.py's Prompter asks for."""
        return Results(
            self.folder.parent,
            self.plan,
            dict(tasks),
            self.settings,
            self.control,
            self.dtype,
            {"name": self.label},
            self.weights,
            self.sparq,
        )


# ------------------------------------------------------------------------------------------------------------- finding


def find_evaluation(name: str) -> Path:
    """The results folder meant by its own path, by a run's folder, or by a run's name, where there is one evaluation.

    Raises UserError if there is none, or listing them if there are several.
    """
    from mm1.run import find_run

    path = Path(name).expanduser()
    if (path / "plan.json").is_file():
        return path.resolve()
    if (path / "summary.json").is_file():
        raise UserError(f"{path}: summary.json is there, but no plan.json, which says what was shown. Evaluate again.")
    if os.sep not in name and not path.is_dir():
        path = find_run(name).folder
    if not path.is_dir():
        raise UserError(f"results={name}: no such folder. Give a results folder (RUN/results/HASH), a run's folder or its name.")
    within = path if path.name == "results" else path / "results"
    found = sorted(plan.parent for plan in within.glob("*/plan.json"))
    if not found:
        evaluate = f"Evaluate the run: python -m eval.fewshot run={path}" if (path / "run.json").is_file() else ""
        raise UserError(
            f"results={name}: {path} holds no evaluation (no plan.json in it, nor in {within}/*). "
            f"{evaluate or 'Give a results folder (RUN/results/HASH), a run folder or its name.'}"
        )
    if len(found) > 1:
        listed = "".join(f"\n  {folder}  ({_describe(folder)})" for folder in found)
        raise UserError(f"results={name}: {len(found)} evaluations are there; give the folder of one:{listed}")
    return found[0].resolve()


def _describe(folder: Path) -> str:
    """What tells one evaluation of a run from another, in a few words."""
    raw = _load(folder / "plan.json")
    try:
        plan = raw["plan"]
        limit = "all items" if plan["limit"] is None else f"limit {plan['limit']}"
        parts = [", ".join(plan["tasks"]), f"shots {','.join(map(str, plan['shots']))}", limit, f"seed {plan['seed']}"]
        parts += [plan["mode"]] if plan["mode"] != "per_query" else []
        if plan.get("demonstration_seed") is not None:
            parts.append(f"demonstration seed {plan['demonstration_seed']}")
        parts += [f"images {raw['control']}"] if raw.get("control") else []
        parts += [str(raw["dtype"])] if raw.get("dtype") != "float32" else []
        parts.append(f"prompts {', '.join(sorted({task['prompts'] for task in raw['settings'].values()}))}")
        parts += [sparq_words(raw["sparq"])] if raw.get("sparq") else []
        return "; ".join(parts) + ("" if (folder / "summary.json").is_file() else "; not finished")
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder / "plan.json", error) from error


def sparq_words(settings: Mapping[str, Any]) -> str:
    """SparQ's settings in a few words, those that say nothing left out."""
    return f"SparQ {', '.join(f'{key} {value}' for key, value in settings.items() if value is not None)}"


# ------------------------------------------------------------------------------------------------------------- reading


def read_saved(folder: Path) -> Saved:
    """Raises UserError for results of another version, a damaged plan, cells that do not fit it, or no finished cell at all."""
    path = folder / "plan.json"
    raw = _load(path)
    if raw.get("version") != RESULTS_VERSION:
        raise UserError(f"{path}: results of version {raw.get('version')!r}, this suite reads {RESULTS_VERSION}. Evaluate again.")
    try:
        tasks = {name: TaskPlan(**task) for name, task in raw["plan"]["tasks"].items()}
        plan = Plan(**raw["plan"] | {"tasks": tasks})
        settings = {
            name: TaskSettings(**raw["settings"][name] | {"stop": tuple(raw["settings"][name]["stop"])}) for name in tasks
        }
        found = plan.fingerprint, raw["plan_fingerprint"]
        control, dtype, weights = raw["control"], str(raw["dtype"]), str(raw["weights"])
        sparq = SparqSettings(**raw["sparq"]) if raw.get("sparq") else None
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    if found[0] != found[1]:
        raise UserError(f"{path}: its fingerprint says {found[1]}, its content {found[0]}. It was changed; evaluate again.")
    for name, task in settings.items():
        if task.prompts not in PROMPTS:
            raise UserError(f"{path}: task {name} was asked with prompts {task.prompts!r}. Known here: {', '.join(PROMPTS)}.")
    cells: dict[tuple[str, int], list[Record]] = {}
    missing: dict[tuple[str, int], int] = {}
    for name in tasks:
        for shots in plan.shots:
            if (file := folder / f"{name}.{shots}.jsonl").is_file():
                cells[name, shots] = _records(file, tasks[name].queries)
            else:
                partial = file.with_name(file.name + ".partial")
                missing[name, shots] = partial.read_bytes().count(b"\n") if partial.is_file() else 0
    saved = Saved(folder, _label(folder), plan, settings, control, dtype, weights, cells, missing, sparq)
    if not cells:
        raise UserError(f"{folder}: no task is finished yet at any number of shots. {saved.again}")
    return saved


def _records(path: Path, queries: Sequence[str]) -> list[Record]:
    try:
        # not splitlines(): a prediction may hold U+2028 or U+0085, which JSON leaves as they are and splitlines() cuts at
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        ids = [record["id"] for record in records]
        for record in records:
            if not math.isfinite(record["score"]) or not isinstance(record["prediction"], str) or "cluster" not in record:
                raise ValueError(f"item {record['id']}: no score, cluster or prediction")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or half-written ({error!r}). Delete it and evaluate again.") from error
    if ids != list(queries):
        raise UserError(f"{path}: its {len(ids)} items are not the plan's {len(queries)}. Delete the file and evaluate again.")
    return records


def _label(folder: Path) -> str:
    """The run's name as commands take it: its folder's, or the model's that was evaluated."""
    held = folder.parent.parent if folder.parent.name == "results" else folder
    return held.name


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from error
    return content if isinstance(content, dict) else {}


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error!r}). Delete {path.parent} and evaluate again.")


# --------------------------------------------------------------------------------------------------------------- tasks


def open_tasks(
    saved: Saved, *, task_corpus: str | None = None, datasets: str | None = None, files: Mapping[str, Any] | None = None
) -> dict[str, TaskData]:
    """The tasks as they were evaluated. Without `task_corpus`: the run's own corpus, or the one of the plan's name.

    Raises UserError naming what was looked at, if it is gone or has another fingerprint.
    """
    return find_tasks(
        list(saved.plan.tasks),
        whose=str(saved.folder),
        fingerprint=saved.plan.corpus_fingerprint,
        corpora=[paths.corpus(task_corpus)] if task_corpus else corpora_of(saved.folder.parent.parent, saved.plan.corpus),
        datasets=datasets,
        files=files,
        shots=saved.plan.shots[-1],
    )


def corpus_fingerprint(folder: Path) -> str | None:
    """Of the data that an evaluation's plan was made on; None where no plan says so."""
    plan = (_load(folder / "plan.json") if (folder / "plan.json").is_file() else {}).get("plan")
    return plan.get("corpus_fingerprint") if isinstance(plan, dict) else None


def corpora_of(run_folder: Path, name: str) -> list[Path]:
    """Where the corpus may lie: where the run's record says, or under `name` (of a plan: CORPUS+DATASETS) in the home."""
    from mm1.run import Run

    recorded = Run(run_folder).info.get("corpus")
    own = [str(recorded["name"])] if isinstance(recorded, dict) and "name" in recorded else []
    return list(dict.fromkeys(map(paths.corpus, [*own, name.partition("+")[0]])))


def find_tasks(
    names: Sequence[str],
    *,
    whose: str,
    fingerprint: str,
    corpora: Sequence[Path],
    datasets: str | None = None,
    files: Mapping[str, Any] | None = None,
    shots: int = 0,
) -> dict[str, TaskData]:
    """Task -> its items, from the first of `corpora` (with the official files of `datasets`) that has this fingerprint.

    `names` are all the tasks of the evaluation and `shots` its largest number, since both are part of the fingerprint of official
    files. Raises UserError naming each place that was looked at and what was found there.
    """
    official = [name for name in names if name in official_names()]
    problems = []
    for corpus in corpora:
        if datasets is None or len(official) < len(names):
            if not (corpus / "manifest.json").is_file():
                problems.append(f"there is no corpus at {corpus}")
                continue
            if datasets is None and (there := Manifest.load(corpus).fingerprint) != fingerprint:
                problems.append(_not_it(str(corpus), "corpus", whose, there, fingerprint))
                continue
        tasks, _, there = read_sources(names, corpus=corpus, datasets=datasets, overrides=files, shots=shots)
        if there == fingerprint:
            return {task.name: task for task in tasks}
        problems.append(
            _not_it(
                f"{corpus} with {datasets}" if len(official) < len(names) else str(datasets), "source", whose, there, fingerprint
            )
        )
        if len(official) == len(names):
            break
    if official and datasets is None:
        remedy = f"{', '.join(official)} may be from official files: say where they lie, datasets=FOLDER."
    elif datasets is not None:
        remedy = "Give the datasets=, files and corpus of that evaluation; changed annotations are other data."
    else:
        remedy = "Prepare it again with the version of the suite that was used then, or say where it lies: task_corpus=FOLDER."
    raise UserError(f"{'; '.join(problems)}. {remedy}")


def _not_it(place: str, what: str, whose: str, there: str, wanted: str) -> str:
    return f"{place} is not the {what} of {whose}: its fingerprint is {there[:8]}, the evaluation's {wanted[:8]}"
