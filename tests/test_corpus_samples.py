"""Samples of a corpus's own tasks that are not what their kind needs: refused by task and sample when the task is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from data_pipelines.shards import Manifest, SplitWriter, Task
from eval.tasks.corpus import read_tasks
from tests.corpus import square

SHOWN = [{"image": "000.webp", "name": "dax"}]
GOOD: dict[str, dict[str, Any]] = {
    "captioning": {"id": "i", "image_id": "p", "references": ["a red square"]},
    "vqa": {"id": "i", "image_id": "p", "question": "what colour?", "answers": ["red"] * 10},
    "binding": {
        "id": "i", "image_id": "p", "names": ["dax", "kip"], "answer": "kip", "demonstrations": SHOWN, "query": "q.webp",
    },
}  # fmt: skip


def write(folder: Path, kind: str, **changes: Any) -> Path:
    folder.mkdir()
    manifest = Manifest(corpus="data", recipe="tests")
    writer = SplitWriter(folder, "t", "all", format="task")
    images = {name: square("red") for name in ("webp", "000.webp", "q.webp")}
    writer.write({"json": json.dumps(GOOD[kind] | changes), **images}, images=3)
    manifest.splits["t"] = {"all": writer.close()}
    manifest.tasks = {"t": Task(kind, "", "t/all", "t/all")}
    manifest.save(folder)
    return folder


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_sample_is_read(tmp_path: Path, kind: str) -> None:
    assert read_tasks(write(tmp_path / "data", kind))[0].queries.example("i").image_id == "p"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("captioning", {"references": "a red square"}, r"found 'a red square'\); they must be a list"),
        ("captioning", {"references": [None]}, r"found \[None\]"),
        ("captioning", {"references": ["\ud83d"]}, r"found \['\\ud83d'\]\)"),
        ("captioning", {"id": "\ud83d"}, r"half a character in the id '\\ud83d'"),
        ("vqa", {"answers": [1, 2]}, r"found \[1, 2\]"),
        ("vqa", {"question": None}, "the question is None"),
        ("vqa", {"question": "\ud83d"}, r"the question is '\\ud83d'"),
        ("binding", {"names": "dk", "answer": "d"}, "names are 'dk', not two different strings"),
        ("binding", {"names": ["kip"]}, r"names are \['kip'\]"),
        ("binding", {"names": ["dax", "kip", "wug"]}, "not two different strings"),
        ("binding", {"names": ["kip", "kip"]}, "not two different strings"),
        ("binding", {"answer": "wug"}, "the answer 'wug' is none of the names"),
        ("binding", {"query": None}, "the query is None"),
        ("binding", {"demonstrations": [{"image": "000.webp"}]}, r"not a list of \{image, name\}"),
        ("binding", {"demonstrations": None}, "the demonstrations are None"),
    ],
)
def test_a_sample_of_other_types_is_named(tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"sample \w+ of task t: .*{message}.* Prepare the corpus again"):
        read_tasks(write(tmp_path / "data", kind, **changes))
