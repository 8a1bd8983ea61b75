"""What an encoded picture is, by its header, and a smaller copy of it; used where corpora are checked and converted."""

from __future__ import annotations

import io

from configs.errors import UserError
from data_pipelines.images import MAX_PIXELS, NOT_DAMAGE, decode_rgb, open_picture, reason

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
"""Pillow's name of a format -> the extension its member gets: those of images.FORMATS, and MPO, a JPEG with further pictures."""


class PictureError(ValueError):
    """Why these bytes are no picture a corpus can hold: the second half of a sentence that begins with the picture's name."""


def header(data: bytes) -> tuple[str, int, int]:
    """(Pillow's format, width, height) without decoding a pixel. PictureError when it has none, more than MAX_PIXELS, or grey
    levels without a defined range."""
    try:
        with open_picture(data) as picture:
            found = (picture.format or "unknown", picture.width, picture.height)
    except NOT_DAMAGE:
        raise
    except Exception as error:  # as in images.decode_rgb
        raise PictureError(f"is no picture that can be decoded ({reason(error)})") from error
    if found[1] * found[2] > MAX_PIXELS:
        raise PictureError(f"has {found[1] * found[2]:,} pixels; the cap is {MAX_PIXELS:,}")
    return found


def stored(data: bytes, longest: int | None, quality: int) -> tuple[bytes, str]:
    """(bytes, extension) as a shard keeps the picture: as it is, or as WebP where its longer side has more than `longest` pixels.

    Raises PictureError for what is no picture.
    """
    import PIL.Image

    format, width, height = header(data)
    if longest is None or max(width, height) <= longest:
        return data, EXTENSIONS[format]
    try:
        rgb = PIL.Image.fromarray(decode_rgb(data))  # strict, and on white, as training will see it
    except UserError as error:
        raise PictureError(f"is no picture that can be decoded ({error})") from error
    scale = longest / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    buffer = io.BytesIO()
    rgb.resize(size, PIL.Image.Resampling.BICUBIC).save(buffer, "WEBP", quality=quality, lossless=quality == 100, method=4)
    return buffer.getvalue(), "webp"
