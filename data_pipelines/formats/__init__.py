"""How a record of a corpus becomes a Document: one module a layout.

    a tar's sample (members)       READERS, by the `format` a manifest gives     img2dataset energon mmc4 mint1t text
    a row of jsonl or parquet      ROW_READERS, while it is converted            obelics mmc4 text

A row may name pictures that lie elsewhere; `fetch` brings them (store.py). Tars hold their own, so that training can read any
sample of them at any time; rows have no random access and are converted first (corpora/convert.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from configs.errors import UserError
from data_pipelines.document import Document, Image, Origin
from data_pipelines.formats import energon, img2dataset, mint1t, mmc4, obelics, text
from data_pipelines.formats.store import Fetch

Reader = Callable[[Mapping[str, bytes], Origin], Document]
RowReader = Callable[[Mapping[str, Any], Origin, Fetch], Document]

READERS: dict[str, Reader] = {
    "img2dataset": img2dataset.read,
    "energon": energon.read,
    "mmc4": mmc4.read,
    "mint1t": mint1t.read,
    "text": text.read,
}
ROW_READERS: dict[str, RowReader] = {"obelics": obelics.read_row, "mmc4": mmc4.read_row, "text": text.read_row}

LAYOUTS: dict[str, tuple[str, ...]] = {
    "captions": ("img2dataset",),
    "captions_synthetic": ("img2dataset",),
    "interleaved": ("energon", "mmc4", "mint1t"),
    "text": ("text",),
}
"""source -> the layouts its tars may have, tried in this order."""
ROW_LAYOUTS: dict[str, tuple[str, ...]] = {
    "captions": (),
    "captions_synthetic": (),
    "interleaved": ("obelics", "mmc4"),
    "text": ("text",),
}
"""source -> the layouts its jsonl and parquet files may have, tried in this order."""

KNOWN = {
    "img2dataset": "KEY.jpg (png, webp ...) and KEY.txt",
    "energon": "KEY.json with parallel lists images and texts, and the images beside it as KEY.000.jpg ...",
    "mmc4": "text_list and image_info with matched_text_index and image_base64 or image_name",
    "mint1t": "KEY.json with parallel lists images and texts, and KEY.tiff with a frame for each image",
    "obelics": "parallel lists images (URLs) and texts",
    "text": "KEY.txt in a tar, a field 'text' in a row",
}
"""layout -> what it looks like, for whoever brings something else."""


def read_document(format: str, members: Mapping[str, bytes], origin: Origin) -> Document:
    """The sample as a document of strings and images. Raises UserError naming the sample when it does not follow its layout."""
    if format not in READERS:
        raise UserError(f"{origin}: unknown shard format {format!r}; known: {', '.join(sorted(READERS))}.")
    return following(format, origin, READERS[format], members, origin)


def following(format: str, origin: Origin, read: Callable[..., Document], *arguments: Any) -> Document:
    """What `read` returns, certain to hold text that can be encoded; whatever a malformed record makes it raise, as UserError."""
    try:
        document = read(*arguments)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # bytes that are no UTF-8, no JSON ...
        raise UserError(
            f"{origin}: does not follow the layout {format!r} ({type(error).__name__}: {error}). Correct it, or take it out."
        ) from error
    for number, part in enumerate(document.parts):
        if isinstance(part, Image):
            continue
        if not isinstance(part, str):
            raise UserError(f"{origin}: text slot {number} holds {part!r}, which is no text. Correct it, or take it out.")
        if not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can write and UTF-8 cannot
                raise UserError(
                    f"{origin}: text slot {number} is no valid Unicode ({error}). Correct it, or take it out."
                ) from error
    return document
