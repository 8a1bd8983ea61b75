"""TextCore: does the model still know language? MM1's text tasks, through lm-eval, from local files.

    <datasets>/TASK/SPLIT.jsonl -> rows (tasks/textcore.py) -> lm-eval's own task: prompts, filters, metrics
                                                                  |  requests
                                        our model as its LM (adapters/lm_eval.py) -> scores -> <run>/results/textcore/<hash>.json

Prompts and metrics are lm-eval's, so values compare with those published from it. Nothing is fetched from a network.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from configs.command import command
from configs.errors import UserError
from eval.adapters.decoding import DTYPES, model_folder
from eval.device import check_device
from eval.tasks.textcore import EIGHT, TASKS, find_files, fingerprint, read_split, splits_of

if TYPE_CHECKING:
    from eval.adapters.lm_eval import MM1LM

TEXTCORE_VERSION = 1


@dataclass
class TextcoreConfig:
    """The command's settings. `run`: a run's name or folder, or any save_pretrained folder, text-only models included."""

    run: str = MISSING
    datasets: str = MISSING
    """The folder of the tasks' files: docs/textcore.md."""
    tasks: list[str] | None = None
    """null: all; arc stands for both of ARC's sets."""
    shots: list[int] = field(default_factory=lambda: [0])
    limit: int | None = None
    """The first so many queries of each task; null: every one."""
    batch_size: int = 16
    seed: int = 1234
    """Chooses demonstrations; lm-eval's own default."""
    device: str = "auto"
    dtype: str = "float32"
    threads: int | None = None
    """On a CPU; null: one for small models, as in eval.fewshot, else torch's own choice."""

    def validate(self) -> None:
        chosen = [part for name in self.tasks or TASKS for part in (EIGHT[0] if name == "arc" else (name,))]
        if unknown := [name for name in chosen if name not in TASKS]:
            raise UserError(f"tasks: {', '.join(unknown)} unknown; choose from {', '.join(TASKS)}.")
        self.tasks = [name for name in TASKS if name in chosen]
        if not self.shots or min(self.shots) < 0 or sorted(set(self.shots)) != self.shots:
            raise UserError(f"shots={self.shots}: give numbers from 0 up, in rising order.")
        check_device(self.device)
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype}: choose from {', '.join(DTYPES)}.")
        for key in ("limit", "batch_size", "threads"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise UserError(f"{key}={value}: give a number from 1 up.")


@dataclass
class TextcoreResults:
    """One JSON file a run and kind of evaluation; tasks and shots are added to it as they are finished.

    The name's hash covers what changes every task's score (lm-eval's version, limit, seed, dtype): runs evaluated alike have
    results under one name. `data` of a cell is its files' fingerprint; other files, and the cell is done again."""

    folder: Path
    config: TextcoreConfig
    run: dict[str, str]
    weights: str

    @property
    def identity(self) -> dict[str, Any]:
        config = self.config
        version = {"version": TEXTCORE_VERSION, "lm_eval": importlib.metadata.version("lm_eval")}
        return version | {"limit": config.limit, "seed": config.seed, "dtype": config.dtype}

    @property
    def path(self) -> Path:
        name = hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=6).hexdigest()
        return self.folder / f"{name}.json"

    @contextmanager
    def opened(self) -> Iterator[dict[str, Any]]:
        """The content so far, kept from other processes. Results of other weights are dropped, and that is said."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.path}: another process is doing this evaluation. Wait for it or stop it.") from None
            yield self._read()

    def _read(self) -> dict[str, Any]:
        fresh = self.identity | {"run": self.run, "weights": self.weights, "tasks": {}}
        if not self.path.is_file():
            return fresh
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            weights, _ = content["weights"], content["tasks"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path} is damaged ({error!r}). Delete it and evaluate again.") from error
        if weights != self.weights:
            print(f"{self.path}: the results there are of other weights (the run was trained since); evaluating again.")
            return fresh
        return content

    def write(self, content: dict[str, Any]) -> None:
        """In one step, with the means of what is there: a kill leaves the old content or the new."""
        content["textcore"] = {str(n): asdict(m) for n in shots_of(content) if (m := textcore_mean(content, n))}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.path)


def shots_of(content: dict[str, Any]) -> list[int]:
    return sorted({int(shots) for cells in content["tasks"].values() for shots in cells})


@dataclass(frozen=True)
class Mean:
    """Points, with the standard error over items; None where a part has none."""

    mean: float
    se: float | None


def textcore_mean(content: dict[str, Any], shots: int) -> Mean | None:
    """The mean of the eight with equal weights, ARC being its two sets' mean; None while a task is missing."""
    eight = []
    for names in EIGHT:
        cells = [content["tasks"].get(name, {}).get(str(shots)) for name in names]
        if None in cells:
            return None
        eight.append(_mean([Mean(cell["mean"], cell["se"]) for cell in cells]))
    return _mean(eight)


def _mean(parts: list[Mean]) -> Mean:
    """Equal weights; the tasks' items are different ones, so SE = sqrt(sum SE^2) / k."""
    errors = [part.se for part in parts if part.se is not None]
    se = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
    return Mean(math.fsum(part.mean for part in parts) / len(parts), se)


def evaluate(config: TextcoreConfig) -> tuple[dict[str, Any], Path]:
    """Evaluate what is not finished yet; returns (the results file's content, its path).

    Raises UserError for all that can be wrong before the model is loaded: the run, files that are missing, rows that are not the
    task's.
    """
    config.validate()
    assert config.tasks is not None
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("TextCore runs through lm-eval, which is not installed: pip install 'mm1-ablations[textcore]'")
    export, results = resolve(config)
    files = find_files(Path(config.datasets).expanduser(), config.tasks, config.shots)
    with results.opened() as content:
        remaining = []
        for name in config.tasks:
            for shots in config.shots:
                data = fingerprint(files[name], splits_of(TASKS[name], shots))
                if content["tasks"].get(name, {}).get(str(shots), {}).get("data") != data:
                    remaining.append((name, shots, data))
        rows = {
            name: {split: read_split(TASKS[name], paths) for split, paths in files[name].items()}
            for name in dict.fromkeys(name for name, _, _ in remaining)
        }
        for name, shots, _ in remaining:
            pool = len(rows[name].get(TASKS[name].demonstrations, [])) - (TASKS[name].demonstrations == TASKS[name].queries)
            if shots > pool:
                raise UserError(f"{name}: {shots} shots want as many demonstrations; {files[name]} hold {max(0, pool)}.")
        model = _load(config, export) if remaining else None
        for name, shots, data in remaining:
            from eval.adapters.lm_eval_tasks import run_task

            assert model is not None
            cell = run_task(model, name, rows[name], shots=shots, limit=config.limit, seed=config.seed)
            content["tasks"].setdefault(name, {})[str(shots)] = cell | {"data": data}
            results.write(content)
        return content, results.path


def resolve(config: TextcoreConfig) -> tuple[Path, TextcoreResults]:
    """(the model's folder, where its results go): beside a run's few-shot results, or in a plain model's own folder."""
    from eval.fewshot import weights_fingerprint
    from mm1.run import Run

    export = model_folder(config.run).resolve()
    weights = weights_fingerprint(export)
    run = Run(export.parent)
    if export.name == "export" and run.info:
        record = {"name": run.name, "hash": str(run.info.get("hash", ""))}
        return export, TextcoreResults(run.results / "textcore", config, record, weights)
    return export, TextcoreResults(export / "results" / "textcore", config, {"name": export.name, "hash": weights}, weights)


def _load(config: TextcoreConfig, export: Path) -> MM1LM:
    import torch

    from eval.adapters.lm_eval import MM1LM
    from eval.workers import SMALL_MODEL

    model = MM1LM(str(export), device=config.device, dtype=config.dtype, batch_size=config.batch_size)
    if model.device == "cpu" and (config.threads or model.model.num_parameters() < SMALL_MODEL):
        torch.set_num_threads(config.threads or 1)
    return model


def render(content: dict[str, Any], config: TextcoreConfig, path: Path) -> str:
    """What was asked for, as a plain-text table."""
    assert config.tasks is not None

    def cell(mean: float, se: float | None) -> str:
        return f"{mean:7.2f} ±{'   n/a' if se is None else f'{se:6.2f}'}"

    width = max(len("TextCore"), *map(len, config.tasks))
    lines = [
        f"{'task':<{width}}  {'metric':<11}  {'items':>6}  {'chance':>6}  "
        + "  ".join(f"{f'{s}-shot':>15}" for s in config.shots)
    ]
    cut = []
    for name in config.tasks:
        cells = [content["tasks"][name][str(shots)] for shots in config.shots]
        chance = "" if TASKS[name].chance is None else f"{TASKS[name].chance:.1f}"
        line = f"{name:<{width}}  {TASKS[name].metric:<11}  {cells[0]['n']:>6}  {chance:>6}  "
        lines.append(line + "  ".join(f"{cell(c['mean'], c['se']):>15}" for c in cells))
        cut += [f"{name} {s}-shot {c['truncated']}" for s, c in zip(config.shots, cells, strict=True) if c["truncated"]]
    means = [textcore_mean(content, shots) for shots in config.shots]
    if len(config.tasks) == len(TASKS):
        line = f"{'TextCore':<{width}}  {'':<11}  {'':>6}  {'':>6}  "
        lines.append(line + "  ".join(f"{cell(m.mean, m.se):>15}" for m in means if m))
    else:
        lines.append(f"TextCore is the mean of all eight; {len(config.tasks)} of {len(TASKS)} sets were asked for.")
    sample = "all queries" if config.limit is None else f"the first {config.limit} queries a task"
    lines.append(f"points ± item-level standard error; {sample}; seed {config.seed}; lm-eval {content['lm_eval']}")
    if cut:
        lines.append(f"requests too long for the model, which lost their beginning: {', '.join(cut)}")
    lines.append(f"results in {path}")
    return "\n".join(lines)


@command("textcore", schema=TextcoreConfig)
def main(config: TextcoreConfig) -> None:
    """Text-only evaluation of a trained run: MM1's TextCore through lm-eval, from local files.

    run=NAME_OR_FOLDER    a run of mm1.train, or a save_pretrained folder (a text-only model's too)
    datasets=FOLDER       TASK/SPLIT.jsonl (or .json, .parquet) below it: docs/textcore.md
    tasks=[a,b]           arc_easy arc_challenge piqa lambada winogrande hellaswag sciq triviaqa webqs; arc: both; default: all
    shots=[0]             demonstrations before each query; more than 0 want the tasks' train files too
    limit=null            the first so many queries of each task
    batch_size=16 device=auto dtype=float32 threads=null seed=1234

    Interrupted, it goes on with the first unfinished task; finished, it prints what is there.
    """
    content, path = evaluate(config)
    print(render(content, config, path))


if __name__ == "__main__":
    main()
