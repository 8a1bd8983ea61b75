"""The tasks that come with a prepared corpus: its manifest's `tasks`, and the splits of format "task" they name.

    captioning  KEY.json {"id", "image_id", "references": [...]}                            KEY.webp
    vqa         KEY.json {"id", "image_id", "question", "answers": [...], "question_type"}  KEY.webp
    binding     KEY.json {"id", "image_id", "names": [two], "answer", "query": member,
                          "demonstrations": [{"image": member, "name"}, ...]}                KEY.<member> ...

Planning needs ids alone, so a `CorpusPool` keeps each sample's JSON and reads images when an Example is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipelines.reader import SplitReader
from data_pipelines.shards import Manifest
from eval.tasks.example import Example
from eval.tasks.pool import TaskData
from eval.tasks.texts import are_texts, is_text

_KEYS = {
    "captioning": ("id", "image_id", "references"),
    "vqa": ("id", "image_id", "question", "answers"),
    "binding": ("id", "image_id", "names", "answer", "demonstrations", "query"),
}

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")


class CorpusPool:
    """The samples of one split of a task: `ids` in the order written, image ids, and Examples by id."""

    def __init__(self, folder: Path, manifest: Manifest, place: str, kind: str, task: str) -> None:
        source, _, split = place.partition("/")
        self.kind, self.place, self.task = kind, place, task
        self._reader = SplitReader(folder, manifest, source, split)
        self._records: list[dict[str, Any]] = []
        self._position: dict[str, int] = {}
        for position in range(len(self._reader)):
            members = self._reader[position]
            shard = members.shard
            record = _record(members, kind, f"{folder / shard}: sample {members.key} of task {task}")
            name = str(record["id"])
            if name in self._position:
                raise UserError(
                    f"Task {task}, {place}: samples {self._position[name]} and {position} ({shard}) both have the id {name!r}. "
                    "Ids must be unique; prepare the corpus again."
                )
            self._position[name] = position
            self._records.append(record)
        if not self._records:
            raise UserError(f"Task {task}: {place} holds no samples. Prepare the corpus again.")

    @property
    def ids(self) -> list[str]:
        return list(self._position)

    @property
    def image_ids(self) -> dict[str, str]:
        """id -> image id."""
        return {name: str(self._records[position]["image_id"]) for name, position in self._position.items()}

    def example(self, name: str, *, image: bool = True) -> Example:
        """Raises UserError if an image is missing from the sample. `image` False: nothing is read but for episodes to bind."""
        position = self._position[name]
        record = self._records[position]
        if self.kind == "binding":
            return _episode(record, *self._members(position))
        references = record["references"] if self.kind == "captioning" else record["answers"]
        shown = self._image(position) if image else b""
        return Example(name, str(record["image_id"]), shown, record.get("question"), tuple(references))

    def _members(self, position: int) -> tuple[Mapping[str, bytes], str]:
        """(the sample's members, what errors call it)"""
        members = self._reader[position]
        return members, f"{members.shard}: sample {members.key} of task {self.task}"

    def _image(self, position: int) -> bytes:
        members, where = self._members(position)
        image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
        if image is None:
            raise UserError(f"{where}: no image (members: {', '.join(members)}). Prepare the corpus again.")
        return image


def _record(members: Mapping[str, bytes], kind: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(members["json"])
        missing = [key for key in _KEYS[kind] if key not in record]
    except (KeyError, json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{where}: no readable json member ({error}). Prepare the corpus again.") from error
    if missing:
        raise UserError(f"{where}: its json has no {', '.join(missing)}, which a {kind} task needs. Prepare the corpus again.")
    wrong = _wrong_names(record) if kind == "binding" else _wrong_texts(record, kind)
    if wrong is None and not is_text(str(record["id"]) + str(record["image_id"])):
        wrong = f"half a character in the id {record['id']!r} or the image_id {record['image_id']!r}"
    if wrong is not None:
        raise UserError(f"{where}: {wrong}. Prepare the corpus again.")
    return record


def _wrong_texts(record: dict[str, Any], kind: str) -> str | None:
    """What is wrong with the texts of a captioning or vqa sample."""
    references = record["references" if kind == "captioning" else "answers"]
    if not are_texts(references):
        return f"no references to score against (found {references!r}); they must be a list of strings of whole characters"
    if kind == "vqa" and not is_text(record["question"]):
        return f"the question is {record['question']!r}, no string of whole characters"
    return None


def _wrong_names(record: dict[str, Any]) -> str | None:
    """What is wrong with the names and members of a binding sample."""
    names, shown = record["names"], record["demonstrations"]
    if not are_texts(names) or len(names) != 2 or names[0] == names[1]:
        return f"the names are {names!r}, not two different strings"
    if record["answer"] not in names:
        return f"the answer {record['answer']!r} is none of the names {names}"
    if not is_text(record["query"]):
        return f"the query is {record['query']!r}, no member's name"
    if not isinstance(shown, list) or not all(
        isinstance(one, dict) and is_text(one.get("image")) and is_text(one.get("name")) for one in shown
    ):
        return f"the demonstrations are {shown!r}, not a list of {{image, name}}"
    return None


def _episode(record: dict[str, Any], members: Mapping[str, bytes], where: str) -> Example:
    name = str(record["id"])
    try:
        shown = tuple(
            Example(f"{name}/{d['image']}", f"{name}/{d['image']}", members[d["image"]], None, (d["name"],))
            for d in record["demonstrations"]
        )
        image = members[record["query"]]
    except KeyError as error:
        raise UserError(f"{where}: no member {error} (members: {', '.join(members)}). Prepare the corpus again.") from error
    return Example(name, str(record["image_id"]), image, None, (record["answer"],), tuple(record["names"]), shown)


def read_tasks(folder: Path, names: Iterable[str] | None = None) -> list[TaskData]:
    """The corpus's tasks, all of them or those named. Raises UserError listing the known ones for a name it does not hold."""
    manifest = Manifest.load(folder)
    wanted = list(manifest.tasks) if names is None else list(names)
    if unknown := [name for name in wanted if name not in manifest.tasks]:
        known = ", ".join(manifest.tasks) or "none"
        raise UserError(f"tasks: corpus {manifest.corpus!r} has no {', '.join(unknown)}. It has: {known}.")
    if repeated := sorted({name for name in wanted if wanted.count(name) > 1}):
        raise UserError(f"tasks: {', '.join(repeated)} given twice. Name each task once.")
    if not wanted and names is not None:
        raise UserError(f"tasks=[]: names none. Name some of {', '.join(manifest.tasks) or 'none'}, or leave tasks out for all.")
    if not wanted:
        raise UserError(f"Corpus {manifest.corpus!r} ({folder}) comes with no tasks. Give another one: task_corpus=NAME.")
    tasks = []
    for name in wanted:
        task = manifest.tasks[name]
        if task.kind not in _KEYS:
            raise UserError(f"{folder}: task {name!r} is of kind {task.kind!r}; this suite evaluates {', '.join(_KEYS)}.")
        queries = CorpusPool(folder, manifest, task.query, task.kind, name)
        support = None
        if task.kind != "binding":
            support = queries if task.support == task.query else CorpusPool(folder, manifest, task.support, task.kind, name)
        tasks.append(TaskData(name, task.kind, None if task.chance is None else 100 * task.chance, queries, support))
    return tasks
