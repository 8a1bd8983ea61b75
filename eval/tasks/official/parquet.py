"""The Hugging Face hub's copies: parquet files with the images inside, as lmms-lab, HuggingFaceM4 and facebook publish them.

    FOLDER/data/{split}-00000-of-00013*.parquet    a clone of the repository (`data/` may be left out)
    FOLDER/default/{split}/0000.parquet            its branch refs/convert/parquet

    image: {bytes, path}   and, by task: question_id, image_id, question, answers, annotations_captions, caption_str, ...

Different copies name a column differently, so the YAML gives each as a list of names, of which the first one there is taken.
Texts may be strings, lists of strings, structs {answer} or {raw}, or lists of those. Images are read a row group at a time (the
hub's have about a hundred rows), and only when they are asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs.errors import UserError
from eval.tasks.official.records import Records, Side
from eval.tasks.shards import check_shards

_LAYOUTS = ("data/{}-*.parquet", "{}-*.parquet", "default/{}/*.parquet", "{}/*.parquet")
_TEXTS = ("answer", "raw", "caption")
"""Which field of a struct is its text."""


def find(root: Path, folder: str, splits: Sequence[str]) -> list[Path]:
    """The files of the first split that is there, in the order of their names; [] if none is."""
    for split in splits:
        for layout in _LAYOUTS:
            if files := sorted((root / folder).glob(layout.format(split))):
                return files
    return []


def looked_for(root: Path, folder: str, splits: Sequence[str]) -> str:
    return f"{root / folder / _LAYOUTS[0].format(splits[0])}"


def rows(
    side: Side,
    *,
    folder: str,
    splits: Sequence[str],
    references: Sequence[str],
    question: Sequence[str] = (),
    id: Sequence[str] = (),
    image_id: Sequence[str] = (),
    images_folder: str | None = None,
) -> Records:
    """One item a row, or one for all rows of an id where the task has no questions (a row a caption). `id`: none there, the
    position; `image_id`: none there, each item's image is its own. `images_folder`: another folder, whose `id` is the image id.

    Raises UserError for a missing shard, a missing column, or an image id without an image.
    """
    table = _Table(side, _complete(side, folder, splits))
    texts = _texts(table.column(references, "references"), table)
    total = len(texts)
    stem = table.files[0].name.split("-")[0].removesuffix(".parquet")
    ids = table.strings(id, "id") if id else [f"{stem}-{position}" for position in range(total)]
    image_ids = table.strings(image_id, "image_id", optional=True) if image_id else None
    kept = list(range(total))
    if question:
        questions: list[str] | None = table.strings(question, "question")
    else:
        questions, kept, texts = None, *_grouped(ids, texts)
        ids = [ids[position] for position in kept]
        image_ids = image_ids and [image_ids[position] for position in kept]
    image_ids = image_ids or ids
    if images_folder is None:
        return Records(table.files[0], ids, image_ids, questions, texts, ParquetImages(table, kept))
    others = _Table(side, _complete(side, images_folder, splits))
    row_of = {name: row for row, name in enumerate(others.strings(["id"], "id"))}
    lost = next((name for name in image_ids if name not in row_of), None)
    if lost is not None:
        raise UserError(
            f"Task {side.task}, {table.files[0]}: the image {lost!r} is in none of {others.files[0].parent}/*.parquet. Bring the "
            "images of the same split."
        )
    return Records(table.files[0], ids, image_ids, questions, texts, ParquetImages(others, [row_of[name] for name in image_ids]))


def _complete(side: Side, folder: str, splits: Sequence[str]) -> list[Path]:
    files = find(side.root, folder, splits)
    if not files:
        raise UserError(
            f"Task {side.task}: no parquet files of split {' or '.join(splits)} in {side.root / folder}; looked for "
            f"{', '.join(layout.format(splits[0]) for layout in _LAYOUTS)}. Clone the dataset's repository there "
            f"(docs/datasets.md), or say where it is: +files.{side.task}.{side.name}.parquet.folder=PATH."
        )
    check_shards(files, side.task, next(split for split in splits if find(side.root, folder, [split])))
    return files


class _Table:
    """The parquet files of a split as one table of rows. Raises UserError if pyarrow is missing or a file is damaged."""

    def __init__(self, side: Side, files: list[Path]) -> None:
        from data_pipelines.formats.rows import needs_extra

        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise needs_extra(files[0], "pyarrow") from None
        self.side, self.files = side, files
        self.opened = [_guarded(path, lambda path=path: ParquetFile(path)) for path in files]
        self.names: list[str] = self.opened[0].schema_arrow.names
        self.groups = [(f, g) for f, file in enumerate(self.opened) for g in range(file.metadata.num_row_groups)]
        self.starts = [0]
        for f, g in self.groups:
            self.starts.append(self.starts[-1] + self.opened[f].metadata.row_group(g).num_rows)

    def column(self, names: Sequence[str], key: str, *, optional: bool = False) -> Any:
        """The first of the named columns that is there, as one Arrow array; None if it is optional and none is."""
        import pyarrow

        chosen = next((name for name in names if name in self.names), None)
        if chosen is None and optional:
            return None
        if chosen is None:
            raise UserError(
                f"{self.files[0]}: no column for the {key}: looked for {', '.join(names)}; it has {', '.join(self.names)}. "
                f"Name it: +files.{self.side.task}.{self.side.name}.parquet.{key}=[NAME]."
            )
        for path, file in zip(self.files, self.opened, strict=True):
            if chosen not in file.schema_arrow.names:
                has = ", ".join(file.schema_arrow.names)
                raise UserError(
                    f"{path}: no column {chosen}, which {self.files[0].name} has for the {key}; it has {has}. Bring the files of "
                    "one split and one version."
                )
        parts = [
            _guarded(path, lambda file=file: file.read(columns=[chosen]).column(0))
            for path, file in zip(self.files, self.opened, strict=True)
        ]
        return pyarrow.chunked_array([chunk for part in parts for chunk in part.chunks], type=parts[0].type).combine_chunks()

    def strings(self, names: Sequence[str], key: str, *, optional: bool = False) -> Any:
        """The column as a list of strings (numbers written out); None if it is optional and not there."""
        found = self.column(names, key, optional=optional)
        if found is None:
            return None
        if found.null_count:
            raise UserError(f"{self.files[0]}: {found.null_count} of {len(found)} rows have no {key}. Bring the files again.")
        return [str(value) for value in found.to_pylist()]

    def place(self, row: int) -> tuple[int, int]:
        """(number of its row group, position within it)."""
        group = bisect_right(self.starts, row) - 1
        return group, row - self.starts[group]

    def images(self, group: int) -> Any:
        """The `image.bytes` of a row group, as an Arrow array."""
        f, g = self.groups[group]

        def read() -> Any:
            chunks = self.opened[f].read_row_group(g, columns=["image.bytes"]).column("image").combine_chunks()
            return chunks.field("bytes")

        return _guarded(self.files[f], read)

    def has_nulls(self, group: int) -> bool:
        """Whether images may be missing in the row group, as the file's own statistics have it."""
        f, g = self.groups[group]
        content = self.opened[f].metadata.row_group(g)
        for number in range(content.num_columns):
            if (column := content.column(number)).path_in_schema == "image.bytes":
                return column.statistics is None or not column.statistics.has_null_count or column.statistics.null_count > 0
        raise UserError(
            f"{self.files[f]}: no column image with the images' bytes; it has {', '.join(self.names)}. Bring a copy of the "
            "dataset with its images in it."
        )


class ParquetImages:
    """The image column of a table: item `position` has the one of row `rows[position]`."""

    def __init__(self, table: _Table, rows: list[int]) -> None:
        self._table, self._rows = table, rows
        self._group = lru_cache(maxsize=4)(table.images)

    def read(self, position: int) -> bytes:
        group, offset = self._table.place(self._rows[position])
        content = self._group(group)[offset].as_py()
        if not content:
            raise UserError(f"{self._where(position)}: no image. Bring a copy of the dataset with its images in it.")
        return bytes(content)

    def missing(self, positions: Iterable[int]) -> list[str]:
        by_group: dict[int, list[int]] = {}
        for position in positions:
            by_group.setdefault(self._table.place(self._rows[position])[0], []).append(position)
        lost: list[str] = []
        for group, members in sorted(by_group.items()):
            if self._table.has_nulls(group):
                content = self._table.images(group)
                lost += [self._where(p) for p in members if not content[self._table.place(self._rows[p])[1]].as_py()]
        return list(dict.fromkeys(lost))

    def _where(self, position: int) -> str:
        group, _ = self._table.place(self._rows[position])
        f, _ = self._table.groups[group]
        first = next(start for (file, _), start in zip(self._table.groups, self._table.starts, strict=False) if file == f)
        return f"{self._table.files[f]} row {self._rows[position] - first}"


def _texts(column: Any, table: _Table) -> list[list[str]]:
    """A column of strings, structs of one, or lists of either -> a list of texts for each row."""
    import pyarrow
    import pyarrow.compute

    kind = column.type
    if not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
        return [[text] for text in _flat(column, table)]
    lengths = pyarrow.compute.list_value_length(column).to_pylist()
    flat, found, start = _flat(column.flatten(), table), [], 0
    for length in lengths:
        found.append(flat[start : start + (length or 0)])
        start += length or 0
    return found


def _flat(column: Any, table: _Table) -> list[str]:
    import pyarrow

    if pyarrow.types.is_struct(column.type):
        names = [field.name for field in column.type]
        chosen = next((name for name in _TEXTS if name in names), None)
        if chosen is None:
            raise UserError(f"{table.files[0]}: references have the fields {', '.join(names)}, none of {', '.join(_TEXTS)}.")
        column = column.field(chosen)
    return list(column.to_pylist())


def _grouped(ids: list[str], texts: list[list[str]]) -> tuple[list[int], list[list[str]]]:
    """(first row of each id, all its texts): a copy with a row a caption shows an image five times."""
    first: dict[str, int] = {}
    said: dict[str, list[str]] = {}
    for row, (name, more) in enumerate(zip(ids, texts, strict=True)):
        first.setdefault(name, row)
        said.setdefault(name, []).extend(more)
    return list(first.values()), list(said.values())


def _guarded(path: Path, read: Any) -> Any:
    import pyarrow

    try:
        return read()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: the parquet file is damaged ({error}). Bring it again.") from error
