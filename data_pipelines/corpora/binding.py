"""Fast concept binding: pictures called by made-up names, learnt from the demonstrations alone.

Training pages and evaluation episodes have one form, `{image}This is a blippo` per line, but no name and no evaluation picture in
common: what training can teach is the skill of binding, not the answer. (The task is Tsimpoukelli et al., "Multimodal few-shot
learning with frozen language models", 2021, section 4.2.)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Container, Sequence
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from data_pipelines.corpora.building import Page, demonstration_name, digest, sample, webp

if TYPE_CHECKING:
    import numpy

ONSETS = (
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "z",
    "bl",
    "dr",
    "fl",
    "gr",
    "kl",
    "pl",
    "tr",
    "zw",
)
VOWELS = ("a", "e", "i", "o", "u")
ENDINGS = ("ppo", "ndo", "vi", "sko", "mbu", "lu", "zif", "ket", "dap", "tha")
WORDS = frozenset({"basket", "kendo", "lulu", "rondo", "zulu", "bondo", "kevi", "nevi", "tandap"})
"""Real words these parts happen to make."""
SHOWN = 4
"""Demonstrations of each of the two names in an episode; any even prefix of them is balanced too."""


@lru_cache(maxsize=1)
def _all_names() -> tuple[list[str], list[str]]:
    names = sorted({"".join(parts) for parts in product(ONSETS, VOWELS, ENDINGS)} - WORDS)
    train = [name for name in names if digest("made-up names", name) % 5 > 0]
    return train, [name for name in names if digest("made-up names", name) % 5 == 0]


def names_for(split: str, avoid: Container[str] = ()) -> list[str]:
    """The made-up names of "train" or of "query"; the two lists are disjoint. `avoid`: words that exist."""
    train, query = _all_names()
    return [name for name in (train if split == "train" else query) if name not in avoid]


def augmented(image: bytes, rng: numpy.random.Generator, quality: int) -> bytes:
    """A light variation (mirrored or not, turned up to 12 degrees, 80-100 % of its size), so that pixels alone do not match."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(image)) as opened:
        picture = opened.convert("RGB")
    size = picture.width
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    picture = picture.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC, fillcolor="white")
    smaller = round(size * float(rng.uniform(0.8, 1.0)))
    canvas = Image.new("RGB", (size, size), "white")
    place = tuple(int(rng.integers(size - smaller + 1)) for _ in range(2))
    canvas.paste(picture.resize((smaller, smaller), Image.Resampling.BICUBIC), (place[0], place[1]))
    return webp(canvas, quality)


def naming_page(rng: numpy.random.Generator, names: Sequence[str], draw: Sequence[Callable[[], bytes]], shown: int) -> Page:
    """`shown` pictures of each concept, shuffled, each followed by its made-up name; `draw[i]()` gives a picture of concept i."""
    page = Page()
    order = rng.permutation([i for i in range(len(names)) for _ in range(shown)])
    for i in order:
        page.add(draw[i](), demonstration_name(names[i]))
    return page


def episode(
    rng: numpy.random.Generator,
    number: int,
    names: Sequence[str],
    draw: Sequence[Callable[[], bytes]],
    query: Sequence[tuple[str, bytes]],
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """One two-way episode -> (json, images).

    `draw[i]()` gives a demonstration picture of concept i, `query[i]` its (id, picture) to ask about. Demonstrations come in
    pairs, one of each concept in random order, so the first 2, 4, 6 or 8 are balanced.
    """
    chosen = sample(rng, names, 2)
    images: dict[str, bytes] = {}
    demonstrations = []
    for _ in range(SHOWN):
        for i in rng.permutation(2):
            member = f"{len(images):03d}.webp"
            images[member] = draw[i]()
            demonstrations.append({"image": member, "name": chosen[i]})
    asked = int(rng.integers(2))
    image_id, images["q.webp"] = query[asked]
    described = {
        "id": f"binding-{number:05d}",
        "image_id": image_id,
        "names": chosen,
        "answer": chosen[asked],
        "demonstrations": demonstrations,
        "query": "q.webp",
    }
    return described, images
