"""The interleaved pages of the starter corpus: charts, countries, food, chains of captions, questions, and names to be bound.

Each function yields pages made of the pictures it is given, all of one split; an image is always directly followed by its text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from data_pipelines.corpora.binding import augmented, naming_page
from data_pipelines.corpora.building import Page, choice, demonstration_question, digest, generator, sample
from data_pipelines.corpora.flags import Country
from data_pipelines.corpora.pictures import Picture
from data_pipelines.corpora.questions import ask

if TYPE_CHECKING:
    import numpy

LONGEST_ABOUT = 110
"""Characters of prose after a name, so that a page of eight pictures stays within some 400 tokens."""


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST_ABOUT else text[:LONGEST_ABOUT].rsplit(" ", 1)[0].rstrip(",;:") + " ..."


def entry(picture: Picture) -> str:
    """What a chart says of a picture: its name, then prose as it is or a gloss made a sentence."""
    if picture.facts.get("country"):
        return f"{picture.name}. {picture.about}\n"
    about = shortened(picture.about)
    return f"{picture.name}: {about}.\n" if about else f"{picture.name}.\n"


def chunks(items: Sequence[Picture], rng: numpy.random.Generator, smallest: int, largest: int) -> Iterator[list[Picture]]:
    """Cut into pieces of a random size; a remainder smaller than `smallest` is left out."""
    start = 0
    while len(items) - start >= smallest:
        size = min(int(rng.integers(smallest, largest + 1)), len(items) - start)
        yield list(items[start : start + size])
        start += size


def charts(pictures: Sequence[Picture], seed: int, passes: int, smallest: int = 4) -> Iterator[Page]:
    """A subgroup of the emoji in one style, or in mixed styles, each with its meaning or its keywords."""
    emoji = [p for p in pictures if p.domain == "emoji" and p.subgroup and not {"tone", "country"} & set(p.facts)]
    for number in range(passes):
        topics: dict[tuple[str, str], list[Picture]] = defaultdict(list)
        for picture in emoji:
            rng = generator(seed, "chart style", number, picture.id)
            topics[picture.subgroup, picture.style if rng.random() < 0.6 else "mixed"].append(picture)
        for (subgroup, style), members in sorted(topics.items()):
            rng = generator(seed, "chart", number, subgroup, style)
            title = subgroup.replace("-", " ")
            lead = choice(
                rng, [f"A chart of {title}.\n", f"{title.capitalize()}:\n", f"Some pictures of {title}, with what they mean.\n"]
            )
            for chosen in chunks(sample(rng, members, len(members)), rng, smallest, 8):
                page = Page().add(lead)
                for picture in chosen:
                    page.add(picture.image, entry(picture))
                yield page


def countries(pictures: Sequence[Picture], known: Mapping[str, Country], seed: int, passes: int = 4) -> Iterator[Page]:
    """The flags of a region with facts about each country; every pass shows each country once, in one of its styles."""
    drawn: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        if code := picture.facts.get("code"):
            drawn[code].append(picture)
    for number in range(passes):
        regions: dict[str, list[Picture]] = defaultdict(list)
        for code, styles in sorted(drawn.items()):
            regions[known[code].subregion].append(styles[(digest(seed, "flag style", code) + number) % len(styles)])
        for region, flags in sorted(regions.items()):
            rng = generator(seed, "country page", number, region)
            lead = choice(rng, [f"Countries of {region}.\n", f"{region}: its flags and capitals.\n", f"A page about {region}.\n"])
            for chosen in chunks(sample(rng, flags, len(flags)), rng, 2, 5):
                page = Page().add(lead)
                for picture in chosen:
                    page.add(picture.image, f"{picture.facts['country']}. {known[picture.facts['code']].prose()}\n")
                yield page


def foods(pictures: Sequence[Picture], seed: int, passes: int = 2) -> Iterator[Page]:
    """Food of one group, each with its kind and scientific name."""
    groups: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        if picture.domain == "food":
            groups[picture.subgroup].append(picture)
    for number in range(passes):
        for group, members in sorted(groups.items()):
            rng = generator(seed, "food page", number, group)
            for chosen in chunks(sample(rng, members, len(members)), rng, 3, 7):
                page = Page().add(choice(rng, [f"{group} of India.\n", f"Food of India: {group.lower()}.\n"]))
                for picture in chosen:
                    page.add(picture.image, entry(picture))
                yield page


def chains(pictures: Sequence[Picture], seed: int, count: int) -> Iterator[Page]:
    """Several pictures each followed by its caption: the form of few-shot captioning."""
    for number in range(count):
        rng = generator(seed, "chain", number)
        page = Page()
        for picture in sample(rng, pictures, int(rng.integers(3, 10))):
            page.add(picture.image, picture.name + "\n")
        yield page


def question_pages(pictures: Sequence[Picture], seed: int, count: int) -> Iterator[Page]:
    """Several pictures each followed by a question and its answer: the form of few-shot VQA."""
    for number in range(count):
        rng = generator(seed, "question page", number)
        page, asked = Page(), int(rng.integers(3, 9))
        for picture in sample(rng, pictures, 3 * asked):
            if asked and (questions := ask(picture, rng, 1)):
                page.add(picture.image, demonstration_question(questions[0].text, questions[0].answer))
                asked -= 1
        yield page


def shape_question_pages(
    images: Mapping[int, bytes], questions: Sequence[tuple[str, str, int]], seed: int, count: int
) -> Iterator[Page]:
    """The same form with easy-VQA's training questions."""
    for number in range(count):
        rng = generator(seed, "shape question page", number)
        page = Page()
        for question, answer, image in sample(rng, questions, int(rng.integers(4, 9))):
            page.add(images[image], demonstration_question(question, answer))
        yield page


def naming_pages(pictures: Sequence[Picture], names: Sequence[str], seed: int, count: int, quality: int) -> Iterator[Page]:
    """Two or three concepts under made-up names, each shown three or four times in its several pictures, lightly varied."""
    concepts = by_concept(pictures)
    for number in range(count):
        rng = generator(seed, "naming page", number)
        size = 2 if rng.random() < 0.75 else 3
        chosen = sample(rng, concepts, size)
        draw = [lambda c=c, rng=rng: augmented(choice(rng, c).image, rng, quality) for c in chosen]
        yield naming_page(rng, sample(rng, names, size), draw, 5 - int(rng.integers(1, 3)) if size == 2 else 3)


def by_concept(pictures: Sequence[Picture], styles: int = 2) -> list[list[Picture]]:
    """Emoji grouped by concept, in a fixed order; concepts drawn in fewer than `styles` styles are left out.

    One picture a style and concept, so that all show the same person in the same skin tone.
    """
    concepts: dict[str, dict[str, Picture]] = defaultdict(dict)
    for picture in pictures:
        if picture.domain == "emoji" and "tone" not in picture.facts:
            concepts[picture.concept].setdefault(picture.style, picture)
    return [list(group.values()) for _, group in sorted(concepts.items()) if len(group) >= styles]
