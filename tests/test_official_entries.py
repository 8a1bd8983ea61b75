"""Entries of official files that are not what they should be: refused by file, key and value, before an image is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from eval.tasks.official.tasks import read_official
from tests.official import coco_name
from tests.test_official import edit

COCO, KARPATHY = "coco/annotations/captions_val2014.json", "coco/dataset_coco.json"
GQA, TEXTVQA = "gqa/testdev_balanced_questions.json", "textvqa/TextVQA_0.5.1_val.json"
ASKED, ANSWERED = "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", "vqav2/v2_mscoco_val2014_annotations.json"


CASES: list[tuple[str, str, Callable[[Any], Any], str]] = [
    (
        "textvqa",
        TEXTVQA,
        lambda c: c["data"][1].update(answers="stop"),
        r"'34611' has the references 'stop'; it must have a list",
    ),
    ("textvqa", TEXTVQA, lambda c: c["data"][1].update(answers=["\ud83d"] * 10), r"'34611' has .*'\\ud83d'.* whole characters"),
    ("textvqa", TEXTVQA, lambda c: c["data"][1].update(question="\ud83d?"), r"'34611' has the question '\\ud83d\?'"),
    ("gqa", GQA, lambda c: c["2099"].update(question=None), "item '2099' has the question None"),
    ("gqa", GQA, lambda c: c["2099"].update(question=5), "item '2099' has the question 5"),
    ("coco", COCO, lambda c: c["images"][1].update(id=[1]), r"images\[1\] has the id \[1\]"),
    ("coco", COCO, lambda c: c["annotations"][2].update(image_id=[1]), r"annotations\[2\] has the image_id \[1\]"),
    ("coco", COCO, lambda c: c["images"][1].update(file_name=None), "has the image file None"),
    ("coco_karpathy", KARPATHY, lambda c: c["images"][5].update(sentences=None), r"sentences of COCO_val.* is None, not a list"),
    ("coco_karpathy", KARPATHY, lambda c: [i.update(split=[]) for i in c["images"]], r"no image of split test; there are \[\]"),
    ("vqav2", ASKED, lambda c: c["questions"][3].update(question_id=[1]), r"questions\[3\] has the question_id \[1\]"),
    ("vqav2", ANSWERED, lambda c: c["annotations"][3].update(question_id=None), r"annotations\[3\] has the question_id None"),
]


@pytest.mark.parametrize(("name", "file", "change", "message"), CASES)
def test_an_entry_of_another_type_is_named(
    datasets: Path, name: str, file: str, change: Callable[[Any], Any], message: str
) -> None:
    edit(datasets / file, change)
    with pytest.raises(UserError, match=message) as refused:
        read_official(datasets, [name])
    assert str(datasets / file) in str(refused.value)


@pytest.mark.parametrize("place", ["/etc", "..", "val2014/../..", "x/.."])
def test_no_image_lies_outside_its_folder(datasets: Path, place: str) -> None:
    edit(datasets / COCO, lambda content: content["images"][0].update(file_name=f"{place}/hostname"))
    edit(datasets / KARPATHY, lambda content: content["images"][-1].update(filepath=place))
    for name, file in (("coco", COCO), ("coco_karpathy", KARPATHY)):
        with pytest.raises(UserError, match=rf"{datasets / file}: item .* has the image file '{place}/.*without \.\."):
            read_official(datasets, [name])


def test_images_may_be_links_and_their_names_may_hold_dots(datasets: Path) -> None:
    folder, name = datasets / "coco/val2014", coco_name("val", 42)
    (folder / name).rename(datasets / "elsewhere.jpg")
    (folder / "a..b").mkdir()
    (folder / "a..b" / name).symlink_to(datasets / "elsewhere.jpg")
    edit(datasets / COCO, lambda content: content["images"][1].update(file_name=f"a..b/{name}"))
    task = read_official(datasets, ["coco"])[0]
    assert task.queries.example(f"a..b/{name}").image == (datasets / "elsewhere.jpg").read_bytes()


def test_a_question_of_gqa_that_stands_there_twice_is_refused(datasets: Path) -> None:
    path = datasets / GQA
    path.write_text(path.read_text()[:-1] + ', "2099": {"imageId": "n52", "question": "is it?", "answer": "no"}}')
    with pytest.raises(UserError, match=rf"{path}: .*'2099' is there twice"):
        read_official(datasets, ["gqa"])


def test_json_that_nests_without_an_end_is_refused(datasets: Path) -> None:
    (datasets / COCO).write_text("[" * 100_000)
    with pytest.raises(UserError, match=rf"{datasets / COCO}: no readable JSON \(maximum recursion"):
        read_official(datasets, ["coco"])


@pytest.mark.parametrize("section", ["json", "parquet"])
def test_an_override_keeps_the_type_of_what_it_replaces(official_files: Path, section: str) -> None:
    key = {"json": "images", "parquet": "folder"}[section]
    with pytest.raises(UserError, match=rf"files\.gqa\.query\.{section}\.{key}=None: give a text, such as gqa/"):
        read_official(official_files, ["gqa"], overrides={"gqa": {"query": {section: {key: None}}}})
    with pytest.raises(UserError, match=r"files\.gqa\.query\.parquet\.splits=None: give one or more names, such as \[testdev\]"):
        read_official(official_files, ["gqa"], overrides={"gqa": {"query": {"parquet": {"splits": None}}}})
