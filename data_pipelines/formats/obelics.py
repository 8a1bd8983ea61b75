"""OBELICS and OmniCorpus: rows (parquet, or jsonl) with parallel lists `images` (URL or null) and `texts` (string or null).

The rows hold no pictures. Whoever downloaded them keeps them in a folder by the SHA-256 of their URL (store.py).
Source: Laurençon et al. 2023, OBELICS (arXiv 2306.16527); Li et al. 2024, OmniCorpus (arXiv 2406.08418).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.errors import UserError
from data_pipelines.document import Document, Image, Origin
from data_pipelines.formats.slots import parts_of
from data_pipelines.formats.store import Fetch

COLUMNS = ("images", "texts")


def read_row(row: Mapping[str, Any], origin: Origin, fetch: Fetch) -> Document:
    """An image that `fetch` does not find (None) is left out; it is `fetch` that counts it."""

    def picture(slot: int, url: Any) -> Image | None:
        if not isinstance(url, str):
            raise UserError(f"{origin}: slot {slot} of 'images' must hold a URL, and holds {url!r}.")
        return fetch(origin, "url", url)

    return Document(parts_of(row, origin, picture), origin)
