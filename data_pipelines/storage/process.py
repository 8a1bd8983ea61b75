"""What belongs to one process and must not cross a fork: connections, the last chunks, what was already said.

fsspec (Read the Docs: "Using Async") makes filesystems that must not cross a fork; here each process makes its own at first use.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

MEMORY = 64 << 20
"""Bytes of chunks just fetched that a process keeps in memory, over all its files."""


class Process:
    """What belongs to one process: filesystems with their connections, the last chunks, what was already said."""

    def __init__(self, before: Process | None) -> None:
        self.pid = os.getpid()
        self.filesystems: dict[str, Any] = {}
        self.chunks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self.held = 0
        self.full: set[Path] = set()
        self.before = before  # never freed: a parent's filesystem, closed in a child, would write to the parent's event loop

    def remember(self, key: tuple[str, int], chunk: bytes) -> None:
        if (old := self.chunks.pop(key, None)) is not None:
            self.held -= len(old)
        self.chunks[key] = chunk
        self.held += len(chunk)
        while self.held > MEMORY and len(self.chunks) > 1:
            self.held -= len(self.chunks.popitem(last=False)[1])


_process: Process | None = None


def here() -> Process:
    """What belongs to this process; made anew at the first use after a fork."""
    global _process
    if _process is None or _process.pid != os.getpid():
        _process = Process(_process)
    return _process


def forget() -> None:
    """Drop this process's connections and chunks in memory, so that changed credentials or endpoints take effect."""
    global _process
    _process = None
