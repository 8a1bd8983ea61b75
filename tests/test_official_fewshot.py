"""`python -m eval.fewshot` over official files, from the command line's settings to the table, and what it refuses before a model
is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from configs.command import compose
from configs.errors import UserError
from eval import fewshot
from eval.fewshot import EvalConfig, evaluate
from eval.results import render
from tests.corpus import tokenizer
from tests.models import tiny_model
from tests.official import coco_name, write_all
from tests.test_fewshot import write_tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "model"
    tiny_model(seed=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def datasets(tmp_path: Path) -> Path:
    return write_all(tmp_path / "vl")


def config_for(model: Path, datasets: Path, *more: str) -> EvalConfig:
    return compose("eval", EvalConfig, [f"run={model}", f"datasets={datasets}", "shots=[0,2]", "device=cpu", *more])


def test_an_evaluation_over_official_files(model: Path, datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = shutil.move(datasets / "gqa/images", tmp_path / "pictures")
    names = ["coco", "coco_karpathy", "nocaps", "textcaps", "vqav2", "textvqa", "okvqa", "gqa", "vizwiz"]
    moved = [f"+files.gqa.{side}.json.images={pictures}" for side in ("query", "support")]
    config = config_for(model, datasets, f"tasks=[{','.join(names)}]", *moved)
    summary, folder = evaluate(config)
    assert list(summary["tasks"]) == names
    assert summary["corpus"]["name"] == "vl"
    for name in names:
        assert (folder / f"{name}.2.jsonl").is_file()
        assert name in render(summary, folder)
    lines = [json.loads(line) for line in (folder / "vqav2.2.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["391895001", "42001", "7001", "391895000", "42000", "7000"]
    assert {line["cluster"] for line in lines} == {coco_name("val", number) for number in (391895, 42, 7)}
    assert summary["tasks"]["vqav2"]["shots"]["2"]["clusters"] == 3
    assert lines[0]["answers"] == ["no 391895001"] * 10
    assert all(len(line["demonstrations"]) == 2 for line in lines)

    def no_model(*_: object) -> None:
        raise AssertionError("finished work was done again")

    monkeypatch.setattr(fewshot, "_answer", no_model)
    assert evaluate(config) == (summary, folder)


def test_missing_images_stop_it_before_a_model_is_loaded(model: Path, datasets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_model(*_: object) -> None:
        raise AssertionError("a model step was reached")

    monkeypatch.setattr(fewshot, "_answer", no_model)
    path = datasets / "coco/val2014" / coco_name("val", 42)
    path.unlink()
    with pytest.raises(UserError, match=str(path)):
        evaluate(config_for(model, datasets, "tasks=[gqa,vqav2]"))
    monkeypatch.setattr(fewshot, "EncoderFeatures", no_model)
    unused = datasets / "gqa/images/99.jpg"
    unused.unlink()
    with pytest.raises(UserError, match=f"nearest compares(.|\n)*{unused}"):
        evaluate(config_for(model, datasets, "tasks=gqa", "demonstrations=nearest"))
    shutil.copy(datasets / "gqa/images/n52.jpg", unused)
    with pytest.raises(AssertionError, match="a model step was reached"):
        evaluate(config_for(model, datasets, "tasks=gqa"))
    with pytest.raises(UserError, match="no such folder"):
        evaluate(config_for(model, datasets / "nowhere", "tasks=gqa"))


def test_images_that_are_not_shown_need_not_be_there(model: Path, datasets: Path) -> None:
    settings = ("tasks=[gqa,coco]", "images=none")
    folder = evaluate(config_for(model, datasets, *settings))[1]
    whole = {path.name: path.read_bytes() for path in folder.glob("*.json*")}
    shutil.rmtree(folder)
    for image in [*datasets.rglob("*.jpg")]:
        image.unlink()
    assert evaluate(config_for(model, datasets, *settings))[1] == folder
    assert {path.name: path.read_bytes() for path in folder.glob("*.json*")} == whole


def test_questions_with_too_few_answers_are_refused_before_a_model_is_loaded(
    model: Path, datasets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fewshot, "_answer", None)
    with pytest.raises(UserError, match=r"Task gqa, item '20100': .*by vqa_official no prediction .* vqa_metric=gqa_exact"):
        evaluate(config_for(model, datasets, "tasks=[gqa]", "vqa_metric=vqa_official"))


def test_the_corpuss_own_tasks_and_official_ones_in_one_plan(model: Path, datasets: Path, tmp_path: Path) -> None:
    corpus = write_tasks(tmp_path / "toy")
    target, results = fewshot.prepare(config_for(model, datasets, "tasks=[questions,vqav2]", f"task_corpus={corpus}"))
    assert list(results.tasks) == ["questions", "vqav2"]
    assert target.corpus == corpus
    assert results.settings["vqav2"].prompts == "mm1"
    assert results.settings["questions"].prompts == "plain"
    with pytest.raises(UserError, match="so its corpus is unknown"):
        fewshot.prepare(config_for(model, datasets, "tasks=[questions,vqav2]"))


def test_what_the_annotations_say_is_part_of_the_results_name(model: Path, datasets: Path) -> None:
    config = config_for(model, datasets, "tasks=textvqa")
    before = fewshot.prepare(config)[1].folder
    assert fewshot.prepare(config)[1].folder == before
    path = datasets / "textvqa/TextVQA_0.5.1_train.json"
    path.write_text(path.read_text().replace('"go"', '"went"'))
    assert fewshot.prepare(config)[1].folder != before


def test_the_nearest_images_of_an_official_split(model: Path, datasets: Path) -> None:
    twin = datasets / "coco/val2014" / coco_name("val", 42)
    shutil.copy(datasets / "coco/train2014" / coco_name("train", 25), twin)
    _, results = fewshot.prepare(config_for(model, datasets, "tasks=[coco]", "demonstrations=nearest"))
    assert results.plan.tasks["coco"].demonstrations[twin.name][-1] == coco_name("train", 25)
