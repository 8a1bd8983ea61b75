"""What packed sequences hold, read back from what is handed to the model, and counted: for data_pipelines.inspect.

Ids, labels, document ids and decoded images are the source, not the documents they were made of: what packing or tokenising did
to those shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_pipelines.batch import IGNORE

if TYPE_CHECKING:
    import PIL.Image
    import torch

    from data_pipelines.lanes import LaneSequence

PALETTE = ("#4c78a8", "#e6a23c", "#54a24b", "#b279a2", "#d67195", "#3aa6a0", "#9d755d", "#7f8fa6")
"""A document's colour, by its number in the sequence: on the page and on the sheet."""


def colour(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def picture(pixels: torch.Tensor) -> PIL.Image.Image:
    """uint8 (3, H, H) -> the picture the model gets, pixel for pixel."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


# ------------------------------------------------------------------------------------------------------------------- views


@dataclass(frozen=True)
class Text:
    """A run of text. `unscored`: no position is asked to predict it."""

    text: str
    unscored: bool


@dataclass(frozen=True)
class Picture:
    name: str
    pixels: torch.Tensor
    """uint8 (3, H, H)"""
    start: int
    tokens: int


@dataclass(frozen=True)
class End:
    """The end-of-text token."""


@dataclass(frozen=True)
class DocumentView:
    """Tokens [start, stop) of a sequence: what attends to each other. More than one origin only without isolation."""

    origins: list[str]
    start: int
    stop: int
    parts: list[Text | Picture | End]

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]


@dataclass(frozen=True)
class View:
    step: int
    slot: int
    source: str
    length: int
    loss_tokens: int
    documents: list[DocumentView]

    @property
    def used(self) -> int:
        return self.documents[-1].stop if self.documents else 0


def view(item: LaneSequence, pixels: torch.Tensor, tokenizer: Any, image_tokens: int) -> View:
    """A sequence taken apart again; `pixels` uint8 (n, 3, H, H)."""
    s = item.sequence
    ids, owners = s.input_ids.tolist(), s.document_ids.tolist()
    unscored = [True, *(label == IGNORE for label in s.labels[:-1].tolist())]  # the label at t is the token at t + 1
    pictures = {
        start: Picture(image.name, tensor, start, image_tokens)
        for start, image, tensor in zip(s.image_starts, s.images, pixels, strict=True)
    }
    documents = []
    for number in sorted(set(owners) - {0}):
        start = owners.index(number)
        stop = start + owners.count(number)
        origins = [str(origin) for origin in (s.origins if max(owners) == 1 else [s.origins[number - 1]])]
        parts: list[Text | Picture | End] = []
        at = start
        while at < stop:
            if at in pictures:
                parts.append(pictures[at])
                at += image_tokens
            elif ids[at] == tokenizer.eos_token_id:
                parts.append(End())
                at += 1
            else:
                end = at + 1
                while end < stop and end not in pictures and ids[end] != tokenizer.eos_token_id:
                    end += 1
                parts += runs(ids[at:end], unscored[at:end], tokenizer)
                at = end
        documents.append(DocumentView(origins, start, stop, parts))
    return View(item.step, item.slot, item.source, len(ids), int((s.labels != IGNORE).sum()), documents)


def runs(ids: list[int], unscored: list[bool], tokenizer: Any) -> list[Text]:
    """Text cut where its loss begins or ends, but never inside a character that several tokens share."""
    found: list[Text] = []
    start = 0
    while start < len(ids):
        stop = start + 1
        while True:
            while stop < len(ids) and unscored[stop] == unscored[start]:
                stop += 1
            text = tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)
            if stop == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}"):
                break
            stop += 1
        found.append(Text(text, unscored[start]))
        start = stop
    return found


# ----------------------------------------------------------------------------------------------------------------- tallies


@dataclass
class Tally:
    """What the sequences of one source hold together. Of a sequence that several sources share (data.unit=document or token),
    each has as much of the sequence and of its padding as it has of its tokens."""

    source: str
    kind: str
    target: float
    sequences: float = 0
    documents: int = 0
    images: int = 0
    most_images: int = 0
    tokens: float = 0
    """Padding included."""
    image_tokens: int = 0
    padding: float = 0
    loss_tokens: int = 0

    def add(self, item: LaneSequence, number: int, image_tokens: int) -> None:
        """`number`: of this source in the stream."""
        s = item.sequence
        own, used = int((s.sources == number).sum()), int((s.sources >= 0).sum())
        if not own and item.source != self.source:
            return
        weight = own / used if used else 1.0
        images = sum(s.sources[start] == number for start in s.image_starts)
        self.sequences += weight
        self.documents += sum(origin.source == self.source for origin in s.origins)
        self.images += images
        self.most_images = max(self.most_images, images)
        self.image_tokens += image_tokens * images
        self.padding += weight * (len(s.input_ids) - used)
        self.tokens += own + weight * (len(s.input_ids) - used)
        self.loss_tokens += int(((s.labels != IGNORE) & (s.sources == number)).sum())

    def units(self, unit: str) -> float:
        """How much of it there is, in the unit of the ratios."""
        return {"sequence": self.sequences, "document": self.documents, "token": self.tokens - self.padding}[unit]
