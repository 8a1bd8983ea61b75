"""What every file of shards has in common, wherever it lies."""

from __future__ import annotations

from typing import Protocol

from configs.errors import UserError
from data_pipelines.storage.names import shown


class ShardFile(Protocol):
    """Random access to one file. `name` is the path or URL as it was given, `size` counts bytes.

    Nothing is opened before the first use, objects cross forks and pickling, and one thread at a time may use one.
    """

    name: str

    @property
    def size(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes:
        """The bytes that exist there: fewer than `size` only past the end of the file. Raises UserError, ReadError."""

    def close(self) -> None: ...


def extent(offset: int, size: int, total: int) -> int:
    """How many of the `size` bytes from `offset` on a file of `total` bytes has."""
    if offset < 0 or size < 0:
        raise ValueError(f"offset={offset} and size={size} must not be negative")
    return max(0, min(size, total - offset))


def changed(name: str, how: str) -> UserError:
    """To be raised where a file is no longer the one that was opened; `how` it differs."""
    return UserError(f"{shown(name)} changed while in use: {how}. Restore it, or prepare the corpus again and begin a new run.")
