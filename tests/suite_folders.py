"""Suites' folders with finished cells, as the runner, mm1.train and eval.fewshot leave them; no training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ablations import statistics as st
from ablations.suites.planning import evaluation_key, suite_folder
from ablations.suites.record import SuiteCell, SuiteFolder, update_record
from ablations.suites.suite import SuiteConfig, baseline_choice, label_of, variants_at
from data_pipelines import paths

TASKS = {"captions": ("cider_d", "captioning", None), "colours": ("vqa_official", "vqa", 12.5)}
PARAMETERS = {"image_encoder": 1000, "connector": 200, "decoder": 3000, "total": 4200, "trainable": 4200}


def key_of(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Study:
    """A suite that was started: `finish(label, seed, scores)` writes what a finished cell leaves."""

    def __init__(
        self, suite: SuiteConfig, *, seeds: Sequence[int] = (0,), scale: str = "tiny", folder: str | None = None
    ) -> None:
        self.suite, self.scale = suite, scale
        self.place: SuiteFolder = suite_folder(suite.name, scale, folder=folder)
        axes = variants_at(suite, scale)
        base = baseline_choice(suite, axes, scale)
        choices: list[dict[str, str]] = [{}]
        for axis, variants in axes.items():
            choices = [choice | {axis: variant} for choice in choices for variant in variants]
        choices.sort(key=lambda choice: choice != base)
        self.cells = [self._cell(choice, seed, choice == base) for choice in choices for seed in seeds]
        self.place.save(asdict(suite), scale, [f"suite={suite.name}", f"scale_name={scale}", f"seeds={list(seeds)}"], self.cells)
        self.by_name = {cell.name: cell for cell in self.cells}

    def _cell(self, choice: dict[str, str], seed: int, baseline: bool) -> SuiteCell:
        label = label_of(choice)
        key = key_of(f"{self.suite.name} {label} {seed}")
        folder = paths.runs() / f"{self.suite.name}.{label}-{key}"
        cost = {"parameters": 4200.0, "trained": 4200.0, "tokens": 510_000.0, "images": 4100.0, "flops": 1.6e13, "memory": 1e9}
        paper = {str(shots): value for shots, value in self.suite.paper.get(label, {}).items()}
        return SuiteCell(self.suite.name, label, choice, seed, baseline, key, folder, (f"seed={seed}",), 200, cost, paper)

    def train(self, label: str, seed: int = 0, **changes: Any) -> SuiteCell:
        """The run alone, not evaluated. `changes`: of its run.json."""
        cell = self.by_name[f"{label}.seed{seed}"]
        (cell.folder / "export").mkdir(parents=True)
        (cell.folder / "export" / "config.json").write_text("{}")
        (cell.folder / "config.yaml").write_text(yaml.safe_dump({"scale": self.scale, "seed": seed}))
        record = {
            "version": 1, "name": cell.folder.name.rpartition("-")[0], "ablation": [], "hash": cell.hash, "seed": seed,
            "status": "finished", "parameters": PARAMETERS, "tokens_seen": 500_000, "loss_tokens_seen": 200_000,
            "images_seen": 4000, "steps": 200, "flops": 1.5e13, "seconds": 75.0, "identity": {"seed": seed, "label": label},
            "corpus": {"name": "starter", "fingerprint": "c0ffee0000"},
        } | changes  # fmt: skip
        (cell.folder / "run.json").write_text(json.dumps(record))
        return cell

    def finish(
        self, label: str, seed: int = 0, scores: Mapping[tuple[str, int], Sequence[float]] | None = None, **changes: Any
    ) -> Path:
        """Train and evaluate as the suite says; the folder of the results."""
        cell = self.train(label, seed, **changes)
        results = cell.folder
        for number, overrides in enumerate(self.suite.evaluation.fewshot()):
            control = next(o.partition("=")[2] for o in overrides if o.startswith("images="))
            own = scores or self.scores(label, seed)
            results = self.evaluate(cell, own, control=None if control == "true" else control, name=f"e{number}")
            self.note(cell, evaluation_key(overrides), results.name)
        return results

    def note(self, cell: SuiteCell, key: str, folder: str | None) -> None:
        """What execute.py reports of an evaluation."""
        path = self.place.record_path(cell)
        old = json.loads(path.read_text())["evaluations"] if path.is_file() else {}
        update_record(path, suite=cell.suite, cell=cell.name, hash=cell.hash, state="finished", evaluations=old | {key: folder})

    def evaluate(
        self, cell: SuiteCell, scores: Mapping[tuple[str, int], Sequence[float]], *, control: str | None = None, name: str = "e0",
        plan: str = "feed0001",
    ) -> Path:  # fmt: skip
        """`scores[task, shots]` in points; two items share an image."""
        folder = cell.folder / "results" / name
        folder.mkdir(parents=True)
        tasks: dict[str, Any] = {}
        for (task, shots), values in scores.items():
            metric, kind, chance = TASKS[task]
            clusters = [f"image{i // 2}" for i in range(len(values))]
            write_items(folder / f"{task}.{shots}.jsonl", task, values, clusters)
            own = st.clustered_mean(np.array(values), clusters)
            held = {"mean": own.mean, "se": own.se, "n": own.n, "clusters": own.clusters}
            tasks.setdefault(task, {"metric": metric, "kind": kind, "chance": chance, "shots": {}})["shots"][str(shots)] = held
        summary = {
            "version": 1, "run": {"name": cell.folder.name, "hash": cell.hash}, "plan_fingerprint": plan, "control": control,
            "seed": 0, "tasks": tasks, "means": {},
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    def scores(self, label: str, seed: int, lift: float = 0.0, n: int = 40) -> dict[tuple[str, int], list[float]]:
        """Of a model whose quality goes with its label and seed; how hard an item is, is common to all."""
        hard, own = np.random.default_rng(1), np.random.default_rng(int(key_of(f"{label} {seed}")[:8], 16))
        found = {}
        for task in TASKS:
            for shots in self.suite.evaluation.shots:
                level = hard.uniform(20, 60, n // 2).repeat(2) + lift + own.normal(0, 6, n) + own.normal(0, 1)
                found[task, shots] = [float(value) for value in np.clip(level, 0, 100).round(3)]
        return found


def write_items(path: Path, task: str, values: Sequence[float], clusters: Sequence[str]) -> None:
    """A results file as eval/results.py writes it."""
    lines = []
    for number, (value, cluster) in enumerate(zip(values, clusters, strict=True)):
        record = {"id": f"{task}{number}", "cluster": cluster, "prediction": 'a "quoted", "score": 3} cat', "answers": ["a"]}
        lines.append(json.dumps(record | {"demonstrations": [], "logprob": -1.5, "score": value}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
