"""The arithmetic of patches and image tokens, without torch: a configuration is checked with it before anything is loaded.

an image of S x S pixels and a tower with a patch (or feature-map stride) of p pixels  ->  a grid of S/p x S/p patches
a connector with M image tokens lays them out as sqrt(M) x sqrt(M)                         (MM1, section 3.2)
"""

from __future__ import annotations

from math import isqrt

from configs.errors import UserError


def check_image_size(image_size: int, patch: int, key: str = "image_encoder.image_size") -> None:
    """Raise UserError unless `image_size` (pixels a side) is a positive multiple of `patch` (pixels)."""
    if patch < 1:
        raise UserError(f"{key.rpartition('.')[0]}.patch_size={patch}: must be at least 1 pixel.")
    if image_size < patch or image_size % patch:
        below = max(image_size // patch, 1) * patch
        raise UserError(
            f"{key}={image_size}: the tower sees patches of {patch} pixels, so the side must be a multiple of {patch}. "
            f"Take {below} or {below + patch}."
        )


def grid(image_size: int, patch: int, key: str = "image_encoder.image_size") -> tuple[int, int]:
    """Rows and columns of patches of a square image; UserError if they do not come out even."""
    check_image_size(image_size, patch, key)
    return image_size // patch, image_size // patch


def square_side(num_tokens: int, key: str = "connector.num_tokens") -> int:
    """The side of the square of image tokens; UserError unless `num_tokens` is a positive perfect square."""
    if num_tokens < 1 or isqrt(num_tokens) ** 2 != num_tokens:
        below = max(isqrt(max(num_tokens, 1)), 1)
        raise UserError(
            f"{key}={num_tokens}: image tokens form a square, so this must be a square number. "
            f"Take {below**2} or {(below + 1) ** 2} (MM1 uses 64 and 144)."
        )
    return isqrt(num_tokens)


def shuffle_factor(patches: tuple[int, int], num_tokens: int, key: str = "connector.num_tokens") -> int:
    """How many patches a side pixel shuffle folds into one token; UserError unless the grid divides evenly."""
    side = square_side(num_tokens, key)
    height, width = patches
    if height != width or height % side:
        fitting = ", ".join(str(s * s) for s in range(1, height + 1) if height % s == 0 and width % s == 0)
        raise UserError(
            f"{key}={num_tokens}: pixel shuffle folds whole squares of patches, and a {height} x {width} grid does not divide "
            f"into {side} x {side}. This grid allows {fitting}."
        )
    return height // side
