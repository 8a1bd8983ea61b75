"""Bytes of shards wherever they lie: on this machine or behind a URL, at random, whatever the network does meanwhile.

    open_file  ->  LocalFile    os.pread                                                            local.py
               ->  RemoteFile   memory (process.py) -> disk (cache.py) -> a request to a driver     remote.py
               ->  WebFile      the same, with requests of our own to web servers                   web.py

    settings: access.py     paths and URLs: names.py     what all files share: file.py     errors and further attempts: retry.py

This is the door: the suite takes what it needs from here. fsspec and its drivers are imported when the first URL is opened;
before that, nothing but the standard library. docs/remote.md is the user's side of it.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

from configs.errors import UserError
from data_pipelines.storage.access import DEFAULTS, Access
from data_pipelines.storage.file import ShardFile
from data_pipelines.storage.local import LocalFile
from data_pipelines.storage.names import is_remote, is_web, local_path, shown
from data_pipelines.storage.remote import RemoteFile, call, filesystem
from data_pipelines.storage.retry import MissingError, ReadError, persist
from data_pipelines.storage.web import WebFile

__all__ = [
    "Access",
    "MissingError",
    "ReadError",
    "ShardFile",
    "exists",
    "expand",
    "is_remote",
    "local_path",
    "matches",
    "open_file",
    "shown",
    "size_of",
]


def open_file(path: str | Path, access: Access = DEFAULTS) -> ShardFile:
    """A file for random reads. Costs nothing: it is looked for at its first use (which then may raise MissingError)."""
    kind = WebFile if is_web(path) else RemoteFile if is_remote(path) else LocalFile
    return kind(str(path), access)


def size_of(path: str | Path, access: Access = DEFAULTS) -> int:
    """Bytes of a file. Raises MissingError, UserError, ReadError."""
    file = open_file(path, access)
    try:
        return file.size
    finally:
        file.close()


def exists(path: str | Path, access: Access = DEFAULTS) -> bool:
    """Whether there is such a file (a folder is none). Raises UserError where that cannot be told, as without access."""
    if not is_remote(path):
        return local_path(path).is_file()
    try:
        return size_of(path, access) >= 0
    except MissingError:
        return False


def matches(piece: str, access: Access = DEFAULTS) -> list[str]:
    """Files that a pattern without braces names: the one of just that name (also with a * in it), else what it matches, sorted.

    A web server cannot be asked what it holds: an http(s) piece is one URL, and a * in it raises UserError.
    """
    if not is_remote(piece):
        path = local_path(piece)
        if path.is_file():
            return [str(path)]
        found = glob.glob(str(path), recursive=True) if glob.has_magic(piece) else []
        return sorted(match for match in found if os.path.isfile(match))
    if is_web(piece) and "*" in piece.partition("?")[0]:
        raise UserError(f"{shown(piece)}: a web server cannot list files. Name them with braces, as in shard-{{000..127}}.tar.")
    if exists(piece, access):
        return [piece]
    if is_web(piece) or not glob.has_magic(piece):
        return []

    def listed() -> list[str]:
        fs = filesystem(piece)
        path = fs._strip_protocol(piece)
        before = piece[: len(piece) - len(path)]  # scheme and host, which fsspec takes off and does not give back
        found = call(fs, "glob", path, detail=True)
        return sorted(before + name for name, info in found.items() if info["type"] == "file")

    return persist(piece, access, listed)


def braces(pattern: str, named: str | None = None) -> list[str]:
    """The pieces that a pattern's braces stand for, in their order. Raises UserError, beginning with `named` or the pattern, for
    braces that cannot be read."""
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{named or shown(pattern)}: {error}. Write braces as in shard-{{000..127}}.tar.") from error


def expand(pattern: str, access: Access = DEFAULTS) -> list[str]:
    """All files a pattern names: braces in their order, what * matches in sorted order.

    Raises MissingError for the first piece that names none, UserError for braces that cannot be read.
    """
    found: list[str] = []
    for piece in braces(pattern):
        if not (files := matches(piece, access)):
            part = f" ({shown(piece)})" if piece != pattern else ""
            raise MissingError(f"{shown(pattern)}{part}: no such file. Correct the pattern, or bring the shards there.")
        found += files
    return found
