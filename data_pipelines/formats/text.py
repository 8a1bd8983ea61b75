"""Text-only documents: one KEY.txt a sample, UTF-8; or one row a document with a field `text`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.errors import UserError
from data_pipelines.document import Document, Origin
from data_pipelines.formats.store import Fetch


def read(members: Mapping[str, bytes], origin: Origin) -> Document:
    if "txt" not in members:
        raise UserError(f"{origin}: a text sample needs a txt member; it has {sorted(members)}.")
    return Document((members["txt"].decode(),), origin)


def read_row(row: Mapping[str, Any], origin: Origin, fetch: Fetch, *, key: str = "text") -> Document:
    """The row's `key` as a document; other fields are not read."""
    if not isinstance(row.get(key), str):
        held = f"holds {row[key]!r}" if key in row else "is missing"
        raise UserError(f"{origin}: {key!r} must be a string, and {held}. Say which field has the text with corpus.text_key=...")
    return Document((row[key],), origin)
