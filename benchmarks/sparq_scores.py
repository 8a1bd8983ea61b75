"""`python -m benchmarks.sparq_scores run=NAME --json`: what SparQ attention costs in scores, against the bytes a step moves.

    probes   every cell (task, shots) under dense attention, SparQ at each r, and its rivals at equal bytes (sparq_rivals.py), all
             after one dense prefill (sparq_probe.py): score, agreement with the dense answers, log-probability of the reference
    runs     `eval.fewshot` itself, dense and with SparQ (`question sparse`, `answer only`): scores and items a second

Differences are paired, their errors clustered by image (ablations/statistics.py). What is finished is kept, a line an item and
method, in <home>/cache/sparq_scores/RUN-WEIGHTS/PLAN/TASK.SHOTS.jsonl and found again; `--plot FILE` draws what is there.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from benchmarks.report import print_rows
from benchmarks.sparq_curves import Cell, draw, run_rows, score_rows
from benchmarks.sparq_probe import Probe, methods, probing_generator
from configs.command import command
from configs.errors import UserError
from data_pipelines import paths
from eval.fewshot import EvalConfig, prepare
from mm1.attention.settings import SparqSettings

PROBES = ("task", "recall")
SETUPS = {"question sparse": "sparse", "answer only": "dense"}


@dataclass
class SparqScoresConfig:
    """The command's settings; those of eval.fewshot mean the same here."""

    run: str = MISSING
    tasks: list[str] | None = None
    shots: list[int] = field(default_factory=lambda: [8])
    limit: int | None = 100
    r: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    k: int = 32
    probes: list[str] = field(default_factory=lambda: ["task"])
    """task, recall: a caption to be found among the demonstrations."""
    runs: list[int] = field(default_factory=list)
    """Values of r for whole runs of eval.fewshot; none: no runs."""
    batch_size: int = 16
    seed: int = 0
    task_corpus: str | None = None
    json: bool = False
    plot: str | None = None
    """A PNG of all results kept for this run (and those of `beside`)."""
    beside: list[str] = field(default_factory=list)
    """Other runs whose kept results stand in the picture."""

    def validate(self) -> None:
        if unknown := [probe for probe in self.probes if probe not in PROBES]:
            raise UserError(f"probes={unknown}: choose from {', '.join(PROBES)}.")
        if min(self.shots, default=0) < 1:
            raise UserError(f"shots={self.shots}: SparQ attends to demonstrations; give numbers from 1 up.")
        for name, values in (("r", self.r), ("runs", self.runs)):
            if len(set(values)) != len(values) or min(values, default=1) < 1:
                raise UserError(f"{name}={values}: give different numbers from 1 up.")
        if self.k < 4:
            raise UserError(f"k={self.k}: give a number of tokens from 4 up.")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: give a number from 1 up.")

    def evaluation(self, tasks: list[str] | None, shots: list[int], sparq: SparqSettings | None = None) -> EvalConfig:
        more: dict[str, Any] = {} if sparq is None else {"attention": "sparq", "sparq": sparq}
        return EvalConfig(
            run=self.run,
            tasks=tasks,
            shots=shots,
            limit=self.limit,
            batch_size=self.batch_size,
            seed=self.seed,
            task_corpus=self.task_corpus,
            **more,
        )


class Store:
    """Results of one run under one plan, a JSON line each. A line that a kill cut short is dropped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        if not path.is_file():
            return []
        whole, _, rest = path.read_bytes().rpartition(b"\n")
        if rest:
            path.write_bytes(whole + b"\n" if whole else b"")
        try:
            return [json.loads(line) for line in whole.split(b"\n") if line]
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged ({error}). Delete it and start again.") from error

    def append(self, name: str, records: list[dict[str, Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def kept_under(run: str, weights: str) -> Path:
    return paths.home() / "cache" / "sparq_scores" / f"{run}-{weights}"


def measure(config: SparqScoresConfig) -> Iterator[Any]:
    """Rows as they come. Raises UserError for what can be wrong, before a model is loaded."""
    target, results = prepare(config.evaluation(config.tasks, config.shots))
    same = json.dumps([results.plan.fingerprint, config.limit, config.batch_size])
    store = Store(kept_under(target.name, target.weights) / hashlib.blake2b(same.encode(), digest_size=6).hexdigest())
    store.folder.mkdir(parents=True, exist_ok=True)
    about = {"run": target.name, "kinds": {name: [t.kind, results.settings[name].metric] for name, t in results.tasks.items()}}
    (store.folder / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    kinds = {name: (task.kind, results.settings[name].metric) for name, task in results.tasks.items() if task.kind != "binding"}
    cells = [Cell(target.name, name, shots, probe) for probe in config.probes for shots in config.shots for name in kinds]
    probe_all(config, target, results, store, cells)
    found = {cell: store.read(cell.file) for cell in cells}
    yield from score_rows(found, kinds, methods(config.r, config.k, recall=True))
    if config.runs:
        for shots in config.shots:
            for name in kinds:
                whole_runs(config, store, name, shots)
        yield from run_rows(target.name, store.read("runs.jsonl"), kinds, config.shots)


def probe_all(config: SparqScoresConfig, target: Any, results: Any, store: Store, cells: list[Cell]) -> None:
    """Answer what is not kept yet."""
    from tqdm import tqdm

    wanted = {cell: methods(config.r, config.k, recall=cell.probe == "recall") for cell in cells}
    known = {cell: {(record["method"], record["id"]) for record in store.read(cell.file)} for cell in cells}
    planned = {cell: [(m.name, q) for q in results.plan.tasks[cell.task].queries for m in wanted[cell]] for cell in cells}
    open_cells = [cell for cell in cells if not known[cell].issuperset(planned[cell])]
    if not open_cells:
        return
    from eval.workers import Worker

    with tempfile.TemporaryDirectory() as temporary:
        spilled = replace(results, runs_results=Path(temporary))
        spilled.folder.mkdir(parents=True)
        worker = Worker(config.evaluation(config.tasks, config.shots), target, spilled)
        total = sum(len(planned[cell]) for cell in open_cells)
        done = sum(len(known[cell]) for cell in open_cells)
        with tqdm(total=total, initial=done, unit="answer", file=sys.stderr) as bar:
            for cell in open_cells:
                bar.set_description(cell.title)
                generator = probing_generator(worker, cell.task)
                probe = Probe(generator, worker.prompters[cell.task], recall=cell.probe == "recall", seed=config.seed)
                for records in probe.answer(probe.items(cell.shots), config.batch_size, wanted[cell], known[cell]):
                    store.append(cell.file, records)
                    bar.update(len(records))


def whole_runs(config: SparqScoresConfig, store: Store, task: str, shots: int) -> None:
    """eval.fewshot of one cell, images to answers, dense and under each set-up; kept with the time it took."""
    names: list[tuple[str, SparqSettings | None]] = [("dense", None)]
    for r in config.runs:
        for setup, suffix in SETUPS.items():
            names.append((f"r{r} k{config.k}, {setup}", SparqSettings(r=r, k=config.k, dense_below=1, suffix=suffix)))
    known = {(record["task"], record["shots"], record["method"]) for record in store.read("runs.jsonl")}
    for name, sparq in names:
        if (task, shots, name) not in known:
            store.append("runs.jsonl", [{"task": task, "shots": shots, "method": name} | timed(config, task, shots, sparq)])


def timed(config: SparqScoresConfig, task: str, shots: int, sparq: SparqSettings | None) -> dict[str, Any]:
    """Seconds from image files to answers in one process, the model loaded; and the records."""
    from eval.workers import Answered, Worker

    settings = config.evaluation([task], [shots], sparq)
    target, results = prepare(settings)
    with tempfile.TemporaryDirectory() as temporary:
        results = replace(results, runs_results=Path(temporary))
        results.folder.mkdir(parents=True)
        worker = Worker(settings, target, results)
        start = time.perf_counter()
        for _ in worker.encode():
            pass
        answered = [m for m in worker.answer({(task, shots): set()}) if isinstance(m, Answered)]
        seconds = time.perf_counter() - start
    records = {record["id"]: record for message in answered for record in message.records}
    return {"seconds": round(seconds, 3), "records": [records[name] for name in results.plan.tasks[task].queries]}


@command("sparq_scores", schema=SparqScoresConfig)
def main(config: SparqScoresConfig) -> None:
    """Scores against bytes moved: a trained run under dense attention, SparQ and its rivals, item by item.

    run=NAME_OR_FOLDER     as in eval.fewshot, with task_corpus=NAME where its own corpus is not meant
    tasks=[a,b] shots=[8] limit=100 batch_size=16 seed=0
    r=[8,16,32,64] k=32    SparQ's; rivals get the bytes of each r
    probes=[task,recall]   recall: the query's own picture stands among the demonstrations, under a name dealt out anew
    runs=[16]              and whole runs of eval.fewshot with these r, with items a second
    --json                 one JSON object a line
    --plot FILE            draw what is kept, of run=... and beside=[...], instead
    """
    from mm1.cpu import use_whole_width

    if config.plot is not None:
        print(draw([store_of(name, config.task_corpus) for name in [config.run, *config.beside]], Path(config.plot)))
        return
    use_whole_width()
    print_rows(measure(config), config.json)


def store_of(run: str, corpus: str | None) -> Path:
    from eval.fewshot import resolve

    target = resolve(run, corpus)
    return kept_under(target.name, target.weights)


def flags_as_settings(arguments: list[str]) -> list[str]:
    """--json and --plot FILE, as the other benchmarks have them -> json=true, plot=FILE."""
    given: list[str] = []
    for argument in arguments:
        if given and given[-1] == "--plot":
            given[-1] = f"plot={argument}"
        else:
            given.append("json=true" if argument == "--json" else argument)
    return given


if __name__ == "__main__":
    sys.argv[1:] = flags_as_settings(sys.argv[1:])
    main()
