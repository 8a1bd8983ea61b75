"""Suites made on the spot: run folders with losses, scores and answers, and the SuiteTable of them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ablations import statistics as st
from ablations.results import read_run
from ablations.suites.record import SuiteCell
from ablations.tables.answers import collect
from ablations.tables.building import Options, build_from
from ablations.tables.effects import effects_of
from ablations.tables.selection import Selection, Variant
from ablations.tables.suite_table import SuiteRow, SuiteTable
from tests.test_table import Folders

Choice = Mapping[str, str]


@dataclass(frozen=True)
class MadeTask:
    """`items`: (id, cluster, references)."""

    metric: str
    kind: str
    chance: float | None
    items: Sequence[tuple[str, str, Sequence[str]]]


def plain_tasks(items: int = 8) -> dict[str, MadeTask]:
    def listed(name: str, said: str) -> list[tuple[str, str, list[str]]]:
        return [(f"{name}{i}", f"image{i // 2}", [f"{said} {i}"]) for i in range(items)]

    return {
        "colours": MadeTask("vqa_official", "vqa", 12.5, listed("colours", "red")),
        "captions": MadeTask("cider_d", "captioning", None, listed("captions", "a thing")),
    }


@dataclass
class MadeSuite:
    """What differs from suite to suite. `quality(choice, shots)`: points added to a variant's scores; `say(references, score)`:
    an answer; `record`: further values of run.json."""

    name: str
    axes: dict[str, list[str]]
    baseline: dict[str, str]
    quality: Callable[[Choice, int], float] = lambda choice, shots: 0.0
    say: Callable[[Sequence[str], float], str] = lambda references, score: references[0] if score > 50 else "a cat"
    record: Callable[[Choice], dict[str, Any]] = lambda choice: {}
    held_out: Callable[[Choice], float] = lambda choice: 4.0
    seeds: int = 2
    shots: tuple[int, ...] = (0, 4)
    steps: int = 60
    scale: str = "tiny"
    about: str = "What the connector does."


def suite_of(root: Path, made: MadeSuite, tasks: Mapping[str, MadeTask] | None = None) -> SuiteTable:
    """Writes the runs under `root`/runs and returns their table."""
    tasks, folders = tasks or plain_tasks(), Folders(root / "runs")
    choices = [dict(zip(made.axes, names, strict=True)) for names in itertools.product(*made.axes.values())] or [{}]
    choices.sort(key=lambda choice: choice != made.baseline)
    rows, variants = [], []
    hard = {name: np.random.default_rng(7).uniform(0, 70, len(task.items)) for name, task in tasks.items()}
    for number, choice in enumerate(choices):
        label = ".".join(choice.values()) or "base"
        cells, runs = [], []
        for seed in range(made.seeds):
            key = f"{number:05x}{seed:03x}"
            more = {"tokens_seen": 690_000, "images_seen": 21_000, "flops": 2.4e13, "seconds": 380.0 + seed} | made.record(choice)
            name = f"{made.name}.{label}"
            folder = folders.run(name, key, seed=seed, ablation=[label], steps=made.steps, connector=label, **more)
            _write_losses(folder, made, choice, seed)
            _write_answers(folder, made, choice, seed, tasks, hard)
            cost = {"tokens": 688_000.0, "images": 21_000.0, "flops": 2.4e13, "seconds": 400.0}
            overrides = (f"name={name}", *(f"{axis}={variant}" for axis, variant in choice.items()), f"seed={seed}")
            base = choice == made.baseline
            cells.append(SuiteCell(made.name, label, dict(choice), seed, base, key, folder, overrides, made.steps, cost))
            runs.append(read_run(folder))
        variants.append(Variant(label, runs, [run.evaluations[0] for run in runs]))
        rows.append(SuiteRow(label, dict(choice), cells, runs))
    selection = Selection(variants, variants[0].evaluations[0].protocol)
    held = collect(selection)
    table = build_from(held, selection, Options(pair_seeds=True))
    baseline = rows[0].label
    effects = effects_of(held, table, made.axes, {row.label: row.choice for row in rows}, baseline)
    return SuiteTable(made.name, made.about, made.scale, "tokens", made.axes, baseline, table, rows, selection, [], effects)


def _write_losses(folder: Path, made: MadeSuite, choice: Choice, seed: int) -> None:
    draw = np.random.default_rng([seed, *"".join(choice.values()).encode()])
    end = made.held_out(choice) + float(draw.normal(0, 0.05))
    lines = []
    for step in range(5, 5 * made.steps + 1, 5):
        fall = 4.5 * math.exp(-step / (0.9 * made.steps)) + end - 0.4
        own = {"captions": fall - 0.5, "interleaved": fall - 0.2, "text": fall + 1.8}
        noisy = {f"loss_{kind}": round(value + float(draw.normal(0, 0.12)), 4) for kind, value in own.items()}
        lines.append({"step": step, "loss": round(sum(noisy.values()) / 3, 4), "images_per_second": 100.0 + step} | noisy)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = json.loads((folder / "run.json").read_text())
    own_end = end + 0.1
    record["validation"] = {
        "loss_captions": own_end - 0.4,
        "loss_captions_shuffled_images": own_end,
        "loss_interleaved": own_end - 0.2,
        "loss_text": own_end + 0.6,
    }
    (folder / "run.json").write_text(json.dumps(record))


def _write_answers(
    folder: Path, made: MadeSuite, choice: Choice, seed: int, tasks: Mapping[str, MadeTask], hard: Mapping[str, np.ndarray]
) -> None:
    results = folder / "results" / "e0"
    results.mkdir(parents=True)
    draw = np.random.default_rng(100 + seed)
    summary: dict[str, Any] = {}
    for name, task in tasks.items():
        for shots in made.shots:
            level = hard[name] + made.quality(choice, shots) + draw.normal(0, 3) + draw.normal(0, 12, len(task.items))
            scores = np.clip(level, 0, 100).round(3)
            if task.kind == "vqa":
                scores = np.where(draw.uniform(0, 100, len(scores)) < scores, 100.0, 0.0)
            records = [
                {
                    "id": own, "cluster": cluster, "prediction": made.say(references, float(score)),
                    "answers" if task.kind == "vqa" else "references": list(references), "score": float(score),
                }
                for (own, cluster, references), score in zip(task.items, scores, strict=True)
            ]  # fmt: skip
            (results / f"{name}.{shots}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            mean = st.clustered_mean(scores, [cluster for _, cluster, _ in task.items])
            held = {"mean": mean.mean, "se": mean.se, "n": mean.n, "clusters": mean.clusters}
            entry = summary.setdefault(name, {"metric": task.metric, "kind": task.kind, "chance": task.chance, "shots": {}})
            entry["shots"][str(shots)] = held
    record = json.loads((folder / "run.json").read_text())
    content = {
        "version": 1, "run": {"name": record["name"], "hash": record["hash"]}, "plan_fingerprint": "feed0001feed0001",
        "control": None, "seed": 0, "tasks": summary, "means": {},
    }  # fmt: skip
    (results / "summary.json").write_text(json.dumps(content))
