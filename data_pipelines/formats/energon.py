"""Interleaved documents: KEY.json with parallel `images` and `texts` lists, and one member an image (KEY.000.webp ...).

In every slot exactly one of the two lists is non-null; an image is named by everything after the first dot of its member,
in whatever case.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from configs.errors import UserError
from data_pipelines.document import Document, Image, Origin
from data_pipelines.formats.slots import parts_of


def read(members: Mapping[str, bytes], origin: Origin) -> Document:
    if "json" not in members:
        raise UserError(f"{origin}: an interleaved sample needs a json member; it has {sorted(members)}.")

    def picture(slot: int, name: Any) -> Image:
        member = name if name in members else str(name).lower()  # indexes hold extensions in lower case, old ones as they are
        if member not in members:
            raise UserError(f"{origin}: slot {slot} names image {name!r}, which is not among {sorted(members)}.")
        return Image(partial(members.__getitem__, member), member)  # read when its sequence is full (document.Image)

    return Document(parts_of(json.loads(members["json"]), origin, picture), origin)
