"""What keeps the full corpus's splits apart: captions compared as phrases, pictures as thumbnails.

    held out: the starter's queries and validation, stamps by caption, pages of manuals      training: everything else, unless
    its caption names what is held out as new, or its thumbnail is nearly that of a held-out picture

The starter's own splits stay as they are, so that its tasks are the same in both corpora: of two look-alikes, one in the
starter's training and one held out here, the held-out one goes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from data_pipelines.corpora.building import unit
from data_pipelines.corpora.pictures import DROPPED, KNOWN, NEW, TRAIN, VALIDATION, Picture, drop_near_duplicates

STAMPS = "query_stamps"
"""The split of the stamps whose caption is held out for the task captions_stamps."""
SMALL_WORDS = frozenset({"a", "an", "the", "of", "s"})


def phrase(caption: str) -> tuple[str, ...]:
    """A caption's words in the form in which two are compared: lower case, no articles, no plural s."""
    words = re.findall(r"[^\W_]+", caption.lower())
    return tuple(word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words if word not in SMALL_WORDS)


class Phrases:
    """A set of phrases, and whether a caption contains any of them as neighbouring words."""

    def __init__(self, captions: Iterable[str]) -> None:
        self.phrases = {phrase(caption) for caption in captions} - {()}
        self.longest = max(map(len, self.phrases), default=0)

    def named_in(self, caption: str) -> bool:
        words = phrase(caption)
        return any(
            words[start : start + length] in self.phrases
            for length in range(1, self.longest + 1)
            for start in range(len(words) - length + 1)
        )


def new_names(pictures: Iterable[Picture]) -> Phrases:
    """What the starter's new concepts are called: without skin tones and other variants; of a flag, its country too."""
    names = [reference.split(",")[0] for one in pictures if one.split == NEW for reference in one.references]
    return Phrases([*names, *(name.removeprefix("flag of ") for name in names)])


def lookalikes(candidates: Sequence[Picture], others: Sequence[Picture]) -> list[bool]:
    """Of each candidate, whether its thumbnail is nearly that of one of `others`."""
    probes = [_as(one, TRAIN) for one in candidates]
    drop_near_duplicates([*probes, *(_as(one, NEW) for one in others)])
    return [probe.split == DROPPED for probe in probes]


def _as(one: Picture, split: str) -> Picture:
    return Picture(one.id, one.style, one.concept, one.name, [], b"", thumbnail=one.thumbnail, split=split)


def held_out(pictures: Iterable[Picture]) -> list[Picture]:
    return [one for one in pictures if one.split in (KNOWN, NEW, VALIDATION, STAMPS)]


def assign_captions(
    pictures: Sequence[Picture], seed: int, stamps: float, validation: float, trained: Sequence[Picture] = ()
) -> None:
    """By caption: all pictures that one phrase describes go to one side, whatever collections they are from.

    What one of `trained` (the starter's) is called is held out for no task: the starter shows it, though in another style.
    """
    of_stamps = {phrase(one.name) for one in pictures if one.style == "tuxpaint"} - {phrase(one.name) for one in trained}
    for one in pictures:
        words = phrase(one.name)
        if words in of_stamps and unit(seed, "stamp caption held out", *words) < stamps:
            one.split = STAMPS if one.style == "tuxpaint" else DROPPED
        elif unit(seed, "caption validation", *words) < validation:
            one.split = VALIDATION


def part(pictures: Sequence[Picture], starter: Sequence[Picture], figures: Sequence[Picture]) -> Counter[str]:
    """Drop what would leak of the Debian pictures and of the manuals' figures (TRAIN or VALIDATION); returns how many, and why.

    Order matters: held-out pictures that the starter already trains on go first, then training pictures that look like what is
    still held out.
    """
    count: Counter[str] = Counter()

    def drop(chosen: Sequence[Picture], leaks: Sequence[bool], reason: str) -> None:
        for one, leaking in zip(chosen, leaks, strict=True):
            if leaking:
                one.split = DROPPED
                count[reason] += 1

    of_stamps = Phrases(one.name for one in pictures if one.split == STAMPS)
    new = new_names(starter)
    trained = [one for one in pictures if one.split == TRAIN]
    drop(trained, [new.named_in(one.name) for one in trained], "captions that name a new concept of the starter")
    trained = [one for one in trained if one.split == TRAIN]
    drop(trained, [of_stamps.named_in(one.name) for one in trained], "captions that name a held-out stamp")

    ours = [*held_out(pictures), *held_out(figures)]
    drop(ours, lookalikes(ours, [one for one in starter if one.split == TRAIN]), "held out, but like a training picture")
    everything_held = [*held_out(starter), *held_out(pictures), *held_out(figures)]
    trained = [one for one in pictures if one.split == TRAIN]
    drop(trained, lookalikes(trained, everything_held), "captioned pictures like a held-out one")
    shown = [one for one in figures if one.split == TRAIN]
    drop(shown, lookalikes(shown, everything_held), "figures of manuals like a held-out picture")
    return count
