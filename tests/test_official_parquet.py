"""The hub's copies: parquet files with images inside give the same items as the official files, and their faults are named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from eval.plan import make_plan
from eval.tasks.example import Example
from eval.tasks.official import parquet
from eval.tasks.official.presence import check_images
from eval.tasks.official.records import OfficialPool
from eval.tasks.official.tasks import read_official
from eval.tasks.pool import TaskData
from tests.official import picture, write_all

pyarrow = pytest.importorskip("pyarrow")
from pyarrow.parquet import write_table  # noqa: E402

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def write(path: Path, rows: Sequence[dict[str, Any]], *, image: str | None = "image", row_group: int = 2, **types: Any) -> Path:
    """Rows as `datasets` writes them: an image is a struct {bytes, path}, in small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = []
    for key in rows[0]:
        kind = IMAGE if key == image else types.get(key) or pyarrow.array([row[key] for row in rows]).type
        fields.append(pyarrow.field(key, kind))
    write_table(pyarrow.Table.from_pylist(list(rows), pyarrow.schema(fields)), path, row_group_size=row_group)
    return path


def embedded(name: object) -> dict[str, Any]:
    return {"bytes": picture(name), "path": None}


def vqav2_rows(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {
            "question_type": "what",
            "multiple_choice_answer": f"blue {n}",
            "answers": [{"answer": f"blue {n}", "answer_confidence": "yes", "answer_id": i} for i in range(10)],
            "image_id": n // 2,
            "answer_type": "other",
            "question_id": n,
            "question": f"what colour {n}?",
            "image": embedded(n // 2),
        }
        for n in range(first, first + count)
    ]


def read(root: Path, name: str, shots: int = 2, **override: Any) -> TaskData:
    return read_official(root, [name], overrides={name: override} if override else None, shots=shots)[0]


def write_vqav2(root: Path) -> Path:
    """lmms-lab/VQAv2 in two shards, and a training split beside it."""
    for shard, first in ((0, 10), (1, 15)):
        write(root / f"vqav2/data/validation-{shard:05d}-of-00002-0a1b2c.parquet", vqav2_rows(first, 5))
    write(root / "vqav2/data/train-00000-of-00001.parquet", vqav2_rows(100, 12))
    return root


def test_rows_over_shards_and_row_groups_find_their_images(tmp_path: Path) -> None:
    task = read(write_vqav2(tmp_path), "vqav2")
    assert task.queries.ids == [str(n) for n in range(10, 20)]
    assert task.support is not None
    assert len(task.support.ids) == 12
    for n in (19, 10, 14, 15, 13):  # back and forth over files and groups
        expected = Example(str(n), str(n // 2), picture(n // 2), f"what colour {n}?", (f"blue {n}",) * 10)
        assert task.queries.example(str(n)) == expected
    assert task.queries.image_ids["12"] == task.queries.image_ids["13"]
    plan = make_plan([task], corpus="", corpus_fingerprint="", shots=[4], limit=None, seed=0)
    check_images([task], plan, None)


def test_a_hub_copy_is_found_where_the_json_is_not_and_the_format_can_be_set(tmp_path: Path) -> None:
    root = write_vqav2(write_all(tmp_path))
    assert "391895001" in read(root, "vqav2").queries.ids
    assert read(root, "vqav2", format="parquet").queries.ids[0] == "10"
    shutil.rmtree(root / "vqav2/data")
    with pytest.raises(
        UserError, match=r"no parquet files of split validation or val in .*vqav2.*\+files\.vqav2\.query\.parquet\."
    ):
        read(root, "vqav2", format="parquet")
    for path in (root / "vqav2").glob("*train2014*"):  # each side for itself: lmms-lab's copy has no training split
        path.unlink()
    write(root / "vqav2/default/train/0000.parquet", vqav2_rows(100, 12))  # as in refs/convert/parquet
    mixed = read(root, "vqav2")
    assert mixed.support is not None
    assert (mixed.queries.ids[0], mixed.support.ids[0]) == ("391895001", "100")


def test_textvqa_vizwiz_and_okvqa_have_answers_as_lists_of_strings(tmp_path: Path) -> None:
    texts = pyarrow.list_(pyarrow.string())
    asked = [
        {
            "image_id": f"img{n}",
            "question_id": 34602 + n,
            "question": f"says {n}?",
            "image": embedded(n),
            "answers": [f"w{n}"] * 10,
        }
        for n in range(3)
    ]
    write(tmp_path / "textvqa/data/validation-00000-of-00001.parquet", asked, answers=texts)
    task = read(tmp_path, "textvqa", shots=0)
    assert task.queries.example("34604") == Example("34604", "img2", picture(2), "says 2?", ("w2",) * 10)
    for name, split in (("vizwiz", "val"), ("okvqa", "val2014")):  # these copies have no image_id: an image a question
        rows = [
            {"question_id": f"q{n}", "image": embedded(n), "question": "?", "answers": ["unanswerable", f"a{n}"], "category": "c"}
            for n in range(3)
        ]
        write(tmp_path / f"{name}/data/{split}-00000-of-00001.parquet", rows, answers=texts)
        pool = read(tmp_path, name, shots=0).queries
        assert pool.example("q1") == Example("q1", "q1", picture(1), "?", ("unanswerable", "a1"))


def test_gqas_images_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    asked = [{"id": f"20{n}", "imageId": f"n{n % 2}", "question": f"{n}?", "answer": "yes", "isBalanced": True} for n in range(5)]
    write(tmp_path / "gqa/testdev_balanced_instructions/testdev-00000-of-00001.parquet", asked)
    images = tmp_path / "gqa/testdev_balanced_images/testdev-00000-of-00001.parquet"
    write(images, [{"id": "n1", "image": embedded("n1")}, {"id": "n0", "image": embedded("n0")}])
    pool = read(tmp_path, "gqa", shots=0).queries
    assert pool.example("202") == Example("202", "n0", picture("n0"), "2?", ("yes",))
    assert pool.example("203").image == picture("n1")
    write(images, [{"id": "n1", "image": embedded("n1")}])
    with pytest.raises(UserError, match=r"the image 'n0' is in none of .*testdev_balanced_images"):
        read(tmp_path, "gqa", shots=0)


def test_captions_come_as_a_list_or_as_a_row_each(tmp_path: Path) -> None:
    texts = pyarrow.list_(pyarrow.string())
    novel = [
        {"image": embedded(n), "image_file_name": f"{n}.jpg", "image_id": n, "annotations_captions": [f"a {n}", f"b {n}"]}
        for n in (1, 0)
    ]
    write(tmp_path / "nocaps/data/validation-00000-of-00001.parquet", novel, annotations_captions=texts)
    coco = [
        {
            "image": embedded(f"COCO_{n}.jpg"),
            "filepath": "train2014",
            "filename": f"COCO_{n}.jpg",
            "split": "train",
            "sentences": {"tokens": ["a"], "raw": f"{word} {n}", "imgid": n, "sentid": 0},
            "cocoid": n,
        }
        for word, n in [("a", 5), ("a", 1), ("b", 1), ("a", 3), ("b", 5)]
    ]
    write(tmp_path / "coco_karpathy/data/train-00000-of-00001.parquet", coco)
    task = read(tmp_path, "nocaps")
    assert task.queries.ids == ["1.jpg", "0.jpg"]
    assert task.queries.example("1.jpg") == Example("1.jpg", "1.jpg", picture(1), None, ("a 1", "b 1"))
    assert task.support is not None
    assert task.support.ids == ["COCO_5.jpg", "COCO_1.jpg", "COCO_3.jpg"]
    assert task.support.example("COCO_5.jpg").references == ("a 5", "b 5")
    assert task.support.example("COCO_3.jpg").image == picture("COCO_3.jpg")
    listed = [
        {"question_id": f"COCO_val2014_{n}.jpg", "image": embedded(n), "question": "describe", "answer": [f"c {n}"]}
        for n in (8, 9)
    ]
    write(tmp_path / "coco_caption/data/val-00000-of-00001.parquet", listed, answer=texts)
    assert read(tmp_path, "coco", shots=0).queries.example("COCO_val2014_9.jpg").references == ("c 9",)


# --------------------------------------------------------------------------------------------------------------- faults


def test_rows_without_an_image_are_named_before_anything_runs(tmp_path: Path) -> None:
    rows = vqav2_rows(0, 6)
    rows[3]["image"] = {"bytes": None, "path": "3.jpg"}
    path = write(tmp_path / "vqav2/data/validation-00000-of-00001.parquet", rows)
    task = read(tmp_path, "vqav2", shots=0)
    assert isinstance(task.queries, OfficialPool)
    assert task.queries.missing(["0", "2", "4"]) == []
    plan = make_plan([task], corpus="", corpus_fingerprint="", shots=[0], limit=None, seed=0)
    with pytest.raises(UserError, match=re.escape(f"{path} row 3")):
        check_images([task], plan, None)
    with pytest.raises(UserError, match="row 3: no image"):
        task.queries.example("3")


def test_a_part_of_a_split_is_refused(tmp_path: Path) -> None:
    write_vqav2(tmp_path)
    (tmp_path / "vqav2/data/validation-00000-of-00002-0a1b2c.parquet").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 2 shards of validation, the first of them number 00000"):
        read(tmp_path, "vqav2")


def test_a_gap_among_numbered_files_is_refused(tmp_path: Path) -> None:
    for number in (0, 2):
        write(tmp_path / f"vqav2/default/validation/{number:04d}.parquet", vqav2_rows(10 * number, 3))
    with pytest.raises(UserError, match=r"lacks 1 of at least 3 shards of validation, the first of them number 0001"):
        read(tmp_path, "vqav2", shots=0)
    write(tmp_path / "vqav2/default/validation/0001.parquet", vqav2_rows(10, 3))
    assert len(read(tmp_path, "vqav2", shots=0).queries.ids) == 9


def test_a_file_that_lacks_a_column_of_the_others_is_named(tmp_path: Path) -> None:
    write(tmp_path / "vqav2/default/validation/0000.parquet", vqav2_rows(0, 3))
    other = tmp_path / "vqav2/default/validation/0001.parquet"
    write(other, [{key: value for key, value in row.items() if key != "answers"} for row in vqav2_rows(3, 3)])
    with pytest.raises(UserError, match=rf"{other}: no column answers, which 0000\.parquet has for the references; it has "):
        read(tmp_path, "vqav2", shots=0)


def test_columns_that_are_not_there_are_named_and_can_be_given(tmp_path: Path) -> None:
    rows = [{"qid": n, "image": embedded(n), "question": "?", "answers": ["a"]} for n in range(3)]
    path = tmp_path / "vizwiz/data/val-00000-of-00001.parquet"
    write(path, rows, answers=pyarrow.list_(pyarrow.string()))
    with pytest.raises(
        UserError, match=r"no column for the id: looked for question_id.*it has qid.*\+files\.vizwiz\.query\.parquet\.id"
    ):
        read(tmp_path, "vizwiz", shots=0)
    assert read(tmp_path, "vizwiz", shots=0, query={"parquet": {"id": "qid"}}).queries.ids == ["0", "1", "2"]
    write(path, [row | {"answers": [{"said": "a"}]} for row in rows])
    with pytest.raises(UserError, match="references have the fields said"):
        read(tmp_path, "vizwiz", shots=0, query={"parquet": {"id": "qid"}})
    write(path, [row | {"answers": None} for row in rows], answers=pyarrow.list_(pyarrow.string()))
    with pytest.raises(UserError, match=r"item '0' has the references \[\]"):
        read(tmp_path, "vizwiz", shots=0, query={"parquet": {"id": "qid"}})
    write(path, [{"qid": 1, "answers": ["a"], "question": "?"}], answers=pyarrow.list_(pyarrow.string()))
    task = read(tmp_path, "vizwiz", shots=0, query={"parquet": {"id": "qid"}})
    with pytest.raises(UserError, match="no column image with the images' bytes"):
        check_images([task], make_plan([task], corpus="", corpus_fingerprint="", shots=[0], limit=None, seed=0), None)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"val-00000-of-00001\.parquet: the parquet file is damaged"):
        read(tmp_path, "vizwiz", shots=0)


def test_a_row_group_is_read_once_while_its_neighbours_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_groups: list[int] = []
    images = parquet._Table.images

    def counting(self: Any, group: int) -> Any:
        read_groups.append(group)
        return images(self, group)

    monkeypatch.setattr(parquet._Table, "images", counting)
    task = read(write_vqav2(tmp_path), "vqav2")
    for n in range(10, 20):
        task.queries.example(str(n))
    assert read_groups == [0, 1, 2, 3, 4, 5]
    plan = make_plan([task], corpus="", corpus_fingerprint="", shots=[4], limit=None, seed=0)
    read_groups.clear()
    check_images([task], plan, None)
    assert read_groups == []  # the files' own statistics say that no image is missing
