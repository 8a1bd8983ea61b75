"""Parallel lists `images` and `texts`, as energon, OBELICS, OmniCorpus and MINT-1T write a page.

In every slot exactly one of the two is not null.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from configs.errors import UserError
from data_pipelines.document import Image, Origin


def parts_of(page: Mapping[str, Any], origin: Origin, picture: Callable[[int, Any], Image | None]) -> tuple[str | Image, ...]:
    """The page's parts in the order of its slots; `picture(slot, value)` finds a slot's image, None leaves it out.

    Raises UserError naming the slot that holds both or neither; a KeyError or TypeError where a list is missing or none.
    """
    images, texts = page["images"], page["texts"]
    for key, value in (("images", images), ("texts", texts)):
        if not isinstance(value, list):
            raise UserError(f"{origin}: {key!r} must be a list, and is {type(value).__name__}.")
    if len(images) != len(texts):
        raise UserError(f"{origin}: {len(images)} image slots but {len(texts)} text slots.")
    parts: list[str | Image] = []
    for slot, (image, span) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (span is None):
            held = "neither" if image is None else "both"
            raise UserError(f"{origin}: slot {slot} must hold either an image or a text, and holds {held}.")
        if image is None:
            parts.append(span)
        elif (found := picture(slot, image)) is not None:
            parts.append(found)
    return tuple(parts)
