"""Few-shot evaluation: a trained run -> answers, scores and error bars at 0, 4 and 8 shots.

    run -> tasks -> plan (plan.py) -> prompts (prompter.py) -> answers (workers.py, generate.py) -> scores (results.py)

Everything left of the answers is a pure function of the corpus and the settings and needs no torch, so that an evaluation found
finished is printed in a second.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from configs.command import command
from configs.errors import UserError
from data_pipelines import paths
from eval.controls import IMAGES
from eval.device import check_device
from eval.metrics.vqa import check_answers
from eval.nearest import EncoderFeatures
from eval.plan import Plan, make_plan
from eval.results import Results, render
from eval.tasks.official.presence import check_compared, check_images
from eval.tasks.pool import TaskData
from eval.tasks.settings import TaskSettings, load_settings
from eval.tasks.sources import read_sources, split_names
from eval.workers import Cell, Encoded, messages
from mm1.attention.settings import SparqSettings

ATTENTIONS = ("dense", "sparq")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class EvalConfig:
    """The command's settings. `run`: a run's name or folder, or a save_pretrained folder (then give `task_corpus` too)."""

    run: str = MISSING
    tasks: list[str] | None = None
    """Names of the corpus's tasks; null: all of them. With `datasets`, of official ones too."""
    shots: list[int] = field(default_factory=lambda: [0, 4, 8])
    limit: int | None = 200
    """Queries a task, a fixed sample; null: every one."""
    batch_size: int = 16
    images: str = "true"
    """true, or a control: shuffled, none."""
    demonstrations: str = "per_query"
    """per_query, or fixed: the same ones for all queries, or nearest: of the most similar images."""
    nearest_by: str | None = None
    """nearest: a run or model folder by whose image encoder; null: the evaluated run. Name one for runs to be compared."""
    seed: int = 0
    demonstration_seed: int | None = None
    """Other demonstrations for the same sample of queries; null: seed."""
    device: str = "auto"
    processes: int | None = None
    """That answer side by side; null: one a GPU, one on a CPU."""
    image_memory_gb: int = 2
    """GB of encoded images that each process keeps in memory; the others wait in a file of the results' folder."""
    attention: str = "dense"
    """How answers are decoded: dense, or sparq, by the settings of `sparq`."""
    sparq: SparqSettings = field(default_factory=SparqSettings)
    dtype: str = "float32"
    threads: int | None = None
    """On a CPU; null: one for models under SMALL_MODEL parameters, else torch's own choice."""
    task_corpus: str | None = None
    """A corpus (name or folder) whose tasks to evaluate in place of the run's own. Not `corpus`, which is a config group."""
    datasets: str | None = None
    """The folder of official files, one folder in it a dataset: docs/datasets.md."""
    files: dict[str, Any] = field(default_factory=dict)
    """Task -> what replaces parts of the `files:` in its YAML: +files.gqa.query.json.images=/data/gqa_images."""
    prompts: str | None = None
    """A set of eval/prompts.py in place of each task's own."""
    vqa_metric: str | None = None
    """A VQA accuracy variant in place of each task's own."""

    def validate(self) -> None:
        self.images = self.images.lower()
        if self.images not in IMAGES:
            raise UserError(f"images={self.images}: choose from {', '.join(IMAGES)}.")
        check_device(self.device)
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: give a number from 1 up.")
        if self.processes is not None and self.processes < 1:
            raise UserError(f"processes={self.processes}: give a number from 1 up, or null.")
        if self.image_memory_gb < 1:
            raise UserError(f"image_memory_gb={self.image_memory_gb}: give a number from 1 up.")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads={self.threads}: give a number from 1 up, or null.")
        if self.attention not in ATTENTIONS:
            raise UserError(f"attention={self.attention}: choose from {', '.join(ATTENTIONS)}.")
        if self.attention == "dense" and self.sparq != SparqSettings():
            raise UserError("sparq.*: these settings need attention=sparq.")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype}: choose from {', '.join(DTYPES)}.")
        if self.nearest_by is not None and self.demonstrations != "nearest":
            raise UserError(
                f"nearest_by={self.nearest_by}: only demonstrations=nearest compares images, not {self.demonstrations}."
            )


@dataclass(frozen=True)
class Target:
    """What is evaluated: a model's folder, the corpus its tasks come from, and where results go."""

    name: str
    hash: str
    export: Path
    results: Path
    corpus: Path
    weights: str


def resolve(run: str, corpus: str | None) -> Target:
    """Raises UserError if there is no such run, it has no exported model yet, or a plain model folder comes without a
    corpus."""
    from mm1.run import find_run

    path = Path(run).expanduser()
    if path.name == "export" and (path.parent / "run.json").is_file():
        run, path = str(path.parent.resolve()), path.parent
    if (path / "config.json").is_file() and not (path / "run.json").is_file():
        if corpus is None:
            raise UserError(f"run={run} is a model without a run's record, so its corpus is unknown. Add task_corpus=NAME.")
        weights = weights_fingerprint(path)
        return Target(path.resolve().name, weights, path, path / "results", paths.corpus(corpus), weights)
    found = find_run(run)
    if not (found.export / "config.json").is_file():
        status = found.info.get("status", "unknown")
        raise UserError(
            f"run={run}: {found.folder} has no exported model yet (status: {status}). Start the same training "
            "command again; it goes on where it stopped and exports at its end."
        )
    folder = paths.corpus(corpus) if corpus is not None else found.corpus
    name, key = found.name, str(found.info.get("hash", ""))
    return Target(name, key, found.export, found.results, folder, weights_fingerprint(found.export))


def weights_fingerprint(export: Path) -> str:
    """16 hex digits over the weight files: their sizes, and 64 KiB at 64 even steps of each; training changes bytes everywhere.

    Raises UserError if there are no weights.
    """
    files = sorted(export.glob("*.safetensors"))
    if not files:
        raise UserError(f"{export} holds no weights (*.safetensors). Train the run to its end, or save the model again.")
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for step in range(64):
                file.seek(size * step // 64)
                digest.update(file.read(65536))
    return digest.hexdigest()


def prepare(config: EvalConfig) -> tuple[Target, Results]:
    """Everything up to the model: target, tasks, settings and plan. Raises UserError for all that can be wrong by then."""
    _, own = split_names(config.tasks, config.datasets)
    # official files alone need no corpus: the folder of datasets stands for it
    target = resolve(config.run, config.task_corpus or (config.datasets if own == [] else None))
    tasks, corpus, fingerprint, settings = _read(config, target.corpus)
    features = None
    if config.demonstrations == "nearest":
        check_compared(tasks, limit=config.limit, seed=config.seed)
        by = target if config.nearest_by is None else resolve(config.nearest_by, str(target.corpus))
        features = EncoderFeatures(
            by.export,
            weights=by.weights,
            corpus_fingerprint=fingerprint,
            folder=by.results / "features",
            device=config.device,
        )
    plan = _plan(config, tasks, corpus, fingerprint, settings, features)
    check_images(tasks, plan, IMAGES[config.images])
    results = Results(
        target.results,
        plan,
        {task.name: task for task in tasks},
        settings,
        IMAGES[config.images],
        config.dtype,
        {"name": target.name, "hash": target.hash},
        target.weights,
        config.sparq if config.attention == "sparq" else None,
    )
    return target, results


def check(config: EvalConfig, corpus: Path) -> None:
    """Raises UserError for what `prepare` would refuse about tasks, settings and plan, for a run of this corpus that is not there
    yet. The nearest images are known by an encoder that is not trained: as many must be there as for any other demonstrations."""
    if config.demonstrations == "nearest":
        config = replace(config, demonstrations="per_query", nearest_by=None)
    _plan(config, *_read(config, corpus), features=None)


def _read(config: EvalConfig, corpus: Path) -> tuple[list[TaskData], str, str, dict[str, TaskSettings]]:
    """(tasks, the name of what they come from, its fingerprint, settings by task)."""
    tasks, name, fingerprint = read_sources(
        config.tasks, corpus=corpus, datasets=config.datasets, overrides=config.files, shots=max(config.shots, default=0)
    )
    settings = {
        task.name: load_settings(task.name, task.kind, prompts=config.prompts, vqa_metric=config.vqa_metric) for task in tasks
    }
    return tasks, name, fingerprint, settings


def _plan(
    config: EvalConfig,
    tasks: list[TaskData],
    corpus: str,
    fingerprint: str,
    settings: dict[str, TaskSettings],
    features: EncoderFeatures | None,
) -> Plan:
    plan = make_plan(
        tasks,
        corpus=corpus,
        corpus_fingerprint=fingerprint,
        shots=config.shots,
        limit=config.limit,
        seed=config.seed,
        mode=config.demonstrations,
        demonstration_seed=config.demonstration_seed,
        features=features,
    )
    for task in tasks:
        if task.kind == "vqa":
            _check_answers(task, plan.tasks[task.name].queries, settings[task.name].metric)
        if task.kind == "captioning" and len(plan.tasks[task.name].queries) < 2:
            raise UserError(f"Task {task.name}: CIDEr of fewer than 2 images is always 0. Raise limit=...")
    return plan


def _check_answers(task: TaskData, queries: Sequence[str], metric: str) -> None:
    """Raises UserError for a question with too few answers for its metric, before anything is asked."""
    for query in queries:
        try:
            check_answers(task.queries.example(query, image=False).references, metric)
        except UserError as error:
            raise UserError(f"Task {task.name}, item {query!r}: {error} On the command line: vqa_metric=gqa_exact.") from error


def evaluate(config: EvalConfig) -> tuple[dict[str, Any], Path]:
    """Evaluate what is not finished yet; returns (summary, results folder)."""
    target, results = prepare(config)
    with results.opened():
        remaining = [cell for cell in results.cells() if not results.finished(*cell)]
        if remaining:
            _answer(config, target, results, remaining)
        return results.summarise(), results.folder


def _answer(config: EvalConfig, target: Target, results: Results, remaining: list[Cell]) -> None:
    from tqdm import tqdm

    done = {cell: set(results.answered(*cell)) for cell in remaining}
    missing = {cell: len(results.plan.tasks[cell[0]].queries) for cell in remaining}
    # A prompt's cost goes with its images, so the bar counts those: its estimate then holds over tasks and shots alike.
    total = sum(count * (shots + 1) for (_, shots), count in missing.items())
    images = tqdm(unit="img", desc="encoding images", file=sys.stderr, leave=False)
    with images, closing(messages(config, target, results, done)) as received:
        bar: tqdm | None = None
        for message in received:
            if isinstance(message, Encoded):
                images.update(message.images)
                continue
            if bar is None:
                images.close()
                bar = tqdm(total=total, unit="img", desc="answering", file=sys.stderr)
            (task, shots), found = message.cell, {record["id"] for record in message.records}
            if message.records:  # without, a cell finished by now would get an empty file of work under way
                results.append(task, shots, message.records)
            bar.set_description(f"{task}, {shots}-shot")
            bar.update(message.images)
            done[task, shots] |= found
            if len(done[task, shots]) == missing[task, shots] and not results.finished(task, shots):
                results.finish(task, shots)
        if bar is not None:
            bar.close()
    results.features.unlink(missing_ok=True)


@command("eval", schema=EvalConfig)
def main(config: EvalConfig) -> None:
    """Few-shot evaluation of a trained run at 0, 4 and 8 shots.

    run=NAME_OR_FOLDER    a run of mm1.train, or a save_pretrained folder (with task_corpus=NAME)
    tasks=[a,b]           of the run's corpus; default: all
    datasets=FOLDER       tasks=[coco_karpathy,vqav2,...] are read from official files there (docs/datasets.md)
    +files.TASK.query.json.images=PATH   where one of them lies instead
    shots=[0,4,8]         demonstrations before each query; k-shot is the beginning of more shots
    limit=200             queries a task, a fixed sample; null: every one
    images=true           shuffled or none: controls that show whether the model looks at its images
    demonstrations=per_query   or fixed: the same ones before every query; nearest: the most similar images, nearest_by=RUN's eyes
    demonstration_seed=null    other demonstrations for the same queries; tables show the spread of several
    attention=dense       or sparq, with sparq.r=32 sparq.k=128 (docs/sparq.md)
    batch_size=16 device=auto processes=null dtype=float32 threads=null seed=0 prompts=null vqa_metric=null task_corpus=null

    Interrupted, it goes on where it stopped; finished, it prints what is there.
    """
    from mm1.cpu import use_whole_width

    use_whole_width()
    summary, folder = evaluate(config)
    print(render(summary, folder))


if __name__ == "__main__":
    main()
