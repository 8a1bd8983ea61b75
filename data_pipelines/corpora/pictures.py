"""Picture: one drawing or photograph of a known concept, and how a whole collection of them is rendered and compared.

Every source (emoji styles, flags, food) describes its pictures as Picture before anything is decoded; `render_all` then turns
the archives' bytes into WebP of one size, on several processes, and takes of each a small thumbnail that tells near-duplicates.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from data_pipelines.corpora.building import unit, webp

THUMBNAIL = 16
NEAR_IDENTICAL = 6.0
"""Root mean square difference of two thumbnails, in grey levels of 255, below which they are taken for the same picture."""

TRAIN, VALIDATION, KNOWN, NEW, DROPPED = "train", "val", "query_known", "query_new", "dropped"


@dataclass
class Picture:
    id: str
    style: str
    """Which collection drew it."""
    concept: str
    """What it shows, the same across styles: the unit of the splits."""
    name: str
    """Its caption, in its own collection's words."""
    references: list[str]
    """Every caption that would be right, its own first."""
    source: bytes
    """The file as it lies in the archive: SVG, PNG, WebP or JPEG."""
    domain: str = "emoji"
    group: str = ""
    subgroup: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """What questions can be asked about: skin tone, country, diet ..."""
    about: str = ""
    """A sentence of prose for charts."""
    image: bytes = b""
    thumbnail: bytes = b""
    colours: dict[str, float] = field(default_factory=dict)
    """Share of the non-white pixels that each basic colour has."""
    split: str = TRAIN


# ------------------------------------------------------------------------------------------------------------ rendering


def render(source: bytes, size: int, quality: int) -> tuple[bytes, bytes, dict[str, float]] | None:
    """Encoded picture -> (WebP, thumbnail, colour shares): all of it, centred on a white square. None if it is no picture."""
    import resvg_py
    from PIL import Image, UnidentifiedImageError

    try:
        if b"<svg" in source[:2000]:  # without system fonts: the same pixels on every machine
            source = bytes(resvg_py.svg_to_bytes(svg_string=source.decode(), width=size, skip_system_fonts=True))
        with Image.open(io.BytesIO(source)) as opened:
            picture = opened.convert("RGBA") if opened.mode != "RGB" else opened.copy()
    except (ValueError, OSError, UnidentifiedImageError):
        return None
    scale = size / max(picture.size)
    picture = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS
    )
    square = Image.new("RGB", (size, size), "white")
    corner = ((size - picture.width) // 2, (size - picture.height) // 2)
    square.paste(picture, corner, picture.getchannel("A") if picture.mode == "RGBA" else None)
    thumbnail = square.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).tobytes()
    return webp(square, quality), thumbnail, colour_shares(square.resize((48, 48), Image.Resampling.NEAREST))


def colour_shares(picture: Any) -> dict[str, float]:
    """Share of each basic colour among the pixels that are not white background; hues in between count for none."""
    import numpy

    hsv = numpy.asarray(picture.convert("HSV"), dtype=numpy.int32).reshape(-1, 3)
    hue, saturation, value = hsv[:, 0] * 360 // 255, hsv[:, 1], hsv[:, 2]
    drawn = ~((saturation < 25) & (value > 235))
    total = max(1, int(drawn.sum()))
    vivid = drawn & (saturation > 130) & (value > 110)
    bands = {
        "red": (hue < 12) | (hue > 345),
        "yellow": (hue > 40) & (hue < 65),
        "green": (hue > 85) & (hue < 160),
        "blue": (hue > 190) & (hue < 250),
    }
    shares = {colour: float((vivid & band).sum()) / total for colour, band in bands.items()}
    shares["black"] = float((drawn & (value < 60)).sum()) / total
    return shares


def render_all(pictures: Sequence[Picture], size: int, quality: int, processes: int) -> list[Picture]:
    """Fill in image, thumbnail and colours; pictures that cannot be rendered are left out. The order is kept."""
    from tqdm import tqdm

    work = partial(render, size=size, quality=quality)
    sources = [picture.source for picture in pictures]
    bar = partial(tqdm, total=len(sources), desc="  rendering pictures", unit="picture", leave=False, disable=None)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            results = list(bar(pool.map(work, sources, chunksize=64)))
    else:
        results = list(bar(map(work, sources)))
    rendered = []
    for picture, result in zip(pictures, results, strict=True):
        if result is not None:
            picture.image, picture.thumbnail, picture.colours = result
            picture.source = b""
            rendered.append(picture)
    return rendered


# --------------------------------------------------------------------------------------------------------------- splits


def merge_identical(pictures: Sequence[Picture]) -> list[Picture]:
    """Keep one of several photographs that are the same file under different names, called what the names share.

    IFCT uses one photograph for all parts of an animal: "pork, liver" and "pork, lungs" become "pork".
    """
    first: dict[bytes, Picture] = {}
    kept = []
    for picture in pictures:
        if picture.domain == "food" and picture.image in first:
            same = first[picture.image]
            parts = [name.split(", ") for name in (same.name, picture.name)]
            shared = [a for a, b in zip(*parts, strict=False) if a == b]
            if shared:
                same.name = ", ".join(shared)
                same.references = [same.name]
            continue
        first.setdefault(picture.image, picture)
        kept.append(picture)
    return kept


def join_by_name(pictures: Sequence[Picture]) -> None:
    """Give pictures that share a reference one concept: two collections may code the same thing under different numbers."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for picture in pictures:
        for reference in [picture.name, *picture.references]:
            a, b = (
                root(picture.concept),
                root(f"name:{reference.split(',')[0]}" if picture.domain == "emoji" else f"name:{reference}"),
            )
            if a != b:
                parent[max(a, b)] = min(a, b)
    for picture in pictures:
        picture.concept = root(picture.concept)


def assign_splits(pictures: Sequence[Picture], seed: int, new: float, known: float, validation: float) -> None:
    """Whole concepts to NEW; of other concepts the pictures of one group (a style, or one photograph) to KNOWN or VALIDATION.

    A concept with a single picture group can only be TRAIN or NEW.
    """
    by_concept: dict[str, dict[str, list[Picture]]] = defaultdict(lambda: defaultdict(list))
    for picture in pictures:
        by_concept[picture.concept][picture.id if picture.domain == "food" else picture.style].append(picture)
    several = sum(len(groups) > 1 for groups in by_concept.values()) / max(1, len(by_concept))
    for concept, groups in by_concept.items():
        chosen = sorted(groups)[int(unit(seed, "style held out", concept) * len(groups))]
        u = unit(seed, "concept held out", concept)
        v = unit(seed, "picture held out", concept) * several  # shares are of all concepts, though only some can give a picture
        for group, members in groups.items():
            split = TRAIN
            if u < new:
                split = NEW
            elif len(groups) > 1 and group == chosen:
                split = KNOWN if v < known else VALIDATION if v < known + validation else TRAIN
            for picture in members:
                picture.split = split


def drop_near_duplicates(pictures: Sequence[Picture]) -> int:
    """Take out of TRAIN every picture that looks like a held-out one (a flag that is also another country's, say).

    Returns how many. The rest of the concept stays in training.
    """
    import numpy

    train = [picture for picture in pictures if picture.split == TRAIN]
    held = [picture for picture in pictures if picture.split in (KNOWN, NEW, VALIDATION)]
    if not train or not held:
        return 0

    def matrix(of: list[Picture]) -> numpy.ndarray:
        return numpy.stack([numpy.frombuffer(picture.thumbnail, dtype=numpy.uint8) for picture in of]).astype(numpy.float32)

    held_out = matrix(held)
    dropped = 0
    for start in range(0, len(train), 1024):
        block = train[start : start + 1024]
        known = matrix(block)
        square = (known**2).sum(1)[:, None] + (held_out**2).sum(1)[None] - 2 * known @ held_out.T
        nearest = numpy.sqrt(numpy.maximum(square.min(1), 0) / known.shape[1])
        for picture, distance in zip(block, nearest, strict=True):
            if distance < NEAR_IDENTICAL:
                picture.split = DROPPED
                dropped += 1
    return dropped
