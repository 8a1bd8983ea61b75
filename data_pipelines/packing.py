"""Packing: documents -> fixed-length sequences.

A document's size has two dimensions, tokens and images; a sequence holds at most `seq_len` of the one and `max_images` of the
other. What is too large for an empty sequence is cut, never inside an image, and its pieces go on as documents of their own.

A packer keeps *references* (stream position, first token, last token) of the pieces that wait in open sequences, so that its
state is small and a resumed run reads the same documents again instead of carrying them in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipelines.config import PackingConfig
from data_pipelines.document import Image, Origin

IGNORE = -100


@dataclass(frozen=True)
class EncodedDocument:
    """A document as token ids, with its images still encoded. `starts[i]` is the first token of `images[i]`."""

    ids: list[int]
    starts: list[int]
    images: tuple[Image, ...]
    origin: Origin


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of the document at `position` of a source's stream."""

    position: int
    start: int
    stop: int
    images: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def cut(
    document: EncodedDocument, position: int, config: PackingConfig, image_tokens: int, room: tuple[int, int] | None = None
) -> list[Piece]:
    """Split a document into pieces that each fit into an empty sequence; the first one into `room` (tokens, images) if given."""
    pieces: list[Piece] = []
    start, first_image = 0, 0
    tokens, images = room or (config.seq_len, config.max_images)
    while start < len(document.ids):
        stop = min(start + tokens, len(document.ids))
        last_image = first_image
        while last_image < len(document.starts) and document.starts[last_image] < stop:
            too_many = last_image - first_image >= images
            if too_many or document.starts[last_image] + image_tokens > stop:
                stop = document.starts[last_image]
                break
            last_image += 1
        if stop > start:
            pieces.append(Piece(position, start, stop, last_image - first_image))
        start, first_image = stop, last_image
        tokens, images = config.seq_len, config.max_images
    return pieces


class Packer:
    """Fills sequences of one source for one lane. `read(position)` gives the encoded document at a stream position."""

    def __init__(
        self, config: PackingConfig, image_tokens: int, read: Callable[[int], EncodedDocument], stride: int, first: int
    ) -> None:
        self.config, self.image_tokens, self.read, self.stride = config, image_tokens, read, stride
        self.next = first
        self.open: list[list[Piece]] = []
        self._documents: dict[int, EncodedDocument] = {}

    def state(self) -> dict[str, object]:
        """JSON-able: the next stream position and the pieces that wait."""
        waiting = [[[p.position, p.start, p.stop, p.images] for p in sequence] for sequence in self.open]
        return {"next": self.next, "open": waiting}

    def restore(self, state: dict[str, object]) -> None:
        self.next = state["next"]  # type: ignore[assignment]
        self.open = [[Piece(*piece) for piece in sequence] for sequence in state["open"]]  # type: ignore[attr-defined]
        self._documents = {}

    def document(self, position: int) -> EncodedDocument:
        if position not in self._documents:
            self._documents[position] = self.read(position)
        return self._documents[position]

    def pop(self) -> list[tuple[Piece, EncodedDocument]]:
        """The next full sequence, as pieces with their documents."""
        fill = {"first_fit": self._first_fit, "concat": self._concat, "single": self._single}[self.config.policy]
        sequence = fill()
        result = [(piece, self.document(piece.position)) for piece in sequence]
        waiting = {piece.position for waiting_sequence in self.open for piece in waiting_sequence}
        self._documents = {position: document for position, document in self._documents.items() if position in waiting}
        return result

    def _take(self, room: tuple[int, int] | None = None) -> list[Piece]:
        position = self.next
        self.next += self.stride
        return cut(self.document(position), position, self.config, self.image_tokens, room)

    def _room(self, sequence: list[Piece]) -> tuple[int, int]:
        return self.config.seq_len - sum(p.tokens for p in sequence), self.config.max_images - sum(p.images for p in sequence)

    def _first_fit(self) -> list[Piece]:
        rooms = [self._room(sequence) for sequence in self.open]
        while len(self.open) <= self.config.open_sequences:
            for piece in self._take():
                fitting = (i for i, (tokens, images) in enumerate(rooms) if piece.tokens <= tokens and piece.images <= images)
                number = next(fitting, len(rooms))
                if number == len(rooms):
                    self.open.append([])
                    rooms.append((self.config.seq_len, self.config.max_images))
                self.open[number].append(piece)
                rooms[number] = (rooms[number][0] - piece.tokens, rooms[number][1] - piece.images)
        # The fullest leaves: by the scarcer of its two dimensions, the oldest among equals.
        slack = [min(tokens / self.config.seq_len, images / self.config.max_images) for tokens, images in rooms]
        return self.open.pop(slack.index(min(slack)))

    def _concat(self) -> list[Piece]:
        waiting = self.open or [[]]
        sequence = waiting.pop(0)
        while True:
            tokens, images = self._room(sequence)
            if waiting or tokens == 0:
                break
            pieces = self._take((tokens, images))
            if pieces and pieces[0].tokens <= tokens and pieces[0].images <= images:
                sequence.append(pieces.pop(0))
            waiting += [[piece] for piece in pieces]
        self.open = waiting
        return sequence

    def _single(self) -> list[Piece]:
        while not self.open:
            self.open = [[piece] for piece in self._take()]
        return self.open.pop(0)


@dataclass(frozen=True)
class Sequence:
    """One packed sequence as arrays of length seq_len (see batch.py), with its images still encoded."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    document_ids: np.ndarray
    images: list[Image]
    image_starts: list[int]
    origins: list[Origin]


def assemble(
    pieces: list[tuple[Piece, EncodedDocument]], config: PackingConfig, image_tokens: int, image_id: int, pad_id: int
) -> Sequence:
    """Lay pieces side by side and derive labels, positions and document ids.

    labels[s] is the id at s + 1 of the same piece; none is set where that id belongs to an image, at a piece's last position or
    on padding.
    """
    length = config.seq_len
    input_ids = np.full(length, pad_id, np.int64)
    labels = np.full(length, IGNORE, np.int64)
    position_ids = np.zeros(length, np.int64)
    document_ids = np.zeros(length, np.int64)
    images: list[Image] = []
    starts: list[int] = []
    at = 0
    for number, (piece, document) in enumerate(pieces, start=1):
        ids = np.asarray(document.ids[piece.start : piece.stop], np.int64)
        end = at + len(ids)
        input_ids[at:end] = ids
        labels[at : end - 1] = np.where(ids[1:] == image_id, IGNORE, ids[1:])
        position_ids[at:end] = np.arange(len(ids)) if config.isolate_documents else np.arange(at, end)
        document_ids[at:end] = number if config.isolate_documents else 1
        for start, image in zip(document.starts, document.images, strict=True):
            if piece.start <= start < piece.stop:
                images.append(image)
                starts.append(at + start - piece.start)
        at = end
    return Sequence(input_ids, labels, position_ids, document_ids, images, starts, [document.origin for _, document in pieces])
