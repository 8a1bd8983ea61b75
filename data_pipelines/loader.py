"""The loader: lanes -> decoded images -> PackedBatch, with worker processes that read ahead.

    for micro_batches in PackedLoader(stream, image_size=96, world=2, rank=0, micro_batch=4):
        ...                                            # one list a step: the rank's share of the global batch, in micro-batches

Where a frozen tower's features are kept, `known` says which pictures need no decoding: of these the batch carries the place of
their features instead of pixels.

A rank's micro-batches are the same whatever the number of workers: worker w of W owns every W-th of the rank's lanes, and the
loader asks the workers in turn.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from configs.errors import UserError
from data_pipelines.batch import KINDS, PackedBatch
from data_pipelines.faults import Fault
from data_pipelines.images import SquareDecoder
from data_pipelines.lanes import LaneSequence, LaneStream

KEY_BYTES = 16


class Known(Protocol):
    """Pictures of which something is kept that stands for their pixels, by key (mm1/feature_store.py)."""

    def refresh(self) -> None:
        """Learn what others have added."""

    def find(self, key: bytes) -> int:
        """Where it is kept; -1 for what is not, or not whole."""


def image_key(data: bytes) -> bytes:
    """Of an encoded image, 16 bytes: equal bytes are equal pixels, whatever corpus or shard they lie in."""
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


class _LaneDataset(IterableDataset):
    """In each worker: that worker's lanes from step `first` on, with the number of pictures that wait in its ring.

    Without workers and rings: with the pictures themselves.
    """

    def __init__(
        self,
        stream: LaneStream,
        lanes: list[int],
        image_size: int | None,
        step: int,
        states: Mapping[int, Mapping[str, Any]],
        first: int,
        rings: list[Ring],
        known: Known | None,
    ) -> None:
        self.stream, self.lanes, self.image_size, self.step, self.states = stream, lanes, image_size, step, states
        self.first, self.rings, self.known = first, rings, known

    def __iter__(self) -> Iterator[tuple[LaneSequence, int | np.ndarray] | UserError]:
        worker = get_worker_info()
        lanes = self.lanes[worker.id :: worker.num_workers] if worker else self.lanes
        if worker is not None:
            die_with_parent()
            keep_freed_memory()
        decoder: SquareDecoder | None = None
        if self.image_size is not None:
            ring = self.rings[worker.id] if worker else None
            decoder = (
                PictureDecoder(self.image_size, ring) if self.known is None else KeyedDecoder(self.image_size, ring, self.known)
            )
        before: list[Fault] = []
        try:
            for item in self.stream.lanes(lanes, self.step, self.states, decoder):
                if item.step < self.first:
                    before += item.faults
                    continue
                item.faults[:0], before = before, []
                pixels = _NOTHING if item.pixels is None else item.pixels
                yield replace(item, pixels=None), pixels if worker is None else len(pixels)
        except UserError as error:  # handed over as a value: raised in a worker it would arrive wrapped in a traceback
            yield error


_NOTHING = np.empty((0, 0, 0, 3), np.uint8)


class Ring:
    """Memory that a worker and the trainer share: the worker leaves the pictures of its sequences there, one slot after the
    other, and begins again at the first.

    No lock is needed. A worker is asked for at most `prefetch` sequences beyond those handed over, and the trainer copies a
    step's pictures out before it asks for the next step's; so with `prefetch` slots and one more for each sequence that a worker
    brings to a step, none is written to while it is read. Memory used again is also fast memory: pages are zeroed and mapped
    once, not for each picture (measured: a fifth of the loader's time). It is anonymous, so that a container's small /dev/shm
    does not matter, and therefore handed to workers by fork.
    """

    def __init__(self, slots: int, images: int, picture: np.dtype) -> None:
        memory = mmap.mmap(-1, slots * images * picture.itemsize)
        self.squares = np.frombuffer(memory, picture.base).reshape(slots, images, *picture.shape)

    def view(self, sequence: int, count: int) -> np.ndarray:
        """The pictures of the worker's sequence number `sequence`."""
        return self.squares[sequence % len(self.squares), :count]


class PictureDecoder(SquareDecoder):
    """Decodes into a ring's slots, or into memory of its own without a ring."""

    def __init__(self, size: int, ring: Ring | None) -> None:
        super().__init__(size)
        self.ring, self.sequence = ring, -1

    def allocate(self, count: int) -> np.ndarray:
        self.sequence += 1
        return np.empty(count, self.picture) if self.ring is None else self.ring.view(self.sequence, count)

    @property
    def picture(self) -> np.dtype:
        return np.dtype((np.uint8, (self.size, self.size, 3)))


class KeyedDecoder(PictureDecoder):
    """Pictures with their keys, as records of key (uint8, 16), place (int64) and square (uint8, size x size x 3).

    What `known` has is not decoded: its place is not -1, and its square is whatever was there.
    """

    def __init__(self, size: int, ring: Ring | None, known: Known) -> None:
        super().__init__(size, ring)
        self.known = known

    def allocate(self, count: int) -> np.ndarray:
        self.known.refresh()
        return super().allocate(count)

    def decode(self, data: bytes, name: str, square: np.ndarray) -> None:
        key, record = image_key(data), square
        record["key"] = np.frombuffer(key, np.uint8)
        record["place"] = place = self.known.find(key)
        if place < 0:
            super().decode(data, name, record["square"])

    @property
    def picture(self) -> np.dtype:
        return np.dtype([("place", np.int64), ("key", np.uint8, KEY_BYTES), ("square", super().picture)])


def as_images(squares: np.ndarray) -> torch.Tensor:
    """uint8 (n, size, size, 3) as a tensor (n, 3, size, size) of the same memory."""
    return torch.from_numpy(squares).permute(0, 3, 1, 2)


def die_with_parent() -> None:
    """A trainer that is killed takes its workers along at once: they hold its run's lock, and torch's own watch takes seconds."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, Linux


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: by default it hands a picture's megabytes back to the kernel and asks for them again,
    zeroed page by page, for the next one. Without glibc nothing happens."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((-3, 1 << 28), (-1, 1 << 29), (-2, 1 << 26)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(parameter, value)


def collate(items: list[tuple[LaneSequence, np.ndarray]], stream: LaneStream) -> PackedBatch:
    """Rows in the order of `items`; with each its pictures, as squares or as KeyedDecoder's records."""

    def rows(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(item.sequence, name) for item, _ in items]))

    kinds = torch.tensor([*(KINDS.index(kind) for kind in stream.kinds), -1], dtype=torch.int8)  # source -1, padding, is the last
    slots = [[row, start, stream.image_tokens] for row, (item, _) in enumerate(items) for start in item.sequence.image_starts]
    pictures, kept = [held for _, held in items], {}
    if pictures[0].dtype.names:
        kept = {"feature_places": np.concatenate([held["place"] for held in pictures])}
        kept["image_keys"] = np.concatenate([held["key"] for held in pictures])
        pictures = [held["square"][held["place"] < 0] for held in pictures]
    return PackedBatch(
        input_ids=rows("input_ids"),
        labels=rows("labels"),
        position_ids=rows("position_ids"),
        document_ids=rows("document_ids"),
        images=torch.cat([as_images(squares) for squares in pictures]),
        image_slots=torch.tensor(slots, dtype=torch.int64).reshape(-1, 3),
        kinds=kinds[rows("sources").long()],
        lane_states={item.slot: item.state for item, _ in items},
        faults=[fault for item, _ in items for fault in item.faults],
        **kept,
    )


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turns what a killed worker leads to into a UserError. torch's signal handler raises a RuntimeError anywhere in the main
    process, so a training loop stands inside this as well."""
    try:
        try:
            yield
        except (EOFError, OSError):
            # A worker's pipe closes before its death is reported: should this be all that was noticed so far, torch raises here.
            time.sleep(1)
            raise
    except RuntimeError as error:
        # torch's words for a death; those of an exception inside a worker name the worker too
        if not any(death in str(error) for death in ("exited unexpectedly", "is killed by signal")):
            raise
        raise UserError(
            f"A data worker was killed ({str(error).strip()}), most often because memory ran out: lower engine.workers. The same "
            "command goes on from the last checkpoint."
        ) from error


class PackedLoader:
    """Endless steps of one rank's micro-batches; resumes exactly from `step` and the lane states of a checkpoint."""

    def __init__(
        self,
        stream: LaneStream,
        *,
        image_size: int | None,
        micro_batch: int,
        world: int = 1,
        rank: int = 0,
        workers: int = 0,
        step: int = 0,
        states: Mapping[int, Mapping[str, Any]] | None = None,
        first: int = 0,
        known: Known | None = None,
    ) -> None:
        """Raises UserError if world x micro_batch does not divide the global batch.

        `workers` is lowered until it divides a rank's share. With image_size None no image is decoded, and only `sequences` can
        be read; then `first` may be given: steps before it are packed, for what waits in open sequences, and left out. With
        `known` only the micro-batches can be read, and their pictures are those that it does not know.
        """
        assert image_size is None or first <= step
        share, left = divmod(stream.global_batch, world)
        if left or share % micro_batch:
            raise UserError(
                f"train.global_batch={stream.global_batch} must be a multiple of {world} processes x "
                f"engine.micro_batch={micro_batch}."
            )
        self.stream, self.micro_batch, self.per_step = stream, micro_batch, share
        lanes = list(range(rank, stream.global_batch, world))
        # Each worker must serve the same number of lanes, or the round-robin over workers would drift against the slots.
        while workers and share % workers:
            workers -= 1
        self.workers = workers
        if workers:
            keep_freed_memory()  # here as well: each step's pictures are put together in this process
        prefetch = max(2, -(-share // workers)) if workers else None
        self._rings: list[Ring] = []
        if prefetch is not None and image_size is not None:
            slots = prefetch + share // workers
            decoder = PictureDecoder(image_size, None) if known is None else KeyedDecoder(image_size, None, known)
            self._rings = [Ring(slots, stream.packing.max_images, decoder.picture) for _ in range(workers)]
        dataset = _LaneDataset(stream, lanes, image_size, step, states or {}, first, self._rings, known)
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            prefetch_factor=prefetch,
            pin_memory=False,
            persistent_workers=False,
            collate_fn=_unchanged,
        )

    def sequences(self) -> Iterator[tuple[LaneSequence, torch.Tensor]]:
        """The rank's sequences one by one, by step and slot, with their images; what the micro-batches are made of.

        The images stay as they are until the next step's sequences are asked for.
        """
        for sequence, pictures in self._sequences():
            yield sequence, as_images(pictures)

    def _sequences(self) -> Iterator[tuple[LaneSequence, np.ndarray]]:
        with naming_dead_workers():
            for number, item in enumerate(self._loader):
                if isinstance(item, UserError):
                    raise item
                sequence, pictures = item
                if self.workers:
                    turn, worker = divmod(number, self.workers)
                    pictures = self._rings[worker].view(turn, pictures) if self._rings else _NOTHING
                yield sequence, pictures

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        items: list[tuple[LaneSequence, np.ndarray]] = []
        for item in self._sequences():
            items.append(item)
            if len(items) == self.per_step:
                starts = range(0, self.per_step, self.micro_batch)
                yield [collate(items[i : i + self.micro_batch], self.stream) for i in starts]
                items = []


def _unchanged(item: Any) -> Any:
    """torch's own choice would make tensors of arrays, and cannot of records."""
    return item


def digest(item: LaneSequence) -> str:
    """A short hash of a sequence's tokens, labels, documents and (where they were not decoded) image bytes: equal digests, equal
    training input."""
    sequence = item.sequence
    hasher = hashlib.blake2b(digest_size=8)
    for array in (sequence.input_ids, sequence.labels, sequence.position_ids, sequence.document_ids):
        hasher.update(array.tobytes())
    for image in sequence.images:
        hasher.update(hashlib.blake2b(image.data, digest_size=8).digest())
    return hasher.hexdigest()
