"""Official files: every layout gives the Examples it should, and what is wrong in the files is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from eval.plan import make_plan
from eval.tasks.corpus import read_tasks
from eval.tasks.example import Example
from eval.tasks.official.presence import check_images
from eval.tasks.official.records import OfficialPool
from eval.tasks.official.tasks import official_names, read_official
from eval.tasks.pool import Pool, TaskData
from eval.tasks.settings import load_settings
from eval.tasks.sources import read_sources
from tests.official import OPEN_IMAGES, TRAIN, coco_name, picture
from tests.test_fewshot import write_tasks


def read(datasets: Path, name: str, shots: int = 2, **override: Any) -> TaskData:
    return read_official(datasets, [name], overrides={name: override} if override else None, shots=shots)[0]


def support(task: TaskData) -> Pool:
    assert task.support is not None
    return task.support


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """`change` changes the content in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_every_task_names_its_metric_and_reads_its_files(official_files: Path) -> None:
    assert official_names() == ["coco", "coco_karpathy", "gqa", "nocaps", "okvqa", "textcaps", "textvqa", "vizwiz", "vqav2"]
    metrics = {name: load_settings(name, read(official_files, name).kind).metric for name in official_names()}
    assert {name for name, metric in metrics.items() if metric == "cider_d"} == {"coco", "coco_karpathy", "nocaps", "textcaps"}
    assert (metrics["vqav2"], metrics["vizwiz"], metrics["textvqa"]) == ("vqa_official", "vqa_official", "textvqa_evalai")
    for name in official_names():
        task = read(official_files, name)
        for pool in (task.queries, support(task)):
            for item in pool.ids:
                example = pool.example(item)
                assert example.image == picture(example.image_id)  # its own file, whatever order the annotations are in
        assert not set(task.queries.ids) & set(support(task).ids)
        assert not set(task.queries.image_ids.values()) & set(support(task).image_ids.values())


def test_coco_groups_the_captions_of_an_image(official_files: Path) -> None:
    task = read(official_files, "coco")
    name = coco_name("val", 42)
    said = ("one of 42", "two of 42")
    assert task.queries.example(name) == Example(name, name, picture(name), None, said)
    assert task.queries.ids == [coco_name("val", number) for number in (391895, 42, 7)]
    assert support(task).ids == [coco_name("train", number) for number in TRAIN]


def test_karpathys_splits_take_images_of_both_folders(official_files: Path) -> None:
    task = read(official_files, "coco_karpathy")
    assert task.queries.ids == [coco_name("val", 391895), coco_name("val", 7)]
    assert support(task).ids == [*(coco_name("train", number) for number in TRAIN), coco_name("val", 42)]
    assert support(task).example(coco_name("val", 42)).references == ("A of 42", "B of 42")


def test_nocaps_takes_demonstrations_from_coco_without_mixing_up_their_numbers(official_files: Path) -> None:
    task = read(official_files, "nocaps", shots=5)
    assert task.queries.example("0013ea2087020901.jpg").references == ("one of 9", "two of 9")
    plan = make_plan([task], corpus="", corpus_fingerprint="", shots=[5], limit=None, seed=0)
    everything = {coco_name("train", number) for number in TRAIN}  # among them 9 and 25, which NoCaps has as other images
    assert all(set(shown) == everything for shown in plan.tasks["nocaps"].demonstrations.values())


def test_textcaps_groups_and_textvqa_shows_no_ocr_tokens(official_files: Path) -> None:
    captions = read(official_files, "textcaps").queries
    image = f"{OPEN_IMAGES[1]}.jpg"
    assert captions.ids == [f"{name}.jpg" for name in OPEN_IMAGES]
    assert captions.example(image).references == (f"reads {OPEN_IMAGES[1]}", f"says {OPEN_IMAGES[1]}")
    asked = read(official_files, "textvqa").queries
    assert asked.ids == ["34612", "34611", "34610", "34609"]
    assert asked.example("34611") == Example("34611", image, picture(image), "what is written on 1?", ("stop",) * 6 + ("go",) * 4)
    assert asked.image_ids["34612"] == asked.image_ids["34609"]


@pytest.mark.parametrize("name", ["vqav2", "okvqa"])
def test_questions_meet_their_annotations_by_id_and_images_by_number(official_files: Path, name: str) -> None:
    task = read(official_files, name)
    image = "COCO_val2014_000000000042.jpg"
    assert task.queries.ids == ["391895001", "42001", "7001", "391895000", "42000", "7000"]
    assert task.queries.example("42001") == Example("42001", image, picture(image), "is it 42001?", ("no 42001",) * 10)
    assert support(task).example("9000").image_id == "COCO_train2014_000000000009.jpg"
    raw = read(official_files, name, query={"json": {"answer_key": "raw_answer"}}).queries
    assert raw.example("42001").references == ("raw 42001",) * 10


def test_gqa_has_one_answer_and_vizwiz_keeps_unanswerable_and_counts_positions(official_files: Path) -> None:
    asked = read(official_files, "gqa").queries
    assert asked.ids == ["20100", "2099", "2098", "2097", "2096"]
    assert asked.example("2099") == Example("2099", "n578847.jpg", picture("n578847.jpg"), "is n578847 indoors?", ("yes",))
    task = read(official_files, "vizwiz")
    assert (task.queries.ids, support(task).ids) == (["val-0", "val-1", "val-2"], ["train-0", "train-1", "train-2"])
    shown = task.queries.example("val-2")
    assert shown.image_id == "VizWiz_val_00000017.jpg"
    assert shown.references == ("unanswerable",) * 7 + (f"cup {shown.image_id}",) * 3
    assert shown.shown_answer == "unanswerable"


def test_paths_can_be_given_and_zero_shots_need_no_training_files(datasets: Path, tmp_path: Path) -> None:
    (datasets / "gqa/images").rename(tmp_path / "pictures")
    shutil.rmtree(datasets / "vqav2")
    moved = read(datasets, "gqa", shots=0, query={"json": {"images": str(tmp_path / "pictures")}})
    assert moved.queries.example("2099").image == picture("n578847.jpg")
    assert moved.support is moved.queries
    (datasets / "okvqa/OpenEnded_mscoco_train2014_questions.json").unlink()
    (datasets / "okvqa/mscoco_train2014_annotations.json").unlink()
    assert read(datasets, "okvqa", shots=0).support is not None
    with pytest.raises(UserError, match=r"\+files\.okvqa\.support=query draws"):
        read(datasets, "okvqa")
    own = read(datasets, "okvqa", support="query")
    plan = make_plan([own], corpus="", corpus_fingerprint="", shots=[2], limit=None, seed=0)
    for query, shown in plan.tasks["okvqa"].demonstrations.items():
        assert own.queries.image_ids[query] not in {own.queries.image_ids[name] for name in shown}


# ---------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_covers_what_the_annotations_say_and_nothing_else(datasets: Path) -> None:
    def fingerprint(shots: int = 2) -> str:
        return read_sources(["vqav2", "textvqa"], corpus=Path("none"), datasets=str(datasets), shots=shots)[2]

    first = fingerprint()
    annotations = datasets / "vqav2/v2_mscoco_train2014_annotations.json"
    edit(annotations, lambda content: content["annotations"][0].update(question_type="other"))
    assert fingerprint() == first
    zero = fingerprint(shots=0)
    edit(annotations, lambda content: content["annotations"][0]["answers"][3].update(answer="yes"))
    assert fingerprint() != first
    assert fingerprint(shots=0) == zero
    edit(datasets / "textvqa/TextVQA_0.5.1_val.json", lambda content: content["data"][0].update(question="why?"))
    assert fingerprint(shots=0) != zero


def test_official_tasks_stand_beside_the_corpuss_own(official_files: Path, tmp_path: Path) -> None:
    corpus = write_tasks(tmp_path / "toy")
    own = read_sources(["names"], corpus=corpus, datasets=None)
    assert [task.name for task in own[0]] == ["names"]
    everything = read_sources(None, corpus=corpus, datasets=None)
    assert [task.name for task in everything[0]] == [task.name for task in read_tasks(corpus)]
    both = read_sources(["gqa", "names", "coco"], corpus=corpus, datasets=str(official_files), shots=2)
    assert [task.name for task in both[0]] == ["gqa", "names", "coco"]
    alone = read_sources(["gqa", "coco"], corpus=tmp_path / "there is none", datasets=str(official_files), shots=2)
    assert len({own[2], both[2], alone[2]}) == 3
    assert (own[1], both[1], alone[1]) == ("toy", f"toy+{official_files.name}", official_files.name)
    with pytest.raises(
        UserError, match=r"gqqa: not among .*\(colours, questions, names\), nor from official files \(coco, coco_k"
    ):
        read_sources(["gqa", "gqqa"], corpus=corpus, datasets=str(official_files))
    with pytest.raises(UserError, match="Those are read with datasets=FOLDER"):
        read_sources(["gqa"], corpus=corpus, datasets=None)
    with pytest.raises(UserError, match=r"say which tasks.*coco, coco_karpathy"):
        read_sources(None, corpus=corpus, datasets=str(official_files))
    with pytest.raises(UserError, match="gqa given twice"):
        read_sources(["gqa", "gqa"], corpus=corpus, datasets=str(official_files))
    with pytest.raises(UserError, match=r"only tasks from official files have them"):
        read_sources(["names"], corpus=corpus, datasets=None, overrides={"gqa": {}})


# --------------------------------------------------------------------------------------------------------------- images


def plan_and_check(task: TaskData, control: str | None = None) -> None:
    plan = make_plan([task], corpus="", corpus_fingerprint="", shots=[0, 2], limit=2, seed=0)
    check_images([task], plan, control)


def test_missing_images_of_the_plan_are_named_and_others_do_not_matter(datasets: Path) -> None:
    task = read(datasets, "vqav2")
    plan_and_check(task)
    plan = make_plan([task], corpus="", corpus_fingerprint="", shots=[0, 2], limit=2, seed=0).tasks["vqav2"]
    shown = {support(task).image_ids[name] for names in plan.demonstrations.values() for name in names}
    unused = {coco_name("train", number) for number in TRAIN} - shown
    assert unused
    for name in unused:
        (datasets / "coco/train2014" / name).unlink()
    plan_and_check(task)
    demonstration = datasets / "coco/train2014" / sorted(shown)[0]
    demonstration.unlink()
    query = datasets / "coco/val2014" / task.queries.image_ids[plan.queries[0]]
    query.write_bytes(b"")
    with pytest.raises(UserError) as refused:
        plan_and_check(task)
    assert str(demonstration) in str(refused.value)
    assert str(query) in str(refused.value)
    assert "2 of the images that the plan shows" in str(refused.value)


def test_a_long_list_of_missing_images_is_cut_and_counted(datasets: Path) -> None:
    for path in (datasets / "coco").glob("*2014/*.jpg"):
        path.unlink()
    task = read(datasets, "coco", shots=4)
    plan = make_plan([task], corpus="", corpus_fingerprint="", shots=[4], limit=None, seed=0)
    with pytest.raises(UserError, match=r"8 of the images that the plan shows(.*\n)+.* and 3 more"):
        check_images([task], plan, None)


def test_a_control_is_asked_which_images_it_shows(datasets: Path) -> None:
    task = read(datasets, "coco_karpathy", shots=0)
    plan = make_plan([task], corpus="", corpus_fingerprint="", shots=[0], limit=1, seed=0)
    asked, other = plan.tasks["coco_karpathy"].queries[0], set(task.queries.ids) - set(plan.tasks["coco_karpathy"].queries)
    (path,) = [datasets / "coco/val2014" / name for name in other]
    path.unlink()
    check_images([task], plan, None)
    with pytest.raises(UserError, match=str(path)):
        check_images([task], plan, "shuffled")
    assert task.queries.example(asked)


# --------------------------------------------------------------------------------------------------------------- errors


def test_missing_files_and_folders_are_named_with_the_key_that_moves_them(datasets: Path) -> None:
    annotations = datasets / "vqav2/v2_mscoco_val2014_annotations.json"
    annotations.unlink()
    with pytest.raises(UserError) as refused:
        read(datasets, "vqav2")
    assert str(annotations) in str(refused.value)
    assert "+files.vqav2.query.json.annotations=PATH" in str(refused.value)
    shutil.rmtree(datasets / "gqa/images")
    with pytest.raises(UserError, match=r"no image folder .*gqa/images.*\+files\.gqa\.query\.json\.images=PATH"):
        read(datasets, "gqa")
    (datasets / "vizwiz/val.json").unlink()
    with pytest.raises(UserError, match=r"no annotation file .*vizwiz/val\.json, and no hub copy .*vizwiz/data/val-\*\.parquet"):
        read(datasets, "vizwiz")
    with pytest.raises(UserError, match="no such folder"):
        read(datasets / "elsewhere", "gqa")


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("coco", "coco/annotations/captions_val2014.json", lambda c: c.pop("images"), r"a list under 'images'"),
        (
            "coco",
            "coco/annotations/captions_val2014.json",
            lambda c: c["images"].pop(0),
            r"annotations\[0\] is of image_id 391895",
        ),
        (
            "coco",
            "coco/annotations/captions_val2014.json",
            lambda c: c["images"].append(c["images"][1]),
            r"id 42 is there 2 times",
        ),
        (
            "coco",
            "coco/annotations/captions_val2014.json",
            lambda c: c["images"][2].update(file_name=coco_name("val", 42)),
            "2 times",
        ),
        ("coco", "coco/annotations/captions_val2014.json", lambda c: c["annotations"].clear(), r"references \[\]"),
        ("coco", "coco/annotations/captions_val2014.json", lambda c: c["annotations"][4].pop("caption"), r"\[4\] has no caption"),
        (
            "coco_karpathy",
            "coco/dataset_coco.json",
            lambda c: c["images"][5]["sentences"][1].pop("raw"),
            r"sentences of COCO_val",
        ),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", lambda c: c["data"][1].pop("answers"), r"data\[1\] has no answers"),
        (
            "textvqa",
            "textvqa/TextVQA_0.5.1_val.json",
            lambda c: c["data"][1].update(question_id=34612),
            r"'34612' is there 2 times",
        ),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", lambda c: c["data"][1].update(answers=["a", None]), r"'34611' has .*None"),
        (
            "vqav2",
            "vqav2/v2_mscoco_val2014_annotations.json",
            lambda c: c["annotations"].pop(0),
            r"question_id 7000 has no annot",
        ),
        (
            "vqav2",
            "vqav2/v2_mscoco_val2014_annotations.json",
            lambda c: c["annotations"].append(c["annotations"][0]),
            "annotated twice",
        ),
        (
            "vqav2",
            "vqav2/v2_mscoco_val2014_annotations.json",
            lambda c: c["annotations"][0].update(image_id=8),
            "image_id 7, its ann",
        ),
        (
            "vqav2",
            "vqav2/v2_mscoco_val2014_annotations.json",
            lambda c: c["annotations"][0].update(answers=[]),
            r"references \[\]",
        ),
        ("vqav2", "vqav2/v2_mscoco_val2014_annotations.json", lambda c: c["annotations"][0]["answers"][0].pop("answer"), "7000"),
        (
            "vqav2",
            "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
            lambda c: c["questions"][0].update(image_id="x"),
            "image_id x",
        ),
        ("gqa", "gqa/testdev_balanced_questions.json", lambda c: c["2099"].pop("answer"), "question '2099' has no imageId"),
        ("gqa", "gqa/testdev_balanced_questions.json", lambda c: c.clear(), "no questions by id"),
        ("vizwiz", "vizwiz/val.json", lambda c: c[1].pop("answers"), r"\[1\] has no answers"),
        ("vizwiz", "vizwiz/val.json", lambda c: c.clear(), "no items"),
    ],
)
def test_what_is_wrong_in_the_files_is_named(
    datasets: Path, name: str, file: str, change: Callable[[Any], Any], message: str
) -> None:
    edit(datasets / file, change)
    with pytest.raises(UserError, match=message) as refused:
        read(datasets, name)
    assert str(datasets / file) in str(refused.value)


def test_a_file_of_another_task_is_refused(datasets: Path) -> None:
    for name, theirs, message in [
        ("vizwiz", "gqa/testdev_balanced_questions.json", r"holds the keys 20100, .*VizWiz's questions hold a list\."),
        ("gqa", "vizwiz/val.json", "no questions by id"),
        ("textcaps", "textvqa/TextVQA_0.5.1_val.json", r"data\[0\] has no caption_str"),
        ("coco", "coco/dataset_coco.json", r"images\[0\] has no id, file_name"),
    ]:
        with pytest.raises(UserError, match=message):
            read(datasets, name, query={"json": {"annotations": theirs}})


def test_damaged_and_empty_files_are_refused(datasets: Path) -> None:
    path = datasets / "textcaps/TextCaps_0.1_val.json"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"TextCaps_0\.1_val\.json: no readable JSON"):
        read(datasets, "textcaps")
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"TextCaps_0\.1_val\.json: no readable JSON"):
        read(datasets, "textcaps")


def test_overrides_change_what_is_there_and_add_nothing(official_files: Path) -> None:
    with pytest.raises(
        UserError, match=r"files\.gqa\.query\.json\.image: no such key. Known there: _target_, annotations, images"
    ):
        read(official_files, "gqa", query={"json": {"image": "x"}})
    with pytest.raises(UserError, match=r"files\.gqa\.query=x: replaces a whole section"):
        read(official_files, "gqa", query="x")
    with pytest.raises(UserError, match="choose from auto, json, parquet"):
        read(official_files, "gqa", format="csv")
    with pytest.raises(UserError, match=r"no reader eval\.tasks\.official\.vqa\.gqaa"):
        read(official_files, "gqa", query={"json": {"_target_": "eval.tasks.official.vqa.gqaa"}})
    with pytest.raises(UserError, match=r"files\.gqa\.query\.json: got an unexpected keyword argument 'image_file'"):
        read(official_files, "gqa", query={"json": {"_target_": "eval.tasks.official.vqa.vizwiz"}})
    with pytest.raises(UserError, match=r"image_file=%d\.jpg: makes no file name of the image id 'n161313'"):
        read(official_files, "gqa", query={"json": {"image_file": "%d.jpg"}})
    with pytest.raises(UserError, match=r"no image of split dev; there are restval, test, train"):
        read(official_files, "coco_karpathy", query={"json": {"splits": "dev"}})
    with pytest.raises(UserError, match=r"files\.coco: no such task is evaluated"):
        read_official(official_files, ["gqa"], overrides={"coco": {}})


def test_an_image_that_goes_away_is_named(datasets: Path) -> None:
    pool = read(datasets, "gqa").queries
    assert isinstance(pool, OfficialPool)
    path = datasets / "gqa/images/n578847.jpg"
    path.unlink()
    assert pool.missing(pool.ids) == [str(path)]
    with pytest.raises(UserError, match=str(path)):
        pool.example("2099")
