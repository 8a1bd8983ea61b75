"""Images: encoded bytes -> uint8 tensors of one square size.

    bytes -> RGB pixels -> longer side resized to `size` (bicubic, antialiased) -> padded with white to a square

The whole picture is kept: cropping would cut the objects that captions name. Transparent pixels become white too. EXIF
orientation is not applied, as in the training of the public CLIP models. uint8 goes to the model, which normalises with its own
tower's mean and deviation on its own device: a quarter of the bytes of float32, and one place where that can be right or wrong.

JPEG is decoded by libjpeg-turbo and resized with the bits of torch's uint8 kernel (resize.py), at most one grey level from
Pillow's and several times as fast (`python -m benchmarks.data`). Decoding is strict: Pillow hands over the grey or garbled rest
of a damaged JPEG as if nothing were wrong. Of libjpeg's complaints only those about perfect pictures are forgiven, by mending the
file and decoding it strictly again: a missing end marker, filling (0x00, 0xFF) before a marker, scan parameters that say nothing
in a sequential JPEG. Other stray bytes may be the rest of a scan that was read wrongly, and are not forgiven.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from configs.errors import UserError
from data_pipelines.resize import resize_into

if TYPE_CHECKING:
    import torch
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow's names of what shards may hold; MPO is read as JPEG. Pillow would also hand EPS to Ghostscript, a program that runs."""
MAX_PIXELS = 64_000_000
"""Refused before decoding: a decompression bomb, not a picture."""
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
MARKER = re.compile(rb"\xff+([^\x00\xff])")
SCAN, WHOLE_SCAN, RESTARTS = 0xDA, b"\x00\x3f\x00", range(0xD0, 0xD8)
"""Of a JPEG: the marker before a scan, the parameters of one that codes all there is, the markers inside that have no segment."""
NOT_DAMAGE = (UserError, MemoryError, ImportError)
"""What decoding may raise that says nothing of the bytes, or says it already."""
STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
"""libjpeg's complaint about bytes between segments, or after the coded pixels: how many, and the marker after them."""
MOST_MENDED = 8
"""Complaints about one JPEG that are looked into; each costs decoding it again."""


def decode_image(data: bytes, size: int, *, name: str = "image") -> torch.Tensor:
    """Encoded image -> uint8 (3, size, size), RGB. Raises UserError naming the image when it is damaged, unknown or too large."""
    import torch

    square = np.empty((size, size, 3), np.uint8)
    decode_into(data, square, name=name)
    return torch.from_numpy(square).permute(2, 0, 1).contiguous()


def decode_into(data: bytes, square: np.ndarray, *, name: str = "image") -> None:
    """Encoded image -> `square`, uint8 (size, size, 3): the layout in which decoders and resizing leave it. Raises as above."""
    pixels = decode_rgb(data, name)
    size, (height, width) = len(square), pixels.shape[:2]
    scale = size / max(height, width)
    to = (max(1, round(height * scale)), max(1, round(width * scale)))
    if to != (size, size):
        square.fill(255)
    top, left = (size - to[0]) // 2, (size - to[1]) // 2
    window = square[top : top + to[0], left : left + to[1]]
    if to == (height, width):
        window[:] = pixels
    else:
        resize_into(pixels, window)


class SquareDecoder:
    """What lanes decode their pictures with (lanes.Decoder): squares of one size, many side by side in one array."""

    def __init__(self, size: int) -> None:
        self.size = size

    def allocate(self, count: int) -> np.ndarray:
        """Room for `count` pictures, uint8 (count, size, size, 3)."""
        return np.empty((count, self.size, self.size, 3), np.uint8)

    def decode(self, data: bytes, name: str, square: np.ndarray) -> None:
        decode_into(data, square, name=name)


def decode_rgb(data: bytes, name: str = "image") -> np.ndarray:
    """Encoded image -> uint8 (height, width, 3) on white. Raises UserError as decode_image does."""
    try:
        return _decode_jpeg(data, name) if data.startswith(JPEG_START) else _decode_with_pillow(data, name)
    except NOT_DAMAGE:
        raise
    except Exception as error:  # on damaged bytes decoders raise what they please: OSError, RuntimeError, struct.error ...
        raise UserError(f"{name}: not a whole, decodable image ({reason(error)}).") from error


def open_picture(data: bytes) -> Image.Image:
    """The picture, of one of FORMATS, its header read and no pixel yet. Raises what Pillow raises; ValueError as check_range."""
    from PIL import Image

    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    check_range(picture)
    return picture


def check_range(picture: Image.Image) -> None:
    """Raises ValueError for 32-bit and float grey: nothing in the file says which value is white, and Pillow clips at 255."""
    if picture.mode in ("I", "F"):
        raise ValueError(f"{'float' if picture.mode == 'F' else '32-bit'} grey levels, whose range the file does not tell")


def rgb_on_white(picture: Image.Image) -> Image.Image:
    """RGB of a picture of any mode, white where it is transparent. Raises ValueError as check_range does."""
    from PIL import Image

    check_range(picture)
    if picture.mode.startswith("I;16"):
        picture = _upper_bits(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        coloured = picture.convert("RGBA")
        rgb = Image.new("RGB", coloured.size, "white")
        rgb.paste(coloured, mask=coloured.getchannel("A"))
        return rgb
    return picture.convert("RGB")


def _upper_bits(picture: Image.Image) -> Image.Image:
    """8-bit grey of 16-bit grey, or of a TIFF's 12, where Pillow would clip at 255; white where it has the transparent level."""
    from PIL import Image

    levels = np.asarray(picture)
    (bits,) = getattr(picture, "tag_v2", {}).get(258, (16,))  # BitsPerSample
    grey = (levels >> (bits - 8)).astype(np.uint8)
    if (transparent := picture.info.get("transparency")) is not None:
        grey[levels == transparent] = 255
    return Image.fromarray(grey)


def reason(error: Exception) -> str:
    """Pillow's words, without the address in memory that it puts into them: the same damage has the same reason everywhere."""
    words = re.sub(r"identify image file <.*>", f"identify its format as one of {', '.join(FORMATS)}", str(error))
    return words or type(error).__name__


def _decode_jpeg(data: bytes, name: str) -> np.ndarray:
    for _ in range(MOST_MENDED):
        try:
            return _decode_whole_jpeg(data, name)
        except ValueError as error:
            if (mended := _mended(data, str(error))) is None:
                raise
            data = mended
    return _decode_whole_jpeg(data, name)


def _decode_whole_jpeg(data: bytes, name: str) -> np.ndarray:
    """Raises ValueError with libjpeg's first complaint, be it only a warning."""
    from simplejpeg import decode_jpeg, decode_jpeg_header

    height, width, colours, _ = decode_jpeg_header(data)
    _check_pixels(width, height, name)
    own = colours in ("CMYK", "YCCK")  # printing inks: only Pillow turns them into RGB, libjpeg still says whether they are whole
    pixels = decode_jpeg(data, "CMYK" if own else "RGB")
    return _decode_with_pillow(data, name) if own else pixels


def _mended(data: bytes, complaint: str) -> bytes | None:
    """The JPEG without what libjpeg complains about, where no pixel depends on it; else None."""
    if "Premature end of JPEG file" in complaint:
        return None if data.endswith(JPEG_END) else data + JPEG_END
    if found := STRAY.search(complaint):
        count, marker = int(found[1]), int(found[2], 16)
        for place, _, kind in _markers(data):
            if kind == marker and count <= place - 2 and not data[place - count : place].strip(b"\x00\xff"):
                return data[: place - count] + data[place:]
    if "Invalid SOS parameters" in complaint:
        mended = bytearray(data)
        for _, start, kind in _markers(data):
            if kind == SCAN:
                end = start + int.from_bytes(data[start : start + 2], "big")
                mended[end - 3 : end] = WHOLE_SCAN
        return None if mended == data else bytes(mended)
    return None


def _markers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(start with padding, end, second byte) of every marker outside of segments, from the second to the end marker."""
    at = 2
    while found := MARKER.search(data, at):
        at, kind = found.end(), found[1][0]
        yield found.start(), at, kind
        if kind == JPEG_END[1]:
            return
        if kind not in RESTARTS:
            at += int.from_bytes(data[at : at + 2], "big")


def _decode_with_pillow(data: bytes, name: str) -> np.ndarray:
    with open_picture(data) as picture:
        _check_pixels(picture.width, picture.height, name)
        return np.array(rgb_on_white(picture))


def _check_pixels(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(f"{name}: {width}x{height} pixels; the cap is {MAX_PIXELS}.")
