"""Caption pairs as img2dataset writes them: KEY.jpg (or png, webp), KEY.txt, and a KEY.json that is not needed here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from configs.errors import UserError
from data_pipelines.document import Document, Image, Origin

IMAGE_EXTENSIONS = ("webp", "jpg", "jpeg", "png", "gif", "bmp", "tif", "tiff")


def read(members: Mapping[str, bytes], origin: Origin) -> Document:
    extension = next((e for e in IMAGE_EXTENSIONS if e in members), None)
    if extension is None or "txt" not in members:
        raise UserError(f"{origin}: a caption sample needs an image and a txt member; it has {sorted(members)}.")
    picture = Image(partial(members.__getitem__, extension), extension)  # read when its sequence is full (document.Image)
    return Document((picture, members["txt"].decode()), origin)
