"""How a shard's sample becomes a Document: one module a layout, found by the `format` a manifest gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from configs.errors import UserError
from data_pipelines.document import Document, Origin
from data_pipelines.formats import energon, img2dataset, text

Reader = Callable[[Mapping[str, bytes], Origin], Document]

READERS: dict[str, Reader] = {"img2dataset": img2dataset.read, "energon": energon.read, "text": text.read}


def read_document(format: str, members: Mapping[str, bytes], origin: Origin) -> Document:
    """Raises UserError naming the sample when the layout is unknown or the sample does not follow it."""
    if format not in READERS:
        raise UserError(f"{origin}: unknown shard format {format!r}; known: {', '.join(sorted(READERS))}.")
    return READERS[format](members, origin)
