"""Questions about a picture whose answers its pixels, or its collection's own tables, give."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipelines.corpora.building import choice
from data_pipelines.corpora.pictures import Picture

if TYPE_CHECKING:
    import numpy

KINDS_OF_THING = {
    "animal": "animal-",
    "plant": "plant-",
    "face": "face-",
    "hand": "hand",
    "person": "person",
    "vehicle": "transport-",
    "building": "place-building",
    "clothing": "clothing",
    "tool": "tool",
    "musical instrument": "musical-instrument",
    "sport": "sport",
    "arrow": "arrow",
    "clock": "time",
    "food": "food-",
    "drink": "drink",
    "heart": "heart",
}
"""What a picture shows, by how its subgroup begins; pictures of other subgroups are not asked about."""

ROADSIDE = re.compile(
    r"sign|construction|light|wheel$|pump|stop|motorway|track|rail|station|drum|anchor|seat|buoy|symbol|button|map"
)
"""In the transport subgroups, but no vehicle."""

NOT_EXCLUSIVE = (
    {"food", "drink"},
    {"food", "plant"},
    {"food", "animal"},
    {"person", "sport"},
    {"person", "hand"},
    {"face", "person"},
    {"face", "animal"},
)
"""Kinds of which a picture can be both: about these the other one is not denied."""

CLEARLY, HARDLY = 0.12, 0.004
"""A colour counts as seen above the one share of the drawing, as absent below the other; in between nothing is asked."""


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    kind: str


def kind_of_thing(picture: Picture) -> str:
    if picture.domain == "food":
        return "food"
    if picture.domain == "flag" or picture.subgroup == "country-flag":
        return "flag"
    for kind, beginning in KINDS_OF_THING.items():
        if picture.subgroup.startswith(beginning):
            return "" if kind == "vehicle" and ROADSIDE.search(picture.name) else kind
    return ""


def article(noun: str) -> str:
    if noun in ("clothing", "food"):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _kind(picture: Picture, rng: numpy.random.Generator) -> Question | None:
    kind = kind_of_thing(picture)
    return Question("what does the picture show?", kind, "kind") if kind else None


def _is_kind(picture: Picture, rng: numpy.random.Generator) -> Question | None:
    kind = kind_of_thing(picture)
    if not kind:
        return None
    yes = rng.random() < 0.5
    others = [other for other in [*KINDS_OF_THING, "flag"] if other != kind and {other, kind} not in NOT_EXCLUSIVE]
    asked = kind if yes else choice(rng, others)
    return Question(f"is this {article(asked)}?", "yes" if yes else "no", "yes/no kind")


def _colour(picture: Picture, rng: numpy.random.Generator) -> Question | None:
    seen = [colour for colour, share in picture.colours.items() if share > CLEARLY]
    absent = [colour for colour, share in picture.colours.items() if share < HARDLY]
    if not (seen and absent):  # asked only where both answers could be, so that neither is the safe one
        return None
    yes = rng.random() < 0.5
    colour = choice(rng, seen if yes else absent)
    return Question(f"is there any {colour} in the picture?", "yes" if yes else "no", "yes/no colour")


def _main_colour(picture: Picture, rng: numpy.random.Generator) -> Question | None:
    ranked = sorted(picture.colours.items(), key=lambda item: -item[1])
    if ranked[0][0] == "black":  # an outline, as often as a colour
        return None
    if ranked[0][1] < 0.5 or ranked[1][1] > 0.2:
        return None
    return Question("what is the main color?", ranked[0][0], "colour")


def _tone(picture: Picture, rng: numpy.random.Generator) -> Question | None:
    tone = picture.facts.get("tone")
    return Question("what skin tone is shown?", tone, "skin tone") if tone else None


def _region(picture: Picture, rng: numpy.random.Generator) -> Question | None:
    region = picture.facts.get("region")
    return Question("in which part of the world is this country?", region.lower(), "region") if region else None


def _country(picture: Picture, rng: numpy.random.Generator) -> Question | None:
    country = picture.facts.get("country")
    return Question("which country's flag is this?", country.lower(), "country") if country else None


def _food_group(picture: Picture, rng: numpy.random.Generator) -> Question | None:
    group = picture.facts.get("food group")
    return Question("which food group is this?", group, "food group") if group else None


def _vegetarian(picture: Picture, rng: numpy.random.Generator) -> Question | None:
    vegetarian = picture.facts.get("vegetarian")
    return None if vegetarian is None else Question("is this food vegetarian?", "yes" if vegetarian else "no", "yes/no diet")


ASKERS: tuple[Callable[[Picture, numpy.random.Generator], Question | None], ...] = (
    _kind,
    _is_kind,
    _colour,
    _main_colour,
    _tone,
    _region,
    _country,
    _food_group,
    _vegetarian,
)


def ask(picture: Picture, rng: numpy.random.Generator, count: int, *, new_concept: bool = False) -> list[Question]:
    """Up to `count` different questions about a picture; of a new concept, none that only knowing its name could answer."""
    possible = [question for asker in ASKERS if (question := asker(picture, rng)) is not None]
    if new_concept:
        possible = [question for question in possible if question.kind != "country"]
    return [possible[i] for i in rng.permutation(len(possible))[:count]]
