"""Packing: documents -> fixed-length sequences.

    feeds (one a source) -> pieces -> open sequences -> the fullest leaves -> assemble: arrays of seq_len
    Feed                    Piece     Packer

A document's size has two dimensions, tokens and images; a sequence holds at most `seq_len` of the one and `max_images` of the
other. What is too large for the room it gets is cut, never inside an image, and its pieces go on as documents of their own.

A packer keeps *references* (source, place, first token, last token) of the pieces that wait in open sequences, and of their
documents the token ids: its state is small, a resumed run reads the same documents again instead of carrying them in the
checkpoint, and pictures are read when their sequence leaves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from configs.errors import UserError
from data_pipelines.config import PackingConfig
from data_pipelines.document import Image, Origin
from data_pipelines.faults import Fault

IGNORE = -100
"""Label of a position without a loss, as torch's cross-entropy has it."""
MOST_LOST_IN_A_ROW = 1000
"""Samples of a source that may be unusable one after the other before the lane gives up, well before any budget is counted."""


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """A document as token ids, int32 (n,), with its images still encoded. `starts[i]` is the first token of `images[i]`."""

    ids: np.ndarray
    starts: list[int]
    images: tuple[Image, ...]
    origin: Origin


class Piece(NamedTuple):
    """Tokens [start, stop) of the document at `place` of a lane's order of source number `source`."""

    source: int
    place: int
    start: int
    stop: int
    images: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def piece_end(document: EncodedDocument, start: int, room: tuple[int, int], image_tokens: int) -> tuple[int, int]:
    """(stop, images) of the longest piece from token `start` on that fits into `room` (tokens, images) and cuts no image."""
    stop = min(start + room[0], len(document.ids))
    first = last = bisect_left(document.starts, start)
    while last < len(document.starts) and document.starts[last] < stop:
        if last - first >= room[1] or document.starts[last] + image_tokens > stop:
            return document.starts[last], last - first
        last += 1
    return stop, last - first


@dataclass
class Counts:
    """Of one source in one lane, so far: what realised ratios and budgets are made of."""

    taken_documents: int = 0
    """Taken up for packing; some of it still waits in open sequences."""
    taken_tokens: int = 0
    sequences: int = 0
    """Delivered with something of this source in them."""
    documents: int = 0
    """Delivered whole; one that was cut counts with its last piece."""
    tokens: int = 0
    """Delivered, image tokens included, padding not."""
    images: int = 0
    skipped: int = 0
    """Samples that could not be used; one that was cut counts once, however many of its pieces are lost."""

    @property
    def read(self) -> int:
        """Samples looked at; one with an undecodable picture counts twice."""
        return self.taken_documents + self.skipped


COUNTS = len(fields(Counts))
"""Numbers of a feed's state that are counts; places of lost documents follow, in states written before there were any: none."""


class Feed:
    """One source's documents in a lane's order, cut into pieces on demand. `read(place)`: the document at a place, a Fault where
    it cannot be used, None where the order has a hole."""

    def __init__(self, number: int, name: str, read: Callable[[int], EncodedDocument | Fault | None], image_tokens: int) -> None:
        self.number, self.name, self._read, self.image_tokens = number, name, read, image_tokens
        self.place, self.start = 0, 0
        self.counts = Counts()
        self.faults: list[Fault] = []
        self.documents: dict[int, EncodedDocument] = {}
        self.lost: set[int] = set()
        """Places of documents that lost a piece and may have more: they count as skipped once."""

    def state(self) -> list[int]:
        return [self.place, self.start, *vars(self.counts).values(), *sorted(self.lost)]

    def restore(self, state: Sequence[int]) -> None:
        self.place, self.start, *rest = state
        self.counts, self.lost = Counts(*rest[:COUNTS]), set(rest[COUNTS:])
        self.documents = {}

    def document(self, place: int) -> EncodedDocument:
        """A document that was taken up before. Raises UserError if it has become unusable since then."""
        if place not in self.documents:
            found = self._read(place)
            if not isinstance(found, EncodedDocument):
                raise UserError(f"{self.name}: a sample that was good when it was packed is not any more. {found}")
            self.documents[place] = found
        return self.documents[place]

    def piece(self, room: tuple[int, int]) -> Piece:
        """The next piece that fits into `room` (tokens, images): of no tokens if an image comes next that does not fit."""
        document = self._current()
        stop, images = piece_end(document, self.start, room, self.image_tokens)
        piece = Piece(self.number, self.place, self.start, stop, images)
        if self.start == 0 and stop:
            self.counts.taken_documents += 1
        self.counts.taken_tokens += piece.tokens
        self.start = stop
        if stop == len(document.ids):
            self.place, self.start = self.place + 1, 0
        return piece

    def ahead(self) -> int:
        """Tokens of what is left of the current document, or of the next one."""
        return len(self._current().ids) - self.start

    def deliver(self, piece: Piece) -> EncodedDocument:
        """Count a piece as delivered; returns its document."""
        document = self.document(piece.place)
        self.counts.documents += piece.stop == len(document.ids)
        self.counts.tokens += piece.tokens
        self.counts.images += piece.images
        return document

    def take_back(self, piece: Piece, document: EncodedDocument) -> None:
        """A delivered piece turned out to be unusable: its picture cannot be decoded."""
        self.counts.documents -= piece.stop == len(document.ids)
        self.counts.tokens -= piece.tokens
        self.counts.images -= piece.images
        self.counts.skipped += piece.place not in self.lost
        self.lost.add(piece.place)

    def _current(self) -> EncodedDocument:
        lost = 0
        while self.place not in self.documents:
            found = self._read(self.place)
            if isinstance(found, EncodedDocument):
                self.documents[self.place] = found
                break
            self.place += 1
            if found is not None:
                self.faults.append(found)
                self.counts.skipped += 1
                lost += 1
            if lost > MOST_LOST_IN_A_ROW:
                raise UserError(f"{self.name}: {lost:,} samples in a row could not be used, the last because: {found}")
        return self.documents[self.place]


class Packer:
    """Fills sequences for one lane from one feed, or from several of which `pick` names the next."""

    def __init__(self, config: PackingConfig, feeds: Sequence[Feed], pick: Callable[[], int] = lambda: 0) -> None:
        self.config, self.feeds, self.pick = config, feeds, pick
        self.by_number = {feed.number: feed for feed in feeds}
        self.open: list[list[Piece]] = []
        self._full = (config.seq_len, config.max_images)
        self._fill = {
            "first_fit": self._fitted,
            "best_fit": self._fitted,
            "next_fit": self._next_fit,
            "concat": self._concat,
            "single": lambda: [self._piece(self._full)],
        }[config.policy]

    def state(self) -> list[list[int | list[int]]]:
        """JSON-able: the pieces that wait. A whole document is one number, how far its place is behind its feed's and which feed;
        of a piece of one, its tokens and images follow. What a document holds is read again."""

        def coded(piece: Piece) -> int | list[int]:
            feed = self.by_number[piece.source]
            reference = (feed.place - piece.place) * len(self.feeds) + self.feeds.index(feed)
            whole = piece.start == 0 and piece.stop == len(feed.document(piece.place).ids)
            return reference if whole else [reference, piece.start, piece.stop, piece.images]

        return [[coded(piece) for piece in sequence] for sequence in self.open]

    def restore(self, state: Sequence[Sequence[int | list[int]]]) -> None:
        """After the feeds. Raises UserError for a document that was good when the state was taken and is not any more."""

        def decoded(code: int | list[int]) -> Piece:
            reference, *cut = [code] if isinstance(code, int) else code
            back, number = divmod(reference, len(self.feeds))
            feed = self.feeds[number]
            place = feed.place - back
            if cut:
                return Piece(feed.number, place, *cut)
            document = feed.document(place)
            return Piece(feed.number, place, 0, len(document.ids), len(document.starts))

        self.open = [[decoded(code) for code in sequence] for sequence in state]

    def pop(self) -> list[tuple[Piece, EncodedDocument]]:
        """The next sequence, as pieces with their documents."""
        for feed in self.feeds:
            feed.lost &= self._needed(feed)  # before pieces leave: whether those are lost is known later
        result = []
        for piece in self._fill():
            feed = self.by_number[piece.source]
            result.append((piece, feed.deliver(piece)))
        for feed in self.feeds:
            feed.counts.sequences += any(piece.source == feed.number for piece, _ in result)
            needed = self._needed(feed)
            feed.documents = {place: document for place, document in feed.documents.items() if place in needed}
        return result

    def _needed(self, feed: Feed) -> set[int]:
        """Places of documents of which something has yet to leave."""
        return {p.place for waiting in self.open for p in waiting if p.source == feed.number} | {feed.place}

    def _piece(self, room: tuple[int, int]) -> Piece:
        return self.feeds[self.pick()].piece(room)

    def _room(self, sequence: list[Piece]) -> tuple[int, int]:
        return self.config.seq_len - sum(p.tokens for p in sequence), self.config.max_images - sum(p.images for p in sequence)

    def _slack(self, room: tuple[int, int]) -> float:
        """How full a sequence can still get, by the scarcer of its two dimensions."""
        return min(room[0] / self.config.seq_len, room[1] / self.config.max_images)

    def _fitted(self) -> list[Piece]:
        """Each piece into the first open sequence with room, or the one it fills best; then the fullest leaves."""
        best = self.config.policy == "best_fit"
        rooms = [self._room(sequence) for sequence in self.open]
        while len(self.open) <= self.config.open_sequences:
            piece = self._piece(self._full)
            fitting = (i for i, (tokens, images) in enumerate(rooms) if piece.tokens <= tokens and piece.images <= images)
            number = min(fitting, key=lambda i: self._slack(rooms[i]), default=None) if best else next(fitting, None)
            if number is None:
                number = len(rooms)
                self.open.append([])
                rooms.append(self._full)
            self.open[number].append(piece)
            rooms[number] = (rooms[number][0] - piece.tokens, rooms[number][1] - piece.images)
        slack = [self._slack(room) for room in rooms]
        return self.open.pop(slack.index(min(slack)))

    def _next_fit(self) -> list[Piece]:
        """Whole documents one after the other; the first that does not fit begins the next sequence."""
        sequence = self.open.pop() if self.open else []
        while True:
            piece = self._piece(self._full)
            tokens, images = self._room(sequence)
            if piece.tokens > tokens or piece.images > images:
                self.open = [[piece]]
                return sequence
            sequence.append(piece)

    def _concat(self) -> list[Piece]:
        """End to end, cut where the sequence is full."""
        sequence: list[Piece] = []
        while True:
            piece = self._piece(self._room(sequence))
            if piece.tokens:
                sequence.append(piece)
            if not piece.tokens or self._room(sequence)[0] == 0:
                return sequence


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One packed sequence as arrays of length seq_len (see batch.py), with its images still encoded."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    document_ids: np.ndarray
    sources: np.ndarray
    """int8: the number of the source each token comes from, -1 on padding."""
    images: list[Image]
    image_starts: list[int]
    origins: list[Origin]


def assemble(
    pieces: Sequence[tuple[Piece, EncodedDocument]], config: PackingConfig, image_tokens: int, image_id: int, pad_id: int
) -> PackedSequence:
    """Lay pieces side by side and derive labels, positions and document ids.

    labels[s] is the id at s + 1 of the same piece; none is set where that id belongs to an image, at a piece's last position or
    on padding.
    """
    length = config.seq_len
    input_ids = np.full(length, pad_id, np.int64)
    labels = np.full(length, IGNORE, np.int64)
    position_ids = np.zeros(length, np.int64)
    document_ids = np.zeros(length, np.int64)
    sources = np.full(length, -1, np.int8)
    images: list[Image] = []
    starts: list[int] = []
    at = 0
    for number, (piece, document) in enumerate(pieces, start=1):
        ids = document.ids[piece.start : piece.stop]
        end = at + len(ids)
        input_ids[at:end] = ids
        labels[at : end - 1] = np.where(ids[1:] == image_id, IGNORE, ids[1:])
        position_ids[at:end] = np.arange(len(ids)) if config.isolate_documents else np.arange(at, end)
        document_ids[at:end] = number if config.isolate_documents else 1
        sources[at:end] = piece.source
        for start, image in images_of(piece, document):
            images.append(image)
            starts.append(at + start - piece.start)
        at = end
    origins = [document.origin for _, document in pieces]
    return PackedSequence(input_ids, labels, position_ids, document_ids, sources, images, starts, origins)


def images_of(piece: Piece, document: EncodedDocument) -> list[tuple[int, Image]]:
    """(first token, image) of each image of a piece."""
    first = bisect_left(document.starts, piece.start)
    return list(zip(document.starts[first : first + piece.images], document.images[first : first + piece.images], strict=True))
