"""Scenes of one to four coloured shapes: what is in them, how they are said, and how they are drawn.

A scene is plain data (`Thing`s with places); its captions and questions are computed from that data, and so are always true.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from data_pipelines.corpora.building import choice, webp

if TYPE_CHECKING:
    import numpy
    from PIL import Image

COLOURS = {
    "red": (220, 38, 38),
    "orange": (245, 140, 20),
    "yellow": (250, 215, 40),
    "green": (34, 150, 60),
    "blue": (37, 80, 220),
    "purple": (130, 50, 170),
    "pink": (250, 130, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "pentagon", "ring", "cross", "heart")
SIZES = {"small": 0.6, "large": 1.0}
TEXTURES = ("solid", "striped", "dotted", "checkered")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OVERSAMPLING = 3

Pair = tuple[str, str]
"""(colour, shape): the unit of the splits."""


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    size: str = "large"
    texture: str = "solid"
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.3
    """Place and extent as shares of the picture's side."""

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape

    def noun(self, *, size: bool = False, texture: bool = False, plural: bool = False) -> str:
        """ "large red striped circle"."""
        words = [self.size if size else "", self.colour, self.texture if texture and self.texture != "solid" else ""]
        shape = ("crosse" if self.shape == "cross" and plural else self.shape) + ("s" if plural else "")
        return " ".join([word for word in words if word] + [shape])


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    relation: str = ""
    """Of the first thing to the second: one of RELATIONS or "inside"; "" if nothing is said of places."""

    def caption(self, *, size: bool = True, texture: bool = True) -> str:
        if self.relation:
            first, second = (a(thing.noun(size=size, texture=texture)) for thing in self.things)
            return f"{first} {self.relation} {second}"
        counts: dict[str, int] = {}
        examples: dict[str, Thing] = {}
        for thing in self.things:
            noun = thing.noun(size=size, texture=texture)
            counts[noun] = counts.get(noun, 0) + 1
            examples[noun] = thing
        said = [
            a(n) if k == 1 else f"{NUMBERS[k]} {examples[n].noun(size=size, texture=texture, plural=True)}"
            for n, k in counts.items()
        ]
        return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"

    def references(self) -> list[str]:
        """The same scene said in full, without textures, and by colour and shape alone."""
        said = [self.caption(), self.caption(texture=False), self.caption(size=False), self.caption(size=False, texture=False)]
        return list(dict.fromkeys(said))

    @property
    def pairs(self) -> set[Pair]:
        return {thing.pair for thing in self.things}


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# ------------------------------------------------------------------------------------------------------------- sampling


def thing(rng: numpy.random.Generator, pairs: Sequence[Pair]) -> Thing:
    colour, shape = pairs[int(rng.integers(len(pairs)))]
    texture = "solid" if rng.random() < 0.5 else choice(rng, TEXTURES[1:])
    return Thing(colour, shape, choice(rng, list(SIZES)), texture)


def alone(rng: numpy.random.Generator, thing: Thing) -> Scene:
    """One thing somewhere in the picture."""
    radius = 0.34 * SIZES[thing.size] * float(rng.uniform(0.9, 1.1))
    x, y = (float(rng.uniform(radius + 0.04, 0.96 - radius)) for _ in range(2))
    return Scene((replace(thing, x=x, y=y, radius=radius),))


def scene(rng: numpy.random.Generator, pairs: Sequence[Pair], must: Sequence[Pair] = ()) -> Scene:
    """A random scene of things from `pairs`; with `must`, its first thing is one of those."""
    first = thing(rng, must or pairs)
    kind = rng.random()
    if kind < 0.35:
        return alone(rng, first)
    others = [pair for pair in pairs if pair[0] != first.colour and pair[1] != first.shape]
    second = thing(rng, others)
    if kind < 0.6:
        return beside(rng, first, second, choice(rng, RELATIONS))
    if kind < 0.75:
        holders = [pair for pair in others if pair[1] in ("circle", "square", "heart", "pentagon") and pair[0] != first.colour]
        if holders:
            outer = replace(thing(rng, holders), size="large", texture="solid", radius=0.44)
            return Scene((replace(first, size="small", radius=0.15, x=0.5, y=0.5), outer), "inside")
    return several(rng, first, second)


def beside(rng: numpy.random.Generator, first: Thing, second: Thing, relation: str) -> Scene:
    placed = []
    for number, one in enumerate((first, second)):
        before = (number == 0) == (relation in ("left of", "above"))
        along = (0.27 if before else 0.73) + float(rng.uniform(-0.03, 0.03))
        across = 0.5 + float(rng.uniform(-0.06, 0.06))  # never so far that another relation would hold as well
        x, y = (along, across) if relation in ("left of", "right of") else (across, along)
        placed.append(replace(one, x=x, y=y, radius=0.2 * SIZES[one.size]))
    return Scene(tuple(placed), relation)


def several(rng: numpy.random.Generator, first: Thing, second: Thing) -> Scene:
    """Three or four things in the quarters of the picture: some alike, one other."""
    count = int(rng.integers(3, 5))
    things = [*[first] * (count - 1), second] if rng.random() < 0.6 else [first, *[second] * (count - 1)]
    quarters = [(x, y) for x in (0.27, 0.73) for y in (0.27, 0.73)]
    chosen = [quarters[i] for i in rng.permutation(4)[:count]]
    return Scene(
        tuple(
            replace(
                one, x=x + float(rng.uniform(-0.03, 0.03)), y=y + float(rng.uniform(-0.03, 0.03)), radius=0.19 * SIZES[one.size]
            )
            for one, (x, y) in zip(things, chosen, strict=True)
        )
    )


# ------------------------------------------------------------------------------------------------------------ questions


def questions(rng: numpy.random.Generator, scene: Scene, pairs: Sequence[Pair]) -> list[tuple[str, str, str]]:
    """(question, answer, type) for what the scene makes unambiguous, in random order; only `pairs` are ever named."""
    asked = [("how many shapes are there?", str(len(scene.things)), "count")]
    distinct = list({one.pair: one for one in scene.things}.values())
    for one in distinct:
        if sum(other.shape == one.shape for other in distinct) == 1:
            asked.append((f"what color is the {one.shape}?", one.colour, "color"))
            if sum(other.shape == one.shape for other in scene.things) == 1:
                asked.append((f"is the {one.shape} solid, striped, dotted or checkered?", one.texture, "texture"))
        if sum(other.colour == one.colour for other in distinct) == 1:
            asked.append((f"what is the {one.colour} shape?", one.shape, "shape"))
    present = choice(rng, distinct)
    absent = [pair for pair in pairs if pair not in scene.pairs and (pair[0] == present.colour or pair[1] == present.shape)]
    if rng.random() < 0.5 or not absent:
        asked.append((f"is there {a(present.noun())}?", "yes", "yes/no"))
    else:
        asked.append((f"is there {a(' '.join(choice(rng, absent)))}?", "no", "yes/no"))
    if scene.relation in RELATIONS:
        first, second = (f"{one.colour} {one.shape}" for one in scene.things)
        true = rng.random() < 0.5
        claimed = scene.relation if true else OPPOSITE[scene.relation]
        asked.append((f"is the {first} {claimed} the {second}?", "yes" if true else "no", "relation"))
        asked.append((f"what shape is {scene.relation} the {second}?", scene.things[0].shape, "relation"))
    return [asked[i] for i in rng.permutation(len(asked))]


# -------------------------------------------------------------------------------------------------------------- drawing


def draw(scene: Scene, size: int, quality: int) -> bytes:
    """WebP of `size` x `size`; drawn larger and reduced, so that edges are smooth."""
    from PIL import Image

    side = size * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), "white")
    for one in sorted(scene.things, key=lambda t: -t.radius):  # the outer one first
        canvas.paste(texture(one, side), mask=outline(one, side))
    return webp(canvas.resize((size, size), Image.Resampling.BOX), quality)


def outline(one: Thing, side: int) -> Image.Image:
    """The shape as a mask."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    x, y, r = one.x * side, one.y * side, one.radius * side

    def polygon(points: Sequence[tuple[float, float]]) -> None:
        pen.polygon([(x + r * dx, y + r * dy) for dx, dy in points], fill=255)

    def corners(count: int, radii: Sequence[float] = (1.0,)) -> list[tuple[float, float]]:
        angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
        return [(radii[i % len(radii)] * math.cos(t), radii[i % len(radii)] * math.sin(t)) for i, t in enumerate(angles)]

    if one.shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if one.shape == "ring":
            pen.ellipse((x - 0.5 * r, y - 0.5 * r, x + 0.5 * r, y + 0.5 * r), fill=0)
    elif one.shape == "square":
        polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])
    elif one.shape == "cross":
        pen.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=255)
        pen.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=255)
    elif one.shape == "heart":
        turns = [2 * math.pi * i / 60 for i in range(60)]
        heart = [
            (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) for t in turns
        ]
        polygon([(hx / 17, -hy / 17) for hx, hy in heart])
    elif one.shape == "star":
        polygon(corners(10, (1.0, 0.42)))
    else:
        polygon(corners({"triangle": 3, "pentagon": 5}[one.shape]))
    return mask


def texture(one: Thing, side: int) -> Image.Image:
    """The colour, or the colour with its paler tint in stripes, dots or checks."""
    import numpy
    from PIL import Image

    colour = numpy.array(COLOURS[one.colour], dtype=numpy.float32)
    if one.texture == "solid":
        return Image.new("RGB", (side, side), COLOURS[one.colour])
    period = max(4, round(0.11 * side))
    rows, columns = numpy.mgrid[0:side, 0:side]
    if one.texture == "striped":
        tinted = (rows // (period // 2)) % 2 == 1
    elif one.texture == "dotted":
        tinted = (rows % period - period / 2) ** 2 + (columns % period - period / 2) ** 2 < (0.3 * period) ** 2
    else:
        tinted = ((rows // (period // 2)) + (columns // (period // 2))) % 2 == 1
    pale = colour * 0.25 + 255 * 0.75
    return Image.fromarray(numpy.where(tinted[..., None], pale, colour).astype(numpy.uint8))
