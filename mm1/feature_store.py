"""What a frozen image encoder makes of each picture, on disk for all runs of a machine: memory-mapped, safe to write together.

    <home>/cache/features/<hash of what decides the bits>/
        about.json     that, in words
        index.bin      an entry a place:  key (16) | CRC-32 of the features (4) | CRC-32 of the entry and its place (4)
        features.bin   the features of place 0, 1, ...: (P, C) each, in the encoder's dtype

Places are appended under one lock for the whole folder: features first, then the entry that says they are there. A process that
is killed in between leaves bytes that no entry names, and the next one writes over them. What a power failure has left
half-written does not have the checksum of its entry: it counts as absent, and is written again.

The lock also keeps the bound exact: the stores of the folder together never exceed it. What is full stays readable; further
pictures are encoded each time. Nothing is evicted, for a run that trains may rely on a place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UserError
from data_pipelines.loader import KEY_BYTES
from mm1.run import write_atomically

if TYPE_CHECKING:
    import torch

ENTRY = struct.Struct(f"<{KEY_BYTES}sII")
SPARE_DISK = 1_000_000_000
"""Bytes that stay free on the disk."""


class FeatureStore:
    """Features (P, C) of one dtype by image key. Any number of objects and processes may use one folder at once.

    `refresh` and `find` are data_pipelines.loader.Known: loader workers ask with the object they were forked with.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], shape: tuple[int, int], dtype: torch.dtype, bound: int) -> None:
        """`folder`: of all stores; `about`: what decides the features, JSON; `bound`: bytes of all stores together.

        Raises UserError where the folder cannot be written.
        """
        text = json.dumps(about, sort_keys=True)
        self.root, self.shape, self.dtype, self.bound = folder, shape, dtype, bound
        self.folder = folder / hashlib.blake2b(f"{text} {shape} {dtype}".encode(), digest_size=8).hexdigest()
        self.bytes = shape[0] * shape[1] * dtype.itemsize
        """Of one picture's features."""
        self.full = ""
        """Why nothing more is kept; empty while there is room."""
        self._places: dict[bytes, int] = {}
        self._sums: list[int] = []
        self._map: np.ndarray = np.empty((0, self.bytes), np.uint8)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock():  # the ranks of a run come here at the same moment
                if not (self.folder / "about.json").is_file():
                    write_atomically(self.folder / "about.json", json.dumps(about, indent=1) + "\n")
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._index = os.open(self.folder / "index.bin", flags, 0o644)
            self._features = os.open(self.folder / "features.bin", flags, 0o644)
        except OSError as error:
            raise UserError(
                f"{self.folder}: features of the frozen image encoder cannot be kept there ({error.strerror}). Make it writable, "
                "or set engine.feature_cache_gb=0."
            ) from error
        self.refresh()

    def __len__(self) -> int:
        """Places known to this object."""
        return len(self._sums)

    def refresh(self) -> None:
        """Read the entries that were added since the last time, by whichever process."""
        known = len(self._sums)
        if os.fstat(self._index).st_size < (known + 1) * ENTRY.size:
            return
        at = known * ENTRY.size
        while block := os.pread(self._index, 1 << 22, at):
            whole = len(block) // ENTRY.size * ENTRY.size
            for key, features, own in ENTRY.iter_unpack(block[:whole]):
                place = len(self._sums)
                if own == _check(key, features, place):
                    self._places[key] = place
                self._sums.append(features)
            at += whole
            if not whole:
                return

    def find(self, key: bytes) -> int:
        """The place of a picture's features, -1 where there are none or they are damaged."""
        place = self._places.get(key, -1)
        if place < 0:
            return -1
        content = os.pread(self._features, self.bytes, place * self.bytes)
        return place if len(content) == self.bytes and zlib.crc32(content) == self._sums[place] else -1

    def read(self, places: np.ndarray) -> torch.Tensor:
        """Features (n, P, C) on the CPU, of places that `find` gave in this process or another."""
        import torch

        if len(places) and int(places.max()) >= len(self._map):
            count = os.fstat(self._features).st_size // self.bytes
            mapped = mmap.mmap(self._features, count * self.bytes, prot=mmap.PROT_READ)
            self._map = np.frombuffer(mapped, np.uint8).reshape(count, self.bytes)
        return torch.from_numpy(self._map[places]).view(self.dtype).view(-1, *self.shape)

    def put(self, keys: Sequence[bytes], features: torch.Tensor) -> int:
        """Keep `features` (n, P, C), on the CPU, as far as there is room; returns how many are new. What is there stays.

        Without room, or where writing fails, `full` says why and the rest is not kept.
        """
        import torch

        contents = features.contiguous().view(torch.uint8).numpy().reshape(len(keys), self.bytes)
        new = 0
        try:
            with self._lock():
                self.refresh()
                room, limit = self._room()
                for key, content in zip(keys, contents, strict=True):
                    if self.find(key) >= 0:
                        continue
                    place = self._places.get(key, len(self))
                    if place == len(self) and room < self.bytes + ENTRY.size:
                        self.full = limit
                        break
                    self._write(key, content.tobytes(), place)
                    room -= self.bytes + ENTRY.size
                    new += 1
        except OSError as error:
            self.full = f"{self.folder} cannot be written any more ({error.strerror})"
        return new

    def _write(self, key: bytes, content: bytes, place: int) -> None:
        features = zlib.crc32(content)
        _write_at(self._features, content, place * self.bytes)
        _write_at(self._index, ENTRY.pack(key, features, _check(key, features, place)), place * ENTRY.size)
        self._places[key] = place
        if place == len(self):
            self._sums.append(features)
        else:
            self._sums[place] = features

    def _room(self) -> tuple[int, str]:
        """Bytes that may still be written, under the bound and beside what must stay free on the disk; and which it is."""
        used = sum(path.stat().st_size for name in ("index.bin", "features.bin") for path in self.root.glob(f"*/{name}"))
        room, disk = self.bound - used, shutil.disk_usage(self.folder).free - SPARE_DISK
        if room <= disk:
            return room, f"{self.root} is as large as engine.feature_cache_gb={self.bound / 1e9:g} allows"
        return disk, f"{self.root}: less than {SPARE_DISK / 1e9:g} GB would stay free on the disk"

    @contextmanager
    def _lock(self) -> Iterator[None]:
        # Opened each time: a descriptor that was inherited would share its lock with the process it came from.
        with open(self.root / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _check(key: bytes, features: int, place: int) -> int:
    return zlib.crc32(key + struct.pack("<IQ", features, place))


def _write_at(file: int, content: bytes, at: int) -> None:
    view = memoryview(content)
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done
