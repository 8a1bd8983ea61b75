"""Text-only documents: one KEY.txt a sample, UTF-8."""

from __future__ import annotations

from collections.abc import Mapping

from configs.errors import UserError
from data_pipelines.document import Document, Origin


def read(members: Mapping[str, bytes], origin: Origin) -> Document:
    if "txt" not in members:
        raise UserError(f"{origin}: a text sample needs a txt member; it has {sorted(members)}.")
    return Document((members["txt"].decode(),), origin)
