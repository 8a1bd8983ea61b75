"""A folder of pictures that the rows of a corpus name: by URL (OBELICS, OmniCorpus) or by file name (MMC4).

    by URL     DIR/ab/abcd...ef.jpg    the SHA-256 of the URL (UTF-8) in lower-case hex, in a folder of its first two letters;
                                       with an extension of SUFFIXES or with none
    by name    DIR/NAME                a plain file name, never a path

A picture that is not there, or that nothing can decode (a web page saved as a picture), is never left out silently: each is
written as one line of a list, and the conversion refuses to finish unless told to drop them (corpus.missing_images=drop).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from configs.errors import UserError
from data_pipelines.document import Image, Origin
from data_pipelines.formats.pictures import PictureError

Fetch = Callable[[Origin, str, str], "Image | None"]
"""(document, "url" or "name", value) -> the picture, or None if it is to be left out."""

SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_FILE_BYTES = 256_000_000
"""A larger file is listed as unusable and not read: more than any picture below the pixel cap needs."""


def url_path(url: str) -> str:
    """Where a store keeps the picture of `url`, without its extension: "ab/abcd..."."""
    name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{name[:2]}/{name}"


class ImageStore:
    """A `Fetch` that reads from `folder` and lists what it does not find in `listing` (JSON lines), counted in `missing`.

    `keep` makes of a file's bytes those that the corpus keeps, and raises PictureError for what it cannot (pictures.stored).
    """

    def __init__(self, folder: Path | None, listing: Path, keep: Callable[[bytes], tuple[bytes, str]]) -> None:
        self.folder, self.listing, self.keep = folder, listing, keep
        self.missing = 0

    def __call__(self, origin: Origin, kind: str, value: str) -> Image | None:
        if self.folder is None:
            raise UserError(f"{origin}: names the image {value!r}. Give the folder where the images lie: corpus.image_store=DIR")
        path = self._by_url(value) if kind == "url" else self._by_name(origin, value)
        if path is None:
            self._miss(origin, value, "not in the image store")
            return None
        if path.stat().st_size > MAX_FILE_BYTES:
            self._miss(origin, value, f"more than {MAX_FILE_BYTES:,} bytes")
            return None
        try:
            return Image(self.keep(path.read_bytes())[0], value)
        except PictureError as error:
            self._miss(origin, value, str(error))
            return None

    def _by_url(self, url: str) -> Path | None:
        assert self.folder is not None
        stem = str(self.folder / url_path(url))
        return next((path for suffix in SUFFIXES if (path := Path(stem + suffix)).is_file()), None)

    def _by_name(self, origin: Origin, name: str) -> Path | None:
        assert self.folder is not None
        if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            raise UserError(f"{origin}: the image name {name!r} is no plain file name, and might lie outside {self.folder}.")
        path = self.folder / name
        return (
            path if len(name.encode("utf-8", "surrogatepass")) <= 255 and path.is_file() else None
        )  # 255: file systems' longest

    def _miss(self, origin: Origin, value: str, reason: str) -> None:
        self.missing += 1
        with open(self.listing, "a", encoding="utf-8") as listing:
            listing.write(json.dumps({"document": str(origin), "image": value, "reason": reason}) + "\n")
