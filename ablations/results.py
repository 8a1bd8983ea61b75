"""Runs and their evaluations, read back from disk and checked; the only place of `ablations` that knows the files' layout.

    <home>/runs/<name>-<hash8>/
        config.yaml                      the resolved configuration
        run.json                         what the run was and what it consumed; version 1
        metrics.jsonl                    one object a logged step
        results/<evaluation>/
            plan.json                    which items met which demonstrations, and the weights that answered
            summary.json                 plan, control, and per task and number of shots: mean, SE, items, clusters; version 1
            <task>.<shots>.jsonl         one object an item: id, cluster, score (points), prediction, ...

Evaluations of a run that differ in nothing but their demonstration seed are one `Evaluation` with `repeats`: the same items after
other demonstrations.

Nothing half-written is used: a line that does not parse, another number of items than the summary says, or items whose mean is
not the summary's, is a UserError that names the file and the command that mends it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ablations.reading import read_object
from ablations.statistics import Scores
from configs.errors import UserError
from data_pipelines import paths

VERSION = 1
COUNTERS = ("tokens_seen", "loss_tokens_seen", "images_seen", "steps", "flops", "seconds")
PLAN_KEY = '\n "plan": '  # of plan.json as eval/results.py indents it; no string of JSON holds a line break, so this is a key
MEAN_TOLERANCE = 0.01  # points; summaries may be rounded, per-item scores are not


@dataclass(frozen=True)
class ShotSummary:
    """One task at one number of shots: mean and clustered SE in points over n items in `clusters` clusters."""

    mean: float
    se: float
    n: int
    clusters: int


@dataclass(frozen=True)
class TaskSummary:
    metric: str
    kind: str
    chance: float | None
    shots: dict[int, ShotSummary]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one run. `plan`: fingerprint of which items meet which demonstrations; `control`: e.g. "shuffled".

    `items_plan`: fingerprint of the plan without its demonstration seed; empty where there is no plan.json. `repeats`: by
    demonstration seed, the same evaluation after other demonstrations, this one included; empty where there is none.
    """

    folder: Path
    run_name: str
    run_hash: str
    plan: str
    control: str | None
    seed: int
    tasks: dict[str, TaskSummary]
    settings: str = ""
    items_plan: str = ""
    demonstration_seed: int = 0
    weights: str = ""
    sparse: bool = False
    """Decoded with SparQ attention."""
    repeats: dict[int, Evaluation] = field(default_factory=dict, repr=False)

    @property
    def protocol(self) -> str:
        """What two evaluations must share to be compared: the plan but for its demonstration seed, metrics, prompts and number
        format."""
        return " ".join([(self.items_plan or self.plan)[:16], self.settings]).strip()

    def named(self, beginning: str) -> Evaluation | None:
        """This evaluation if its plan's or its folder's name begins so; of one with repeats the repeat that does, alone."""
        if self.items_plan.startswith(beginning):
            return self
        members = list(self.repeats.values()) or [self]
        return next((e for e in members if e.plan.startswith(beginning) or e.hash.startswith(beginning)), None)

    def of_seed(self, seed: int) -> Evaluation:
        """The evaluation with demonstrations of this seed; KeyError if there is none."""
        return self.repeats[seed] if self.repeats else {self.demonstration_seed: self}[seed]

    @property
    def demonstration_seeds(self) -> list[int]:
        return sorted(self.repeats) or [self.demonstration_seed]

    @property
    def hash(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        """The run's name, as a command takes it."""
        return f"{self.run_name}-{self.run_hash[:8]}"

    @property
    def shots(self) -> list[int]:
        """The numbers of shots that every task was evaluated with."""
        held = [set(task.shots) for task in self.tasks.values()]
        return sorted(set.intersection(*held)) if held else []

    def items(self, task: str, shots: int) -> list[dict[str, Any]]:
        """The per-item lines in plan order; raises UserError if they are incomplete or do not add up to the summary."""
        path = self.folder / f"{task}.{shots}.jsonl"
        lines = read_jsonl(path, required=("id", "cluster", "score"), remedy=self.remedy)
        summary = self.tasks[task].shots[shots]
        mean = sum(float(line["score"]) for line in lines) / max(1, len(lines))
        if len(lines) != summary.n or not abs(mean - summary.mean) <= MEAN_TOLERANCE:
            raise UserError(
                f"{path}: {len(lines)} items with a mean of {mean:.3f} points, but summary.json says {summary.n} items with "
                f"{summary.mean:.3f}. The two belong to different evaluations; {self.remedy}"
            )
        return lines

    def scores(self, task: str, shots: int) -> Scores:
        lines = self.items(task, shots)
        return Scores(
            task,
            tuple(str(line["id"]) for line in lines),
            np.array([float(line["score"]) for line in lines]),
            tuple(str(line["cluster"]) for line in lines),
        )

    @property
    def remedy(self) -> str:
        return f"delete {self.folder} and evaluate again: python -m eval.fewshot run={self.label}"


@dataclass(frozen=True)
class Run:
    """A run's record. flops: total; seconds: wall time; tokens_seen: text and image tokens, loss_tokens_seen: those with a loss.
    `identity`: all that changes the weights (mm1.config). What an unfinished run has not counted yet is 0."""

    folder: Path
    name: str
    hash: str
    ablation: tuple[str, ...]
    seed: int
    status: str
    parameters: dict[str, int]
    tokens_seen: int
    loss_tokens_seen: int
    images_seen: int
    steps: int
    flops: float
    seconds: float
    corpus: str
    corpus_fingerprint: str
    identity: dict[str, Any] = field(repr=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, read when it is asked for: parsing YAML takes longer than all else that a table reads of a
        run. Raises UserError if config.yaml cannot be read."""
        import yaml

        try:
            return yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise UserError(
                f"{self.folder / 'config.yaml'} cannot be read ({error}); train it again, or give another run's folder."
            ) from error

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Every finished evaluation under results/, those of several demonstration seeds as one; one still being written (no
        summary.json yet) is not among them."""
        return with_repeats([read_evaluation(path.parent, self) for path in sorted(self.folder.glob("results/*/summary.json"))])

    @property
    def label(self) -> str:
        return f"{self.name}-{self.hash[:8]}"

    @property
    def scale(self) -> str:
        chosen = self.config.get("scale")
        return str(chosen.get("name", json.dumps(chosen, sort_keys=True))) if isinstance(chosen, dict) else str(chosen)

    @property
    def variant(self) -> str:
        """What the seeds of one variant share: the name, and all that changes the weights but the seed."""
        return json.dumps([self.name, {k: v for k, v in self.identity.items() if k != "seed"}], sort_keys=True)

    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps in order. Where a resumed run logged a step again, the later record holds; the line that a run still
        going (or killed) has begun is left out, in a finished run it is an error."""
        path = self.folder / "metrics.jsonl"
        remedy = f"train the run again or remove the line: {path}"
        lines = read_jsonl(path, required=("step",), remedy=remedy, open_end=self.status != "finished")
        return [record for _, record in sorted({int(line["step"]): line for line in lines}.items())]


# -------------------------------------------------------------------------------------------------------------- reading


def read_jsonl(path: Path, *, required: Sequence[str] = (), remedy: str = "", open_end: bool = False) -> list[dict[str, Any]]:
    """Every line as an object that holds the `required` keys; `open_end` forgives one last line without its newline."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    if lines.pop() and not open_end:
        raise UserError(f"{path}: the last line is cut off, the file is half-written; {remedy}")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            lacking = [key for key in required if key not in record]
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a JSON object ({error}); {remedy}") from error
        if lacking:
            raise UserError(f"{path}, line {number}: no {', '.join(lacking)}; {remedy}")
        records.append(record)
    return records


def read_run(folder: Path) -> Run:
    """Raises UserError if the folder holds no run, or one whose record is damaged or of another version."""
    path = folder / "run.json"
    remedy = f"train it again, or give a run's folder (there: {folder})."
    raw = read_object(path, VERSION, remedy)
    if raw.get("status") != "finished":
        raw = dict.fromkeys(COUNTERS, 0) | {"parameters": {}} | raw
    try:
        return Run(
            folder=folder,
            name=raw["name"],
            hash=raw["hash"],
            ablation=tuple(raw["ablation"]),
            seed=int(raw["seed"]),
            status=raw["status"],
            parameters={key: int(value) for key, value in raw["parameters"].items()},
            tokens_seen=int(raw["tokens_seen"]),
            loss_tokens_seen=int(raw["loss_tokens_seen"]),
            images_seen=int(raw["images_seen"]),
            steps=int(raw["steps"]),
            flops=float(raw["flops"]),
            seconds=float(raw["seconds"]),
            corpus=raw["corpus"]["name"],
            corpus_fingerprint=raw["corpus"]["fingerprint"],
            identity=raw["identity"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {type(error).__name__} {error}; {remedy}") from error


def read_evaluation(folder: Path, run: Run) -> Evaluation:
    """Raises UserError if the summary is damaged, of another version, or of another run than the one whose folder it lies in."""
    path = folder / "summary.json"
    remedy = f"delete {folder} and evaluate again: python -m eval.fewshot run={run.label}"
    raw = read_object(path, VERSION, remedy)
    items_plan, demonstration_seed, weights = _plan(folder / "plan.json", int(raw.get("seed", 0)), remedy)
    try:
        if raw["run"]["hash"] != run.hash:
            raise UserError(f"{path}: results of run {raw['run']['hash']}, but they lie in the folder of {run.hash}; {remedy}")
        return Evaluation(
            folder=folder,
            run_name=run.name,
            run_hash=run.hash,
            plan=raw["plan_fingerprint"],
            control=raw["control"],
            seed=int(raw["seed"]),
            settings=_settings(raw),
            items_plan=items_plan,
            demonstration_seed=demonstration_seed,
            weights=weights,
            sparse=raw.get("sparq") is not None,
            tasks={
                name: TaskSummary(
                    metric=task["metric"],
                    kind=task["kind"],
                    chance=task.get("chance"),
                    shots={
                        int(shots): ShotSummary(
                            float(s["mean"]), float("nan") if s["se"] is None else float(s["se"]), int(s["n"]), int(s["clusters"])
                        )
                        for shots, s in task["shots"].items()
                    },
                )
                for name, task in raw["tasks"].items()
            },
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {type(error).__name__} {error}; {remedy}") from error


def _plan(path: Path, seed: int, remedy: str) -> tuple[str, int, str]:
    """(fingerprint of the plan without what the demonstration seed decides, that seed, weights); no file: ("", seed, "")."""
    if not path.is_file():
        return "", seed, ""
    raw = read_object(path, VERSION, remedy, _parse_plan)
    try:
        plan = dict(raw["plan"])
        drawn = plan.pop("demonstration_seed", None)
        plan.pop("corpus")  # a copy under another name is the same corpus
        plan["tasks"] = {name: task["queries"] for name, task in plan["tasks"].items()}
        digest = hashlib.blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=16).hexdigest()
        return digest, int(plan["seed"] if drawn is None else drawn), str(raw["weights"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {type(error).__name__} {error}; {remedy}") from error


def _parse_plan(text: str) -> Any:
    """json.loads for plan.json. The runs of a suite hold one plan, 400 KB that stand last in it: equal ends are parsed once."""
    head, mark, end = text.partition(PLAN_KEY)
    if not mark:
        return json.loads(text)
    return json.loads(f"{head}{mark}null}}") | _parse_end(end)


@lru_cache(maxsize=4)
def _parse_end(end: str) -> dict[str, Any]:
    return dict(json.loads(f"{{{PLAN_KEY}{end}"))


def with_repeats(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Evaluations of one run, those that share all but their demonstration seed as one: the one of the lowest seed, with repeats.

    Where one seed was evaluated twice (say, with other decoding) nothing is taken for a repeat.
    """
    families: dict[tuple[object, ...], list[Evaluation]] = {}
    for e in evaluations:
        key: tuple[object, ...] = (e.protocol, e.control, e.weights) if e.items_plan else (e.folder,)
        families.setdefault(key, []).append(e)
    found = []
    for members in families.values():
        by_seed = {e.demonstration_seed: e for e in sorted(members, key=lambda e: e.demonstration_seed)}
        if len(members) == 1 or len(by_seed) < len(members):
            found += members
        else:
            found.append(replace(next(iter(by_seed.values())), repeats=by_seed))
    return found


def _settings(raw: dict[str, Any]) -> str:
    """The decoding settings that a summary names, in words: `captions cider_d plain, colours vqa_official plain, float32`."""
    tasks = [" ".join(filter(None, [name, task["metric"], task.get("prompts")])) for name, task in sorted(raw["tasks"].items())]
    return "(" + ", ".join([*tasks, raw.get("dtype") or "any dtype"]) + ")"


# -------------------------------------------------------------------------------------------------------------- finding


def run_folders(root: Path | None = None) -> list[Path]:
    """Every folder under <home>/runs that holds a run.json, by name."""
    root = root or paths.runs()
    return sorted(path.parent for path in root.glob("*/run.json"))


def find_runs(selectors: Iterable[str], root: Path | None = None) -> list[Run]:
    """The runs meant by folders or names, in the order given and each once.

    A selector with a path separator is a folder. Else it is a run's name (all its seeds), or else the beginning of folder names.
    A name that means runs of several scales is refused: those are never meant as rows of one comparison by accident.
    """
    found: dict[Path, Run] = {}
    candidates: list[Run] | None = None
    for selector in selectors:
        if os.sep in selector:
            folder = Path(selector).expanduser().resolve()
            found.setdefault(folder, read_run(folder))
            continue
        if candidates is None:
            candidates = [read_run(folder) for folder in run_folders(root)]
        matches = [r for r in candidates if r.name == selector] or [r for r in candidates if r.folder.name.startswith(selector)]
        if not matches:
            known = ", ".join(r.folder.name for r in candidates) or "none; train one: python -m mm1.train"
            raise UserError(f"runs: no run called {selector!r} in {root or paths.runs()}. There are: {known}.")
        if len({r.scale for r in matches}) > 1:
            listed = ", ".join(f"{r.folder.name} (scale {r.scale})" for r in matches)
            raise UserError(f"runs: {selector!r} means runs of several scales: {listed}. Name the folders you want.")
        for run in matches:
            found.setdefault(run.folder.resolve(), run)
    return list(found.values())
