"""Results on disk: written so that a killed evaluation goes on where it stopped and ends with the same bytes.

    <run folder>/results/<eval hash>/
        plan.json                    the plan, its fingerprint, the tasks' settings, the control, the weights evaluated
        TASK.SHOTS.jsonl             finished: one line an item, in the plan's order
        TASK.SHOTS.jsonl.partial     under way: the items answered so far, batch by batch
        summary.json                 means and standard errors, when every task is finished

The hash covers the plan and the decoding settings (not the weights, the device or the batch size): runs of one suite that were
evaluated alike have results under one name. Scores are in points: CIDEr-D x 100, accuracies x 100.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from eval.metrics.cider import cider
from eval.metrics.vqa import vqa_accuracy
from eval.plan import Plan
from eval.statistics import Estimate, clustered_mean, mean_over_tasks
from eval.tasks.pool import TaskData
from eval.tasks.settings import TaskSettings
from mm1.attention.settings import SparqSettings

RESULTS_VERSION = 1
REFERENCES_KEY = {"captioning": "references", "vqa": "answers", "binding": "references"}


def score(kind: str, metric: str, records: Sequence[dict[str, Any]]) -> list[float]:
    """Points of each answered item, in order. CIDEr-D weighs words over all of `records`, so give a task's whole sample."""
    if kind == "captioning":
        values = cider([r["prediction"] for r in records], [r["references"] for r in records])
    elif kind == "vqa":
        values = [vqa_accuracy(r["prediction"], r["answers"], metric) for r in records]
    else:
        values = [_share_of_best(r["options"], r["references"][0]) for r in records]
    return [round(100 * value, 6) for value in values]


def _share_of_best(options: dict[str, float], answer: str) -> float:
    """1 if the right name is the likeliest, 0 if not; a tie counts as the guess it is."""
    best = [name for name, value in options.items() if value == max(options.values())]
    return 1 / len(best) if answer in best else 0.0


@dataclass(frozen=True)
class Results:
    """One evaluation's folder, for one plan, one set of settings and one control."""

    runs_results: Path
    plan: Plan
    tasks: dict[str, TaskData]
    settings: dict[str, TaskSettings]
    control: str | None
    dtype: str
    run: dict[str, str]
    weights: str
    sparq: SparqSettings | None = None
    """SparQ attention's, None for dense attention."""

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "version": RESULTS_VERSION,
            "plan_fingerprint": self.plan.fingerprint,
            "control": self.control,
            "dtype": self.dtype,
            "settings": {name: asdict(settings) for name, settings in self.settings.items()},
        } | ({} if self.sparq is None else {"sparq": asdict(self.sparq)})

    @property
    def hash(self) -> str:
        return hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=6).hexdigest()

    @property
    def folder(self) -> Path:
        return self.runs_results / self.hash

    @property
    def features(self) -> Path:
        """Where encoded images wait while the evaluation runs (features.py)."""
        return self.folder / "features.bin"

    def cells(self) -> list[tuple[str, int]]:
        """(task, shots), in the order in which they are evaluated."""
        return [(task, shots) for task in self.plan.tasks for shots in self.plan.shots]

    def path(self, task: str, shots: int) -> Path:
        return self.folder / f"{task}.{shots}.jsonl"

    def finished(self, task: str, shots: int) -> bool:
        return self.path(task, shots).is_file()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make or check the folder and keep other processes out of it.

        Raises UserError for results of another version or another plan, or when another process is evaluating the same. Results
        of other weights (the run was trained further since) are dropped, and that is said.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.folder}: another process is doing this evaluation. Wait for it or stop it.") from None
            self._check()
            yield

    def _check(self) -> None:
        path = self.folder / "plan.json"
        for known in (path, self.folder / "summary.json"):
            if known.is_file():
                version = _load(known).get("version")
                if version != RESULTS_VERSION:
                    raise UserError(
                        f"{known}: results of version {version!r}, this suite writes {RESULTS_VERSION}. Move {self.folder} away "
                        "or delete it, and evaluate again."
                    )
        if path.is_file():
            found = _load(path)
            if found.get("plan_fingerprint") != self.plan.fingerprint:
                corpus = (found.get("plan") or {}).get("corpus")
                raise UserError(
                    f"{path}: another plan lies where this evaluation's results belong: fingerprint "
                    f"{found.get('plan_fingerprint')}, corpus {corpus}; this one's is {self.plan.fingerprint}, corpus "
                    f"{self.plan.corpus}. Move {self.folder} away, and evaluate again."
                )
            if found.get("weights") == self.weights:
                return
            print(f"{self.folder}: the results there are of other weights (the run was trained since); evaluating again.")
        for stale in [*self.folder.glob("*.jsonl*"), self.folder / "summary.json"]:
            stale.unlink(missing_ok=True)
        _write(path, self.identity | {"weights": self.weights, "plan": self.plan.to_json()})

    def answered(self, task: str, shots: int) -> dict[str, dict[str, Any]]:
        """id -> record of the items done before an interruption; a line that a kill cut short is forgotten. So is, and that is
        said, all from a line on that cannot be read: a power cut may leave zeros where text was."""
        partial = self._partial(task, shots)
        if not partial.is_file():
            return {}
        records: dict[str, dict[str, Any]] = {}
        content, whole = partial.read_bytes(), 0
        for line in content.splitlines(keepends=True):
            try:
                record: Any = json.loads(line) if line.endswith(b"\n") else None
                records[record["id"]] = record
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line)
        if lost := content[whole:]:
            if b"\n" in lost:
                print(f"{partial}: damaged after {len(records)} items; the rest of it is answered again.")
            with open(partial, "r+b") as file:
                file.truncate(whole)
        return records

    def append(self, task: str, shots: int, records: Sequence[dict[str, Any]]) -> None:
        with open(self._partial(task, shots), "a", encoding="utf-8") as file:
            file.write("".join(_line(record) for record in records))

    def finish(self, task: str, shots: int) -> None:
        """Score the answers and move them to their place in one step. Raises UserError if items are missing."""
        done = self.answered(task, shots)
        queries = self.plan.tasks[task].queries
        if missing := [name for name in queries if name not in done]:
            raise UserError(f"{self._partial(task, shots)}: {len(missing)} of {len(queries)} items are missing. Evaluate again.")
        records = [done[name] for name in queries]
        for record, points in zip(records, score(self.tasks[task].kind, self.settings[task].metric, records), strict=True):
            record["score"] = points
        scored = self._partial(task, shots).with_suffix(".scored")
        scored.write_text("".join(map(_line, records)), encoding="utf-8")
        scored.replace(self.path(task, shots))
        self._partial(task, shots).unlink()

    def _partial(self, task: str, shots: int) -> Path:
        return self.folder / f"{task}.{shots}.jsonl.partial"

    def estimate(self, task: str, shots: int) -> Estimate:
        """Raises UserError for a damaged file or an id that stands there twice."""
        path = self.path(task, shots)
        try:
            # not splitlines(): a prediction may hold U+2028 or U+0085, which JSON leaves as they are and splitlines() cuts at
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            ids = [record["id"] for record in records]
            if ids != self.plan.tasks[task].queries:
                twice = sorted({name for name in ids if ids.count(name) > 1})
                raise UserError(
                    f"{path}: its items are not the plan's{f' (duplicate ids: {twice[:5]})' if twice else ''}. "
                    "Delete the file and evaluate again."
                )
            return clustered_mean([record["score"] for record in records], [record["cluster"] for record in records])
        except (ValueError, KeyError, TypeError) as error:  # ValueError: no JSON, or no UTF-8
            raise UserError(f"{path} is damaged ({error}). Delete it and evaluate again.") from error

    def summarise(self) -> dict[str, Any]:
        """Write summary.json from the finished files, and return it."""
        estimates = {(task, shots): self.estimate(task, shots) for task, shots in self.cells()}
        means = {}
        for shots in self.plan.shots:
            mean, se = mean_over_tasks([estimates[task, shots] for task in self.plan.tasks])
            means[str(shots)] = {"mean": mean, "se": se}
        summary = {
            "version": RESULTS_VERSION,
            "run": self.run,
            "plan_fingerprint": self.plan.fingerprint,
            "control": self.control,
            "seed": self.plan.seed,
            "limit": self.plan.limit,
            "demonstrations": self.plan.mode,
            "dtype": self.dtype,
            "sparq": None if self.sparq is None else asdict(self.sparq),
            "demonstration_seed": self.plan.demonstration_seed,
            "corpus": {"name": self.plan.corpus, "fingerprint": self.plan.corpus_fingerprint},
            "tasks": {
                name: {
                    "metric": self.settings[name].metric,
                    "kind": task.kind,
                    "prompts": self.settings[name].prompts,
                    "chance": task.chance,
                    "shots": {str(shots): asdict(estimates[name, shots]) for shots in self.plan.shots},
                }
                for name, task in self.tasks.items()
            },
            "means": means,
        }
        _write(self.folder / "summary.json", summary)
        return summary


def render(summary: dict[str, Any], folder: Path) -> str:
    """The summary as a plain-text table, with the sample it is of and where the files lie."""
    shots = list(summary["means"])

    def cell(estimate: dict[str, Any]) -> str:
        se = "   n/a" if estimate["se"] is None else f"{estimate['se']:6.2f}"
        return f"{estimate['mean']:7.2f} ±{se}"

    width = max(len("mean"), *(len(name) for name in summary["tasks"]))
    lines = [f"{'task':<{width}}  {'metric':<15}  {'items':>6}  {'chance':>6}  " + "  ".join(f"{s + '-shot':>15}" for s in shots)]
    for name, task in summary["tasks"].items():
        chance = "" if task["chance"] is None else f"{task['chance']:.1f}"
        items = next(iter(task["shots"].values()))["n"]
        cells = "  ".join(f"{cell(task['shots'][s]):>15}" for s in shots)
        lines.append(f"{name:<{width}}  {task['metric']:<15}  {items:>6}  {chance:>6}  {cells}")
    cells = "  ".join(f"{cell(summary['means'][s]):>15}" for s in shots)
    lines.append(f"{'mean':<{width}}  {'':<15}  {'':>6}  {'':>6}  {cells}")
    sample = "all queries" if summary["limit"] is None else f"at most {summary['limit']} queries a task, a fixed sample"
    control = "" if summary["control"] is None else f", CONTROL: images {summary['control']}"
    drawn = "" if summary["demonstration_seed"] is None else f", demonstration seed {summary['demonstration_seed']}"
    sparse = "" if summary["sparq"] is None else f"; SparQ attention, r {summary['sparq']['r']}, k {summary['sparq']['k']}"
    lines.append(f"points ± item-level standard error; {sample}; seed {summary['seed']}{drawn}{sparse}{control}")
    lines.append(f"results in {folder}")
    return "\n".join(lines)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is damaged ({error}). Delete {path.parent} and evaluate again.") from error
    return content if isinstance(content, dict) else {}
