"""MMC4: sentences in `text_list`, pictures in `image_info`, each with the index of the sentence it was matched to.

    {"text_list": ["A.", "B.", "C."], "image_info": [{"matched_text_index": 1, "image_name": "x.jpg", ...}]}
        ->  "A. " <x.jpg> "B. C."

A picture stands before its sentence; of several at one sentence the order of `image_info` decides. Sentences are joined by one
blank, which stays with the sentence before the picture, as OpenFlamingo writes them. The picture is in the record
(`image_base64`, as OpenFlamingo's tars have it) or a file `image_name` in a folder, as MMC4's own jsonl expects it.
Source: Zhu et al. 2023, Multimodal C4 (arXiv 2304.06939); all matched pictures are used, whatever their `matched_sim`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from configs.errors import UserError
from data_pipelines.document import Document, Image, Origin
from data_pipelines.formats.store import Fetch

COLUMNS = ("text_list", "image_info")


def read(members: Mapping[str, bytes], origin: Origin) -> Document:
    """A tar's sample: one json member whose pictures are inside it."""
    if "json" not in members:
        raise UserError(f"{origin}: an MMC4 sample needs a json member; it has {sorted(members)}.")
    return read_row(json.loads(members["json"]), origin, _nowhere)


def _nowhere(origin: Origin, kind: str, value: str) -> Image | None:
    raise UserError(
        f"{origin}: has no 'image_base64' for {value!r}. Convert it with its folder: corpus=convert corpus.image_store=..."
    )


def read_row(row: Mapping[str, Any], origin: Origin, fetch: Fetch) -> Document:
    sentences, infos = row["text_list"], row["image_info"]
    for key, value in (("text_list", sentences), ("image_info", infos)):
        if not isinstance(value, list):
            raise UserError(f"{origin}: {key!r} must be a list, and is {type(value).__name__}.")
    before: dict[int, list[Image]] = {}
    for number, info in enumerate(infos):
        index = info["matched_text_index"]
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(sentences):
            raise UserError(
                f"{origin}: image_info[{number}].matched_text_index is {index!r}; 'text_list' has {len(sentences)} sentences."
            )
        image = _picture(info, number, origin, fetch)
        if image is not None:
            before.setdefault(index, []).append(image)
    parts: list[str | Image] = []
    for index, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise UserError(f"{origin}: text_list[{index}] must be a string, and is {sentence!r}.")
        spaced = sentence + " " if index + 1 < len(sentences) else sentence
        parts += before.get(index, [])
        if parts and isinstance(parts[-1], str):
            parts[-1] += spaced
        else:
            parts.append(spaced)
    return Document(tuple(parts), origin)


def _picture(info: Mapping[str, Any], number: int, origin: Origin, fetch: Fetch) -> Image | None:
    name, encoded = info.get("image_name"), info.get("image_base64")
    if encoded is not None:
        try:
            return Image(base64.b64decode(encoded, validate=True), name if isinstance(name, str) else f"image_info[{number}]")
        except (binascii.Error, ValueError, TypeError) as error:
            raise UserError(f"{origin}: image_info[{number}].image_base64 is not base64 ({error}).") from error
    if not isinstance(name, str):
        raise UserError(f"{origin}: image_info[{number}] has neither 'image_base64' nor a string 'image_name' (it is {name!r}).")
    return fetch(origin, "name", name)
