"""Records: what a reader makes of annotation files, column by column; OfficialPool: the same as a Pool.

Half a million questions are columns of strings, not Examples: an Example is built, and its image read, when it is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from configs.errors import UserError
from eval.tasks.example import Example
from eval.tasks.texts import are_texts, is_text


class Images(Protocol):
    """The images of a split's items, by position."""

    def read(self, position: int) -> bytes:
        """Raises UserError if there is no such image."""

    def missing(self, positions: Iterable[int]) -> list[str]:
        """Where the absent or empty ones of these should be, without reading the others."""


@dataclass(frozen=True)
class FolderImages:
    """Image files: `names` relative to `folder`, one for each item. They may be links to anywhere; the names themselves, which
    annotations give, never lead out of the folder (Records refuses such)."""

    folder: Path
    names: Sequence[str]

    def read(self, position: int) -> bytes:
        path = self.folder / self.names[position]
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: the image cannot be read ({error.strerror or error}). Put it there.") from error

    def missing(self, positions: Iterable[int]) -> list[str]:
        paths = {name: self.folder / name for name in (self.names[position] for position in positions)}
        return [str(path) for path in paths.values() if not path.is_file() or not path.stat().st_size]


@dataclass(frozen=True)
class Side:
    """One of a task's two splits, `query` or `support`, under the folder of all datasets."""

    task: str
    name: str
    root: Path

    def file(self, key: str, relative: str) -> Path:
        """The annotation file under that key of the YAML. Raises UserError if it is not there."""
        return self._there(key, relative, folder=False)

    def folder(self, key: str, relative: str) -> Path:
        """The image folder under that key of the YAML. Raises UserError if it is not there."""
        return self._there(key, relative, folder=True)

    def key(self, key: str) -> str:
        """How the command line overrides a JSON reader's setting."""
        return f"+files.{self.task}.{self.name}.json.{key}"

    def file_names(self, pattern: str, images: Sequence[object]) -> list[str]:
        """An image id's file name, by the %-pattern under `image_file` of the YAML. Raises UserError if it does not fit."""
        made: dict[object, str] = {}  # a name for each image, not for each of its questions
        try:
            return [made[image] if image in made else made.setdefault(image, pattern % image) for image in images]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.key('image_file')}={pattern}: makes no file name of the image id {images[0]!r} ({error}). Give a pattern "
                "such as COCO_val2014_%012d.jpg or %s.jpg."
            ) from error

    def _there(self, key: str, relative: str, *, folder: bool) -> Path:
        path = self.root / relative
        if path.is_dir() if folder else path.is_file():
            return path
        kind = "image folder" if folder else "annotation file"
        raise UserError(
            f"Task {self.task}: no {kind} {path}. Put the official one there (docs/datasets.md), or say where it is: "
            f"{self.key(key)}=PATH (under {self.root}, or absolute)."
        )


@dataclass(frozen=True)
class Records:
    """Columns of equal length, in the order of the files. `source`: the file that errors name; `questions`: None for captions;
    `references`: each item's captions or answers; `references_source`: their file, where it is another."""

    source: Path
    ids: list[str]
    image_ids: list[str]
    questions: list[str] | None
    references: list[list[str]]
    images: Images
    references_source: Path | None = None

    def __post_init__(self) -> None:
        """Raises UserError for an image name that is no path within its folder."""
        if isinstance(self.images, FolderImages):
            for position, name in enumerate(self.images.names):
                if not is_text(name) or name.startswith("/") or ".." in name.split("/"):
                    raise UserError(
                        f"{self.source}: item {self.ids[position]!r} has the image file {name!r}. It must be a path within the "
                        f"image folder {self.images.folder}, without ..; bring the official file again."
                    )


class OfficialPool:
    """A Pool over Records. Raises UserError for ids that are there twice, items without references, ids, questions or
    references that are no texts, and a split without items."""

    def __init__(self, side: Side, records: Records) -> None:
        self.side, self.place, self._records = side, f"{side.task}/{side.name}", records
        self._position = {name: position for position, name in enumerate(records.ids)}
        where = f"Task {side.task}, {records.source}"
        if not records.ids:
            raise UserError(f"{where}: no items. Bring the file again.")
        if len(self._position) < len(records.ids):
            first = next(name for position, name in enumerate(records.ids) if self._position[name] != position)
            times = records.ids.count(first)
            raise UserError(
                f"{where}: the id {first!r} is there {times} times. Ids must be unique; bring the official file again."
            )
        for key, column in (("id", records.ids), ("image id", records.image_ids), ("question", records.questions or [])):
            for position, value in enumerate(column):
                if not is_text(value):
                    raise UserError(
                        f"{where}: item {records.ids[position]!r} has the {key} {value!r}; it must be a string of whole "
                        "characters. Correct it, or bring the official file again."
                    )
        for name, references in zip(records.ids, records.references, strict=True):
            if not are_texts(references):
                raise UserError(
                    f"Task {side.task}, {records.references_source or records.source}: item {name!r} has the references "
                    f"{references!r}; it must have a list of at least one, all of them strings of whole characters. "
                    "Splits whose answers are not public cannot be scored here: give one that has them."
                )

    @property
    def ids(self) -> list[str]:
        return list(self._position)

    @cached_property
    def _image_ids(self) -> dict[str, str]:
        return dict(zip(self._records.ids, self._records.image_ids, strict=True))

    @property
    def image_ids(self) -> dict[str, str]:
        return self._image_ids

    def example(self, name: str, *, image: bool = True) -> Example:
        position = self._position[name]
        records = self._records
        question = None if records.questions is None else records.questions[position]
        references = tuple(records.references[position])
        shown = records.images.read(position) if image else b""
        return Example(name, records.image_ids[position], shown, question, references)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Where the absent images of these items should be."""
        return self._records.images.missing([self._position[name] for name in names])

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over ids, image ids, questions and references in their order; not over the images, nor over white space
        or keys of the files that no item uses."""
        digest = hashlib.blake2b(digest_size=16)
        records = self._records
        questions = records.questions or [""] * len(records.ids)
        for start in range(0, len(records.ids), 10_000):
            part = slice(start, start + 10_000)
            rows = [records.ids[part], records.image_ids[part], questions[part], records.references[part]]
            digest.update(json.dumps(rows).encode())
        return digest.hexdigest()
