"""What an encoded picture is, by its header, and a smaller copy of it; used where corpora are checked and converted."""

from __future__ import annotations

import io

from configs.errors import UserError
from data_pipelines.images import MAX_PIXELS, decode_rgb, reason

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
"""Pillow's name of a format -> the extension its member gets; no other is written into shards."""


class PictureError(ValueError):
    """Why these bytes are no picture a corpus can hold: the second half of a sentence that begins with the picture's name."""


def header(data: bytes) -> tuple[str, int, int]:
    """(Pillow's format, width, height) without decoding a pixel. PictureError when it has none, or more than MAX_PIXELS."""
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data)) as picture:
            found = (picture.format or "unknown", picture.width, picture.height)
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise PictureError(f"is no picture that can be decoded ({reason(error)})") from error
    if found[1] * found[2] > MAX_PIXELS:
        raise PictureError(f"has {found[1] * found[2]:,} pixels; the cap is {MAX_PIXELS:,}")
    return found


def stored(data: bytes, longest: int | None, quality: int) -> tuple[bytes, str]:
    """(bytes, extension) as a shard keeps the picture: as it is, or as WebP where its longer side has more than `longest` pixels.

    Raises PictureError for what is no picture, and for formats outside EXTENSIONS that nothing makes smaller.
    """
    import PIL.Image

    format, width, height = header(data)
    if longest is None or max(width, height) <= longest:
        if format not in EXTENSIONS:
            raise PictureError(f"is {format}; shards hold {', '.join(sorted(set(EXTENSIONS.values())))}")
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
