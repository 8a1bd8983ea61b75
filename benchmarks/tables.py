"""How fast a suite of a thousand cells becomes a table, and a plan.

    table_labels    1,000 rows of one training seed, each 3 tasks x 3 numbers of shots x 200 items: files read, Markdown, CSV,
                    LaTeX and the HTML report written
    table_seeds     the same 1,000 cells as 200 rows of five training seeds
    plan            1,000 cells (500 trainings) composed, matched, costed and hashed, and the state of each read and printed

`ours`: cells a second, all of it (1,000 cells in 5 s are 200 a second). `peer`: of tables, the per-item scores alone with every
line parsed in full (Evaluation.scores), of every 20th cell; of the plan, Hydra's composition alone, of every 100th. `limit`: the
bytes of all results read and thrown away; of the plan, our own composition alone. One core. All is made in a temporary home, 1 GB
each table.

    python -m benchmarks.tables --json
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.report import Row, arguments, print_rows

CASES = ("table_labels", "table_seeds", "plan")
TASKS = {
    "captions_known": ("cider_d", "captioning", None),
    "colours": ("vqa_official", "vqa", 12.5),
    "binding": ("accuracy", "binding", 25.0),
}
SHOTS, ITEMS, CELLS, EVERY = (0, 4, 8), 200, 1000, 20
WORDS = ("a flag of the country with three stripes", "one person", "stands beside it", "green", "yellow", "red", "blue")


def queries(task: str) -> list[str]:
    return [f"{task}/{hashlib.blake2b(f'{task}{i}'.encode(), digest_size=8).hexdigest()}" for i in range(ITEMS)]


def lines(task: str, shots: int, values: Any, rng: Any) -> str:
    """As eval/prompter.py and eval/results.py write them: five captions an item, options, demonstrations."""
    names, kind = queries(task), TASKS[task][1]
    written = []
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        record: dict[str, Any] = {"id": name, "cluster": f"image{number // 2:05d}", "prediction": " ".join(rng.choice(WORDS, 3))}
        count = 5 if kind == "captioning" else 10 if kind == "vqa" else 1
        record["answers" if kind == "vqa" else "references"] = [
            " ".join(rng.choice(WORDS, 3 if count == 5 else 1)) for _ in range(count)
        ]
        if kind == "binding":
            record["options"] = dict.fromkeys(WORDS[:4], -1.25)
        record |= {"demonstrations": names[:shots], "logprob": -3.141592, "entropy": 1.234567, "score": round(float(value), 6)}
        written.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(written)


class Texts:
    """The text around the scores is made once; each cell has scores of its own."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.files = {(t, k): lines(t, k, np.zeros(ITEMS), rng).split('"score": 0.0}\n')[:-1] for t in TASKS for k in SHOTS}
        plan = {"corpus": "starter", "corpus_fingerprint": "c0ffee", "seed": 0, "demonstration_seed": None, "shots": list(SHOTS)}
        tasks = {t: {"queries": queries(t), "demonstrations": {q: queries(t)[:8] for q in queries(t)}} for t in TASKS}
        self.plan = plan | {"tasks": tasks}
        self.hard = {t: rng.uniform(0, 60, ITEMS) for t in TASKS}


def write_results(folder: Path, cell: Any, texts: Texts, rng: Any) -> None:
    from eval.statistics import clustered_mean

    folder.mkdir(parents=True)
    tasks: dict[str, Any] = {}
    clusters = [f"image{number // 2:05d}" for number in range(ITEMS)]
    for (task, shots), beginnings in texts.files.items():
        values = np.clip(texts.hard[task] + rng.normal(0, 12, ITEMS) + shots / 2, 0, 100).round(6)
        text = "".join(f'{begin}"score": {float(value)!r}}}\n' for begin, value in zip(beginnings, values, strict=True))
        (folder / f"{task}.{shots}.jsonl").write_text(text, encoding="utf-8")
        metric, kind, chance = TASKS[task]
        held = tasks.setdefault(task, {"metric": metric, "kind": kind, "prompts": "plain", "chance": chance, "shots": {}})
        held["shots"][str(shots)] = {k: v for k, v in asdict(clustered_mean(values, clusters)).items() if k != "df"}
    identity = {"version": 1, "plan_fingerprint": "feed0001" * 4, "control": None, "dtype": "float32"}
    (folder / "plan.json").write_text(json.dumps(identity | {"settings": {}, "weights": cell.hash, "plan": texts.plan}, indent=1))
    summary = identity | {"run": {"name": cell.folder.name, "hash": cell.hash}, "seed": 0, "sparq": None, "tasks": tasks}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


def write_suite(seeds: int, texts: Texts) -> str:
    """A started suite in which every cell is finished; its name."""
    from ablations.suites.planning import evaluation_keys, suite_folder
    from ablations.suites.record import SuiteCell, update_record
    from ablations.suites.suite import SuiteConfig
    from data_pipelines import paths

    rows = CELLS // seeds
    axes: dict[str, dict[str, Any]] = {
        "connector": {f"c{i}": [f"connector.num_tokens={i + 1}"] for i in range(rows // 20)},
        "rate": {f"r{i}": [f"optim.peak_lr={i + 1}e-5"] for i in range(20)},
    }
    suite = SuiteConfig(name=f"thousand{seeds}", about="A thousand cells.", axes=axes)
    place, cells = suite_folder(suite.name, "tiny"), []
    for i in range(rows):
        choice = {"connector": f"c{i // 20}", "rate": f"r{i % 20}"}
        for seed in range(seeds):
            key = hashlib.blake2b(f"{seeds} {i} {seed}".encode(), digest_size=8).hexdigest()
            folder = paths.runs() / f"{suite.name}.{i}-{key}"
            cost = {"parameters": 5.7e6, "tokens": 657e3, "images": 32.5e3, "flops": 2.6e13, "memory": 2e9}
            label = ".".join(choice.values())
            cells.append(SuiteCell(suite.name, label, choice, seed, i == 0, key, folder, (f"seed={seed}", label), 340, cost))
    place.save(asdict(suite), "tiny", [f"suite={suite.name}"], cells)
    config = yaml.safe_dump({"scale": "tiny"} | {f"section{i}": {f"key{j}": j / 7 for j in range(12)} for i in range(12)})
    (key,) = evaluation_keys(suite.evaluation)
    for number, cell in enumerate(cells):
        write_results(cell.folder / "results" / "e0", cell, texts, np.random.default_rng(number))
        (cell.folder / "export").mkdir()
        (cell.folder / "export" / "config.json").write_text("{}")
        (cell.folder / "config.yaml").write_text(config)
        (cell.folder / "run.json").write_text(json.dumps(run_record(cell), indent=1))
        update_record(place.record_path(cell), suite=cell.suite, hash=cell.hash, state="finished", evaluations={key: "e0"})
    return suite.name


def run_record(cell: Any) -> dict[str, Any]:
    parts = {"image_encoder": 701_000, "connector": 690_000, "decoder": 4_260_000, "total": 5_651_000, "trainable": 5_650_000}
    return {
        "version": 1, "name": cell.folder.name.rpartition("-")[0], "ablation": [], "hash": cell.hash, "seed": cell.seed,
        "status": "finished", "parameters": parts, "tokens_seen": 657_000, "loss_tokens_seen": 400_000, "images_seen": 32_500,
        "steps": 340, "flops": 2.64e13, "seconds": 394.0, "corpus": {"name": "starter", "fingerprint": "c0ffee0000"},
        "identity": {f"section{i}": {f"key{j}": j / 7 for j in range(12)} for i in range(12)} | {"seed": cell.seed},
    }  # fmt: skip


def table_row(case: str, seeds: int, repeats: int, texts: Texts) -> Row:
    from ablations.report.write import write_report
    from ablations.results import read_run
    from ablations.tables.suite_table import suite_table
    from ablations.tables.suite_text import render_suite_csv, render_suite_latex, render_suite_markdown
    from data_pipelines import paths

    name = write_suite(seeds, texts)

    def ours() -> None:
        found = suite_table(name)
        for render in (render_suite_markdown, render_suite_csv, render_suite_latex):
            render(found)
        write_report(found, paths.home() / "report.html")

    folders = sorted(paths.runs().glob(f"{name}.*"))

    def peer() -> None:
        for folder in folders[::EVERY]:
            evaluation = read_run(folder).evaluations[0]
            for task in TASKS:
                for shots in SHOTS:
                    evaluation.scores(task, shots)

    def limit() -> None:
        for folder in folders:
            for path in (folder / "results" / "e0").iterdir():
                path.read_bytes()

    rates = [CELLS / fastest(ours, repeats), CELLS / EVERY / fastest(peer, repeats), CELLS / fastest(limit, repeats)]
    return Row(case, rates[0], rates[1], rates[0] / rates[1], rates[2], "cells/s", "every line parsed", "bytes read")


def plan_row(repeats: int) -> Row:
    """Without a corpus, what a sequence holds is assumed (ablations/suites/cost.py): the same work but for reading the corpus."""
    from ablations.suites.composing import Composer
    from ablations.suites.planning import build_cells, evaluation_keys, suite_folder
    from ablations.suites.record import state_of
    from ablations.suites.show import plan_table, status_table
    from ablations.suites.suite import SuiteConfig
    from configs.command import compose
    from mm1.config import TrainConfig

    axes: dict[str, dict[str, Any]] = {
        "rate": {f"r{i}": [f"optim.peak_lr={i + 1}e-5"] for i in range(25)},
        "tokens": {f"t{n}": [f"connector.num_tokens={n}"] for n in (1, 4, 9, 16)},
        "logging": {"a": ["train.log_every=1"], "b": ["train.log_every=2"]},
    }
    suite = SuiteConfig(name="planned", axes=axes)

    def ours() -> None:
        cells = build_cells(suite, "tiny", seeds=range(5))
        assert (len(cells), len({cell.hash for cell in cells})) == (CELLS, CELLS // 2)
        place, keys = suite_folder(suite.name, "tiny"), evaluation_keys(suite.evaluation)
        states = [state_of(place, cell, keys, 0) for cell in cells]
        plan_table(cells, states, dollars_an_hour=None, devices=1)
        status_table(cells, states, {})

    def peer() -> None:
        for number in range(CELLS // EVERY // 5):
            compose("train", TrainConfig, [f"optim.peak_lr={number + 1}e-5"])

    composer = Composer()

    def limit() -> None:
        for number in range(CELLS):
            composer.compose(["scale=tiny", f"optim.peak_lr={number + 1}e-6"])

    rates = [CELLS / fastest(ours, repeats), CELLS / EVERY / 5 / fastest(peer, repeats), CELLS / fastest(limit, repeats)]
    return Row("plan", rates[0], rates[1], rates[0] / rates[1], rates[2], "cells/s", "Hydra composes", "our composition alone")


def fastest(work: Any, repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs; no run to warm up, a command has none."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def rows(chosen: list[str], repeats: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as home:
        os.environ["MM1_HOME"] = home
        texts = Texts()
        for case, seeds in (("table_labels", 1), ("table_seeds", 5)):
            if case in chosen:
                yield table_row(case, seeds, repeats, texts)
        if "plan" in chosen:
            yield plan_row(repeats)


def main() -> None:
    given = arguments(__doc__ or "", CASES)
    print_rows(rows(given.case or list(CASES), given.repeats), given.json)


if __name__ == "__main__":
    main()
