"""Interleaved documents: KEY.json with parallel `images` and `texts` lists, and one member an image (KEY.000.webp ...).

In every slot exactly one of the two lists is non-null; an image is named by everything after the first dot of its member.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from configs.errors import UserError
from data_pipelines.document import Document, Image, Origin


def read(members: Mapping[str, bytes], origin: Origin) -> Document:
    if "json" not in members:
        raise UserError(f"{origin}: an interleaved sample needs a json member; it has {sorted(members)}.")
    page = json.loads(members["json"])
    images, texts = page["images"], page["texts"]
    if len(images) != len(texts):
        raise UserError(f"{origin}: {len(images)} image slots but {len(texts)} text slots.")
    parts: list[str | Image] = []
    for slot, (image, span) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (span is None):
            held = "neither" if image is None else "both"
            raise UserError(f"{origin}: slot {slot} must hold either an image or a text, and holds {held}.")
        if image is None:
            parts.append(span)
        elif image in members:
            parts.append(Image(members[image], image))
        else:
            raise UserError(f"{origin}: slot {slot} names image {image!r}, which is not among {sorted(members)}.")
    return Document(tuple(parts), origin)
