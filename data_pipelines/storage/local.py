"""Files of this machine, and of disks mounted on it."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from configs.errors import UserError
from data_pipelines.storage.access import Access
from data_pipelines.storage.file import changed, extent
from data_pipelines.storage.names import local_path
from data_pipelines.storage.retry import Hiccup, persist


class LocalFile:
    """A file of this machine (or of a mounted network disk). pread keeps no position, so a fork may share the descriptor."""

    def __init__(self, name: str, access: Access) -> None:
        self.name, self.access, self.path = name, access, local_path(name)
        self._handle: int | None = None
        self._size: int | None = None

    @property
    def size(self) -> int:
        if self._size is None:
            persist(self.name, self.access, self._open, self.close)
        assert self._size is not None
        return self._size

    def _open(self) -> int:
        if self._handle is None:
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._check(os.fstat(handle))
            except BaseException:
                os.close(handle)
                raise
            self._handle = handle
        return self._handle

    def _check(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{self.name}: it is not a regular file. Name the shards themselves.")
        if self._size is not None and found.st_size != self._size:
            raise changed(self.name, f"it had {self._size} bytes when it was opened and has {found.st_size} now")
        self._size = found.st_size

    def read(self, offset: int, size: int) -> bytes:
        if self._handle is not None and offset >= 0 and size > 0:
            try:  # what nearly every read is; whatever is unusual about another is found out below
                found = os.pread(self._handle, size, offset)
            except OSError:
                found = b""
            if len(found) == size:
                return found
        if (size := extent(offset, size, self.size)) == 0:
            return b""
        return persist(self.name, self.access, lambda: self._read(offset, size), self.close)

    def _read(self, offset: int, size: int) -> bytes:
        handle = self._open()
        parts: list[bytes] = []
        while size:
            if not (part := os.pread(handle, size, offset)):
                self._check(os.fstat(handle))
                raise Hiccup(f"nothing came at byte {offset} of {self._size}")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Also what is done before every retry: a handle that has gone stale (ESTALE) never recovers, a new one does."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(OSError):
                os.close(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_handle": None}
