"""MINT-1T (its PDF part): KEY.json with parallel lists `images` and `texts`, and KEY.tiff a frame per non-null image, in order.

Frames become PNG, which loses nothing of what training sees. That decodes every frame at every read: a corpus that is read often
is better converted (corpus=convert). Source: Awadalla et al. 2024, MINT-1T (arXiv 2406.11271).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from configs.errors import UserError
from data_pipelines.document import Document, Image, Origin
from data_pipelines.formats.slots import parts_of
from data_pipelines.images import MAX_PIXELS, NOT_DAMAGE, rgb_on_white


def read(members: Mapping[str, bytes], origin: Origin) -> Document:
    if "json" not in members:
        raise UserError(f"{origin}: a MINT-1T sample needs a json member; it has {sorted(members)}.")
    page = json.loads(members["json"])
    extension = next((e for e in ("tiff", "tif") if e in members), None)
    wanted = sum(image is not None for image in page["images"])
    if extension is None and wanted:
        raise UserError(f"{origin}: {wanted} images but no tiff member; it has {sorted(members)}.")
    images = _frames(members[extension], extension, wanted, origin) if extension is not None else iter(())

    def picture(slot: int, name: Any) -> Image:
        return next(images)

    document = Document(parts_of(page, origin, picture), origin)
    for _ in images:  # nothing is left: this runs the check that the file has no further frame
        pass
    return document


def _frames(data: bytes, extension: str, wanted: int, origin: Origin) -> Iterator[Image]:
    """Exactly `wanted` frames, named tiff:0, tiff:1 ...; UserError where the file has fewer or more.

    Never more are looked for than are wanted, so that a file whose directory is a loop ends too.
    """
    import PIL.Image

    number = 0
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("TIFF",)) as picture:
            for number in range(wanted + 1):
                try:
                    picture.seek(number)
                except EOFError:
                    if number == wanted:
                        return
                    raise UserError(f"{origin}: {wanted} images but {number} frames in the {extension}.") from None
                if number == wanted:
                    raise UserError(f"{origin}: {wanted} images but more frames in the {extension}.")
                if picture.width * picture.height > MAX_PIXELS:
                    raise UserError(
                        f"{origin}: frame {number} is {picture.width}x{picture.height}; the cap is {MAX_PIXELS} pixels."
                    )
                frame = io.BytesIO()
                # PNG knows neither CMYK nor Lab; of 16 bits training sees the upper 8
                (picture if picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else rgb_on_white(picture)).save(
                    frame, "PNG", compress_level=1
                )
                yield Image(frame.getvalue(), f"{extension}:{number}")
    except NOT_DAMAGE:
        raise
    except Exception as error:  # as in images.decode_rgb
        raise UserError(f"{origin}: frame {number} of the {extension} cannot be decoded ({error}).") from error
