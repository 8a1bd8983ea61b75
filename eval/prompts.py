"""Prompts: templates as data, and the one function that fills them.

    prompt = (query + answer) of each demonstration, then query of the item

`mm1` are the paper's wordings; `plain` are those of the suite's own corpora, whose pictures are not photos and whose training
pages say `{image}{caption}`, `{image}Question: ... Short answer: ...` and `{image}This is a ...`. `openflamingo` are those of
OpenFlamingo's evaluation code (Awadalla et al. 2023): no space after a colon, and "Output:" for captions and class names alike.
Its <|endofchunk|>, which this suite's tokenisers lack, is the end of the line here, as in the other sets. What OpenFlamingo
calls 0-shot shows two demonstrations without their images; here 0-shot shows none in any set, so that its published 0-shot
figures are of another protocol.

Fields are filled by position in the template, never searched for in the text, so a caption that contains "{image}" stays text.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from eval.tasks.example import Example

Part = str | bytes | int
"""A span of text, or an image: encoded, or its number in ImageFeatures."""


@dataclass(frozen=True)
class Template:
    """`query`: up to where the model goes on; `answer`: what follows it in a demonstration. Fields: {image}, {question},
    {answer}."""

    query: str
    answer: str


_QUESTION = Template("{image}Question: {question} Short answer:", " {answer}\n")
_NAME = Template("{image}This is a", " {answer}\n")

PROMPTS: dict[str, dict[str, Template]] = {
    "mm1": {"captioning": Template("{image}A photo of", " {answer}\n"), "vqa": _QUESTION, "binding": _NAME},
    "openflamingo": {
        "captioning": Template("{image}Output:", "{answer}\n"),
        "vqa": Template("{image}Question:{question} Short answer:", "{answer}\n"),
        "binding": Template("{image}Output:", "{answer}\n"),
    },
    "plain": {"captioning": Template("{image}", "{answer}\n"), "vqa": _QUESTION, "binding": _NAME},
}


def build_prompt(
    template: Template, demonstrations: Sequence[Example], query: Example, *, with_images: bool = True
) -> list[Part]:
    """Parts in reading order; neighbouring text spans are one part, as they are in a training document."""
    parts: list[Part] = []
    for example in demonstrations:
        _fill(parts, template.query, example)
        _fill(parts, template.answer, example)
    _fill(parts, template.query, query)
    images = sum(not isinstance(part, str) for part in parts)
    assert images == len(demonstrations) + 1, f"{images} image marks for {len(demonstrations) + 1} images"
    if with_images:
        return parts
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, str):
            _append(merged, part)
    return merged


def options(template: Template, names: Sequence[str]) -> tuple[str, ...]:
    """How each name would stand after the query, without the line's end: what binding compares."""
    return tuple(template.answer.format(answer=name).rstrip("\n") for name in names)


def _fill(parts: list[Part], template: str, example: Example) -> None:
    for literal, field, _, _ in string.Formatter().parse(template):
        _append(parts, literal)
        if field == "image":
            parts.append(example.image if example.number is None else example.number)
        elif field == "question":
            _append(parts, example.question or "")
        elif field == "answer":
            _append(parts, example.shown_answer.strip())  # a reference that ends its line ends no demonstration's


def _append(parts: list[Part], text: str) -> None:
    last = parts[-1] if parts else None
    if isinstance(last, str):
        parts[-1] = last + text
    elif text:
        parts.append(text)
