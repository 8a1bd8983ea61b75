"""Images: encoded bytes -> uint8 tensors of one square size.

uint8 goes to the model, which normalises with its own tower's mean and standard deviation on its own device: a quarter of the
bytes of float32, and one place where normalisation can be right or wrong.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from configs.errors import UserError

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 64_000_000
"""Refused before decoding: a decompression bomb, not a picture."""


def decode_image(data: bytes, size: int, *, name: str = "image") -> torch.Tensor:
    """Encoded image -> uint8 (3, size, size), RGB.

    The whole picture is kept: the shorter side is padded with white to a square (transparent pixels become white too), then
    resized bicubically. Cropping would cut the objects that captions name. Raises UserError naming the image when it is not
    decodable or has more than MAX_PIXELS pixels.
    """
    import numpy
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UserError(f"{name}: {picture.width}x{picture.height} pixels; the cap is {MAX_PIXELS}.")
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                coloured = picture.convert("RGBA")
                rgb = Image.new("RGB", coloured.size, "white")
                rgb.paste(coloured, mask=coloured.getchannel("A"))
            else:
                rgb = picture.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name}: not a decodable image ({error}).") from error
    if rgb.width != rgb.height:
        side = max(rgb.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
        rgb = square
    if rgb.width != size:
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(rgb, copy=True)).permute(2, 0, 1).contiguous()
