"""The command that a half-finished evaluation is gone on with: run as it stands, it finds that evaluation and no other."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from configs.command import compose
from configs.errors import UserError
from eval import fewshot
from eval.browse_page import facts
from eval.fewshot import EvalConfig
from eval.nearest import EncoderFeatures
from eval.results import Results
from eval.saved import find_evaluation, read_saved
from mm1.attention.settings import SparqSettings
from tests.official import write_all
from tests.test_browse import model
from tests.test_fewshot import write_tasks


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MM1_HOME", str(tmp_path))
    write_tasks(tmp_path / "data/toy")
    return tmp_path


def begin(home: Path, **changes: Any) -> Results:
    """An evaluation without a finished cell."""
    folder = home / "a model, #1"
    export = folder if folder.is_dir() else model(folder)
    results = fewshot.prepare(EvalConfig(run=str(export), **{"limit": 3, "shots": [0, 2]} | changes))[1]
    with results.opened():
        return results


def finish(results: Results) -> None:
    """Its cell of questions without demonstrations."""
    for query in results.plan.tasks["questions"].queries:
        asked = results.tasks["questions"].queries.example(query)
        record = {"id": query, "cluster": asked.image_id, "prediction": asked.shown_answer, "answers": list(asked.references)}
        results.append("questions", 0, [record])
    results.finish("questions", 0)


def goes_on(results: Results, **blanks: str) -> list[str]:
    """The command's settings, from the message of who reads results too early; what it leaves blank filled in."""
    with pytest.raises(UserError, match="no task is finished yet") as refused:
        read_saved(results.folder)
    overrides = shlex.split(str(refused.value).partition("python -m eval.fewshot ")[2])
    return [f"{key}={blanks.get(key, value)}" for key, _, value in (word.partition("=") for word in overrides)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tasks": ["questions", "colours"], "limit": None, "seed": 3, "shots": [2]},
        {"demonstrations": "fixed", "demonstration_seed": 5, "images": "shuffled", "dtype": "bfloat16"},
        {"attention": "sparq", "sparq": SparqSettings(r=8, local=4, reallocate=False, suffix="dense")},
        {"prompts": "openflamingo", "vqa_metric": "min3"},
    ],
)
def test_the_command_finds_the_evaluation_it_was_made_of(home: Path, changes: dict[str, Any]) -> None:
    results = begin(home, task_corpus="toy", **changes)
    config = compose("eval", EvalConfig, goes_on(results))
    assert fewshot.prepare(config)[1].folder.resolve() == results.folder.resolve()


def test_of_official_files_the_folder_is_left_to_fill_in(home: Path) -> None:
    datasets = str(write_all(home / "vl"))
    for tasks, corpus in ((["gqa"], None), (["gqa", "questions"], "toy")):
        results = begin(home, tasks=tasks, datasets=datasets, task_corpus=corpus)
        assert "datasets=FOLDER" in goes_on(results)
        config = compose("eval", EvalConfig, goes_on(results, datasets=datasets))
        assert fewshot.prepare(config)[1].folder.resolve() == results.folder.resolve()


def test_whose_eyes_found_the_nearest_images_is_said_where_it_was_another_run(home: Path) -> None:
    results = begin(home, task_corpus="toy", tasks=["questions"], shots=[0])
    with results.opened():
        finish(results)
    saved = read_saved(results.folder)
    for weights, own in ((saved.weights, True), ("of another run", False)):
        features = EncoderFeatures(
            home, weights=weights, corpus_fingerprint=saved.plan.corpus_fingerprint, folder=home
        ).fingerprint
        nearest = replace(saved, plan=replace(saved.plan, mode="nearest", features=features))
        assert "demonstrations=nearest" in nearest.again
        assert ("nearest_by=RUN" not in nearest.again) is own


def test_sparq_and_prompts_tell_evaluations_apart(home: Path) -> None:
    plain = begin(home, task_corpus="toy", tasks=["questions"], shots=[0])
    sparse = begin(home, task_corpus="toy", tasks=["questions"], shots=[0], attention="sparq", prompts="openflamingo")
    with pytest.raises(UserError, match="2 evaluations are there") as refused:
        find_evaluation(str(home / "a model, #1"))
    lines = str(refused.value).splitlines()
    first, second = (next(line for line in lines if results.folder.name in line) for results in (plain, sparse))
    assert "prompts plain" in first
    assert "SparQ" not in first
    assert "prompts openflamingo; SparQ r 32, k 128" in second
    with sparse.opened():
        finish(sparse)
    saved = read_saved(sparse.folder)
    assert saved.results(sparse.tasks).folder == sparse.folder
    said = facts(saved)["facts"]
    assert (said["prompts"], said["attention"][:18]) == ("openflamingo", "SparQ r 32, k 128,")
    assert asdict(saved.sparq or SparqSettings(r=1)) == asdict(SparqSettings())
