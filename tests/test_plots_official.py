"""Sample figures of tasks from official files, which no corpus holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ablations import plots
from ablations.results import Evaluation, Run, read_run
from configs.errors import UserError
from tests.official import write_all
from tests.test_browse import model, say_other, write_evaluation
from tests.test_fewshot import write_tasks
from tests.test_table import Folders

Evaluated = tuple[Run, Evaluation]


@pytest.fixture
def datasets(tmp_path: Path) -> Path:
    return write_all(tmp_path / "vl")


def evaluate(tmp_path: Path, datasets: Path, *tasks: str) -> Evaluated:
    """A run's record with an evaluation over tasks of its corpus and of official files."""
    corpus = write_tasks(tmp_path / "toy")
    folder = Folders(tmp_path / "runs").run("base", "aaaa0000", corpus={"name": str(corpus), "fingerprint": "0" * 64})
    official = {"datasets": str(datasets), "tasks": list(tasks), "task_corpus": str(corpus)}
    results = write_evaluation(model(tmp_path / "base"), corpus, say_other, **official)
    shutil.copytree(results.folder, folder / "results" / "e")
    summary = folder / "results/e/summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"run": {"name": "base", "hash": "aaaa0000"}}))
    run = read_run(folder)
    return run, run.evaluations[0]


@pytest.mark.parametrize("tasks", [("vqav2",), ("questions", "vqav2")])
def test_samples_of_official_tasks_come_from_their_files(tasks: tuple[str, ...], datasets: Path, tmp_path: Path) -> None:
    run, evaluation = evaluate(tmp_path, datasets, *tasks)
    held = plots.evaluated_tasks(run, evaluation, datasets=str(datasets))
    assert list(held) == list(tasks)
    assert held["vqav2"].queries.example("7001").question == "is it 7001?"
    for task in tasks:
        [path] = plots.samples(run, evaluation, task, tmp_path / f"samples_{task}", n=3, tasks=held)
        assert min(Image.open(path).size) > 200
    with pytest.raises(UserError, match=r"vqav2 may be from official files: say where they lie, datasets=FOLDER"):
        plots.samples(run, evaluation, "vqav2", tmp_path / "samples")
    path = datasets / "vqav2/v2_mscoco_val2014_annotations.json"
    path.write_text(path.read_text().replace("no 7001", "yes"))
    with pytest.raises(UserError, match=r"is not the source of base-aaaa0000"):
        plots.evaluated_tasks(run, evaluation, datasets=str(datasets))
