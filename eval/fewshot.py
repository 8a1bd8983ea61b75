"""Few-shot evaluation: a trained run -> answers, scores and error bars at 0, 4 and 8 shots.

    run -> corpus's tasks -> plan (plan.py) -> prompts (prompts.py, controls.py) -> answers (generate.py) -> scores (results.py)

Everything left of the answers is a pure function of the corpus and the settings and needs no torch, so that an evaluation found
finished is printed in a second.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from configs.command import command
from configs.errors import UserError
from data_pipelines import paths
from eval.controls import IMAGES, Show, show_plainly, show_shuffled
from eval.nearest import EncoderFeatures
from eval.plan import make_plan
from eval.prompts import PROMPTS, build_prompt, options
from eval.results import REFERENCES_KEY, Results, render
from eval.tasks.example import Example
from eval.tasks.official.presence import check_compared, check_images
from eval.tasks.pool import Pool, TaskData
from eval.tasks.settings import load_settings
from eval.tasks.sources import read_sources, split_names

SMALL_MODEL = 50_000_000
"""Parameters below which one CPU thread decodes fastest: a step's matrices are too small to share, and on a machine with other
work the threads wait for each other at every one of them (measured with 5.6M parameters, 2 busy cores: 4 times slower with
two)."""

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
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: give a number from 1 up.")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads={self.threads}: give a number from 1 up, or null.")
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
    tasks, corpus, fingerprint = read_sources(
        config.tasks, corpus=target.corpus, datasets=config.datasets, overrides=config.files, shots=max(config.shots, default=0)
    )
    settings = {
        task.name: load_settings(task.name, task.kind, prompts=config.prompts, vqa_metric=config.vqa_metric) for task in tasks
    }
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
        if task.kind == "captioning" and len(plan.tasks[task.name].queries) < 2:
            raise UserError(f"Task {task.name}: CIDEr of fewer than 2 images is always 0. Raise limit=...")
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
    )
    return target, results


class Prompter:
    """Builds a task's requests as the plan and the control say."""

    def __init__(self, results: Results, task: TaskData) -> None:
        self.task, self.plan, self.control = task, results.plan.tasks[task.name], results.control
        self.template = PROMPTS[results.settings[task.name].prompts][task.kind]
        show: Show = show_shuffled(task, results.plan.seed) if self.control == "shuffled" else show_plainly
        # Pools are small or their images repeat as demonstrations: keep what was read, and share its bytes.
        self._show = lru_cache(maxsize=4096)(show)

    def examples(self, query: str, shots: int) -> tuple[Example, list[Example]]:
        """(the query, its `shots` demonstrations) as shown."""
        asked = self._show(self.task.queries, query)
        if self.task.support is None:
            return asked, list(asked.demonstrations[:shots])
        support: Pool = self.task.support
        return asked, [self._show(support, name) for name in self.plan.shown(query, shots)]

    def request(self, query: str, shots: int) -> Any:
        from eval.generate import Request

        asked, demonstrations = self.examples(query, shots)
        parts = build_prompt(self.template, demonstrations, asked, with_images=self.control != "none")
        return Request(parts, options(self.template, asked.names))

    def record(self, query: str, shots: int, answer: Any) -> dict[str, Any]:
        """One line of the results, still without its score."""
        asked = self._show(self.task.queries, query)
        record: dict[str, Any] = {"id": query, "cluster": asked.image_id, "prediction": answer.text}
        record[REFERENCES_KEY[self.task.kind]] = list(asked.references)
        if asked.names:
            record["options"] = {name: round(value, 6) for name, value in zip(asked.names, answer.options, strict=True)}
        return record | {"demonstrations": self.plan.shown(query, shots), "logprob": round(answer.logprob, 6)}


def evaluate(config: EvalConfig) -> tuple[dict[str, Any], Path]:
    """Evaluate what is not finished yet; returns (summary, results folder)."""
    target, results = prepare(config)
    with results.opened():
        remaining = [cell for cell in results.cells() if not results.finished(*cell)]
        if remaining:
            _answer(config, target, results, remaining)
        return results.summarise(), results.folder


def _answer(config: EvalConfig, target: Target, results: Results, remaining: list[tuple[str, int]]) -> None:
    import torch
    from tqdm import tqdm

    from eval.generate import Generator, ImageFeatures, load_model

    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(target.export, device, config.dtype)
    if device == "cpu" and (config.threads or model.num_parameters() < SMALL_MODEL):
        torch.set_num_threads(config.threads or 1)
    features = ImageFeatures(model, device)
    prompters = {name: Prompter(results, task) for name, task in results.tasks.items()}
    for image, name in _images(results, prompters):
        features.register(image, name)
    items = {name: len(plan.queries) for name, plan in results.plan.tasks.items()}
    # A prompt's cost goes with its images, so the bar counts those: its estimate then holds over tasks and shots alike.
    with tqdm(total=sum(items[task] * (shots + 1) for task, shots in remaining), unit="img", file=sys.stderr) as bar:
        for task, shots in remaining:
            bar.set_description(f"{task}, {shots}-shot")
            settings, prompter = results.settings[task], prompters[task]
            generator = Generator(model, tokenizer, features, stop=settings.stop, max_new_tokens=settings.max_new_tokens)
            queries = results.plan.tasks[task].queries
            requests = [prompter.request(query, shots) for query in queries]
            done = results.answered(task, shots)
            for batch in generator.batches(requests, config.batch_size):
                if any(queries[i] not in done for i in batch):
                    answers = generator.answer([requests[i] for i in batch])
                    records = [prompter.record(queries[i], shots, answer) for i, answer in zip(batch, answers, strict=True)]
                    results.append(task, shots, [record for record in records if record["id"] not in done])
                bar.update(len(batch) * (shots + 1))
            results.finish(task, shots)


def _images(results: Results, prompters: dict[str, Prompter]) -> Iterator[tuple[bytes, str]]:
    """Every image of the evaluation with a name for errors, in an order that the plan alone decides."""
    if results.control == "none":
        return
    for task, prompter in prompters.items():
        shown = [prompter.examples(query, results.plan.shots[-1]) for query in results.plan.tasks[task].queries]
        yield from ((asked.image, f"task {task}, item {asked.id}") for asked, _ in shown)
        yield from ((d.image, f"task {task}, demonstration {d.id}") for _, demonstrations in shown for d in demonstrations)


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
    batch_size=16 device=auto dtype=float32 threads=null seed=0 prompts=null vqa_metric=null task_corpus=null

    Interrupted, it goes on where it stopped; finished, it prints what is there.
    """
    summary, folder = evaluate(config)
    print(render(summary, folder))


if __name__ == "__main__":
    main()
