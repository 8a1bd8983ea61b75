"""The loader: lanes -> decoded images -> PackedBatch, with worker processes that read ahead.

    for micro_batches in PackedLoader(stream, image_size=96, world=2, rank=0, micro_batch=4):
        ...                                            # one list a step: the rank's share of the global batch, in micro-batches

A rank's micro-batches are the same whatever the number of workers: worker w of W owns every W-th of the rank's lanes, and the
loader asks the workers in turn.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from configs.errors import UserError
from data_pipelines.batch import KINDS, PackedBatch
from data_pipelines.faults import Fault
from data_pipelines.images import SquareDecoder
from data_pipelines.lanes import LaneSequence, LaneStream


class _LaneDataset(IterableDataset):
    """In each worker: that worker's lanes from step `first` on, with their images decoded to uint8 (n, 3, size, size)."""

    def __init__(
        self,
        stream: LaneStream,
        lanes: list[int],
        image_size: int | None,
        step: int,
        states: Mapping[int, Mapping[str, Any]],
        first: int,
    ) -> None:
        self.stream, self.lanes, self.image_size, self.step, self.states = stream, lanes, image_size, step, states
        self.first = first

    def __iter__(self) -> Iterator[tuple[LaneSequence, torch.Tensor] | UserError]:
        worker = get_worker_info()
        lanes = self.lanes[worker.id :: worker.num_workers] if worker else self.lanes
        if worker is not None:
            die_with_parent()
            keep_freed_memory()
        decoder = None if self.image_size is None else TensorDecoder(self.image_size, shared=worker is not None)
        before: list[Fault] = []
        try:
            for item in self.stream.lanes(lanes, self.step, self.states, decoder):
                if item.step < self.first:
                    before += item.faults
                    continue
                item.faults[:0], before = before, []
                images = _NOT_DECODED if decoder is None or item.pixels is None else decoder.images(len(item.pixels))
                yield replace(item, pixels=None), images
        except UserError as error:  # handed over as a value: raised in a worker it would arrive wrapped in a traceback
            yield error


_NOT_DECODED = torch.empty(0, 3, 0, 0, dtype=torch.uint8)


class TensorDecoder(SquareDecoder):
    """Decodes into a tensor: with `shared` into memory that the trainer's process sees too, so that no picture is copied when
    a sequence is handed over."""

    def __init__(self, size: int, shared: bool) -> None:
        super().__init__(size)
        self.shared = shared
        self._squares = torch.empty(0)

    def allocate(self, count: int) -> np.ndarray:
        shape = (count, self.size, self.size, 3)
        self._squares = torch.empty(0 if self.shared else shape, dtype=torch.uint8)
        if self.shared:
            self._squares.set_(torch.UntypedStorage._new_shared(max(1, math.prod(shape))), 0, shape)  # type: ignore[call-overload]
        return self._squares.numpy()

    def images(self, count: int) -> torch.Tensor:
        """The first `count` pictures of the last array, uint8 (count, 3, size, size): a view, channels last in memory."""
        return self._squares[:count].permute(0, 3, 1, 2)


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


def collate(items: list[tuple[LaneSequence, torch.Tensor]], stream: LaneStream) -> PackedBatch:
    """Rows in the order of `items`."""

    def rows(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(item.sequence, name) for item, _ in items]))

    kinds = torch.tensor([*(KINDS.index(kind) for kind in stream.kinds), -1], dtype=torch.int8)  # source -1, padding, is the last
    slots = [[row, start, stream.image_tokens] for row, (item, _) in enumerate(items) for start in item.sequence.image_starts]
    return PackedBatch(
        input_ids=rows("input_ids"),
        labels=rows("labels"),
        position_ids=rows("position_ids"),
        document_ids=rows("document_ids"),
        images=torch.cat([images for _, images in items]),
        image_slots=torch.tensor(slots, dtype=torch.int64).reshape(-1, 3),
        kinds=kinds[rows("sources").long()],
        lane_states={item.slot: item.state for item, _ in items},
        faults=[fault for item, _ in items for fault in item.faults],
    )


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turns torch's RuntimeError about a killed worker into a UserError. Its signal handler raises that anywhere in the main
    process, so a training loop stands inside this as well."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
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
    ) -> None:
        """Raises UserError if world x micro_batch does not divide the global batch.

        `workers` is lowered until it divides a rank's share. With image_size None no image is decoded, and only `sequences` can
        be read; then `first` may be given: steps before it are packed, for what waits in open sequences, and left out.
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
        dataset = _LaneDataset(stream, lanes, image_size, step, states or {}, first)
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=max(2, -(-share // workers)) if workers else None,
            pin_memory=False,
            persistent_workers=False,
        )

    def sequences(self) -> Iterator[tuple[LaneSequence, torch.Tensor]]:
        """The rank's sequences one by one, by step and slot, with their images; what the micro-batches are made of."""
        with naming_dead_workers():
            for item in self._loader:
                if isinstance(item, UserError):
                    raise item
                yield item

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        items: list[tuple[LaneSequence, torch.Tensor]] = []
        for item in self.sequences():
            items.append(item)
            if len(items) == self.per_step:
                starts = range(0, self.per_step, self.micro_batch)
                yield [collate(items[i : i + self.micro_batch], self.stream) for i in starts]
                items = []


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
