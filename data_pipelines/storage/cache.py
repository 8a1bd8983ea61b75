"""Chunks of remote files on a local disk, shared by all processes that name the same folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipelines.storage.process import here
from data_pipelines.storage.retry import described

BLOCK = 64 << 10
"""Bytes of a cached chunk that have a checksum of their own, so that a small read verifies and reads a small part."""
DIGEST = 16
"""Bytes of a digest."""


class Cache:
    """Chunks on disk, shared by all processes that name the same folder.

        <folder>/usage               bytes in use, eight of them, changed only under its lock
        <folder>/<key>/<number>      data, a digest of every BLOCK of it, a digest of those and of what chunk it is

    A file appears in one move, complete. What does not verify is no file. Room is taken before anything is written, so that the
    sum stays within `capacity` also with many writers; the folder is walked only when room runs out, and a tenth of it is freed.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self.folder, self.capacity = folder, capacity

    def takes(self, size: int) -> bool:
        """Whether a file of `size` bytes can be kept whole, digests included."""
        return size * (1 + 2 * DIGEST / BLOCK) + 2 * BLOCK <= self.capacity and self.folder not in here().full

    def get(self, key: str, number: int, length: int, start: int, stop: int) -> bytes | None:
        """Bytes start..stop of a chunk of `length` bytes; None if it is not there or not sound."""
        if not self.capacity:
            return None
        path = self.folder / key / str(number)
        blocks = -(-length // BLOCK)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found = os.fstat(handle)
            if found.st_size != length + (blocks + 1) * DIGEST:
                return None
            table = os.pread(handle, (blocks + 1) * DIGEST, length)
            if table[-DIGEST:] != seal(key, number, table[:-DIGEST]):
                return None
            first, last = start // BLOCK, -(-stop // BLOCK)
            data = os.pread(handle, min(length, last * BLOCK) - first * BLOCK, first * BLOCK)
            if digests(data) != table[first * DIGEST : last * DIGEST]:
                return None
            if time.time() - found.st_mtime > 60:  # the order of use to the minute is enough, and spares the disk
                with suppress(OSError):
                    os.utime(path)
            return data[start - first * BLOCK : stop - first * BLOCK]
        except OSError:
            return None
        finally:
            os.close(handle)

    def put(self, key: str, number: int, data: bytes) -> None:
        """Keep a chunk, if there is room for it at all. A full disk ends keeping, with one warning, and not the run."""
        table = digests(data)
        content = data + table + seal(key, number, table)
        if len(content) > self.capacity or self.folder in here().full:
            return
        path = self.folder / key / str(number)
        partial = path.with_name(f"{number}.{os.urandom(6).hex()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if (handle := self._reserve(partial, len(content))) is None:
                return
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(handle, view) :]
            finally:
                os.close(handle)
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            if error.errno == errno.ENOENT:  # an eviction in another process removed the folder just made: not worth a second try
                return
            here().full.add(self.folder)
            reason = "no room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else described(error)
            print(
                f"Warning: nothing more is cached at {self.folder} ({reason}). Reading goes on without. Free some space, or set "
                "data.access.cache_dir to another disk or data.access.cache_gb to less.",
                file=sys.stderr,
            )

    def _reserve(self, partial: Path, size: int) -> int | None:
        """A file that counts `size` bytes from now on; makes room before. Returns its handle, None where no room can be made."""
        with self.lock("usage") as usage:
            count = os.pread(usage, 8, 0)
            used = struct.unpack("<q", count)[0] if len(count) == 8 else -1
            if used < 0 or used + size > self.capacity:
                used = self._evict(size)
            if used + size > self.capacity:  # all of it is being written by others just now
                os.pwrite(usage, struct.pack("<q", used), 0)
                return None
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(handle, size)  # so that a walk by another process counts it in full
                os.pwrite(usage, struct.pack("<q", used + size), 0)
            except OSError:
                os.close(handle)
                raise
            return handle

    def _evict(self, size: int) -> int:
        """Remove the chunks used longest ago until `size` bytes fit with a tenth to spare. Returns the bytes then in use."""
        files, now = [], time.time()
        for folder in os.scandir(self.folder):
            if re.fullmatch("[0-9a-f]{64}", folder.name):
                with suppress(OSError):
                    for entry in os.scandir(folder.path):
                        with suppress(OSError):
                            files.append((entry.stat().st_mtime, entry.path, entry.stat().st_size))
        used, keep = sum(file[2] for file in files), max(0, min(int(self.capacity * 0.9), self.capacity - size))
        if used + size <= self.capacity:
            return used
        for modified, path, bytes_ in sorted(files):
            if used <= keep:
                break
            if path.endswith(".partial") and now - modified < 3600:
                continue  # another process is writing it; one older than an hour was left by a process that died
            with suppress(OSError):
                os.unlink(path)
                used -= bytes_
                os.rmdir(os.path.dirname(path))  # succeeds for the last file of a folder
        return used

    @contextmanager
    def lock(self, name: str) -> Iterator[int]:
        """One process at a time; the kernel lets go when its holder dies. Yields the lock file's handle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)


def digests(data: bytes) -> bytes:
    """A BLAKE2b digest of every BLOCK, one after the other."""
    view = memoryview(data)
    blocks = range(0, len(data), BLOCK)
    return b"".join(hashlib.blake2b(view[start : start + BLOCK], digest_size=DIGEST).digest() for start in blocks)


def seal(key: str, number: int, table: bytes) -> bytes:
    """Binds the digests to the chunk they are of, so that a file under another chunk's name is not taken for it."""
    return hashlib.blake2b(f"{key}/{number}/".encode() + table, digest_size=DIGEST).digest()
