"""Files behind URLs, through fsspec's drivers: read in aligned chunks that are kept in memory for a while and on disk for long.

read -> chunks in memory (process.py) -> chunks on disk (cache.py) -> one request for neighbouring chunks that are in neither
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from data_pipelines.storage.access import Access
from data_pipelines.storage.cache import Cache
from data_pipelines.storage.file import changed, extent
from data_pipelines.storage.names import scheme_of, shown
from data_pipelines.storage.process import here
from data_pipelines.storage.retry import Hiccup, persist

PATIENCE = 600.0
"""Seconds after which any remote request counts as failed."""
REQUEST = 64 << 20
"""Bytes one request asks for at most, unless a chunk is larger."""


def filesystem(url: str) -> Any:
    """fsspec's filesystem for a URL, one for each process and server. Raises ImportError or ValueError without a driver."""
    import fsspec

    scheme = scheme_of(url)
    kind = fsspec.get_filesystem_class(scheme)
    options = kind._get_kwargs_from_urls(url)
    process, key = here(), f"{scheme} {options}"
    if key not in process.filesystems:
        # Neither listings nor instances from before: what is asked now must be answered by the server now.
        fs = kind(**({"use_listings_cache": False, "skip_instance_cache": True} | options))
        if scheme in ("s3", "s3a"):
            fs.retries = 1  # of s3fs itself; attempts are counted in one place
        process.filesystems[key] = fs
    return process.filesystems[key]


def call(fs: Any, method: str, *args: object, **kwargs: object) -> Any:
    """What a method of a filesystem returns, whether its driver is an asynchronous one or not."""
    if not getattr(fs, "async_impl", False):
        return getattr(fs, method)(*args, **kwargs)
    return waited(fs, getattr(fs, "_" + method), *args, **kwargs)


def waited(fs: Any, coroutine: Callable[..., Any], *args: object, **kwargs: object) -> Any:
    """What a coroutine function returns on the filesystem's event loop. Raises TimeoutError after PATIENCE."""
    from fsspec.asyn import sync

    return sync(fs.loop, coroutine, *args, timeout=PATIENCE, **kwargs)


@dataclass(frozen=True)
class Version:
    """What a remote file was when it was opened. `stamp`: its ETag, generation or time, where the server gives one."""

    size: int
    stamp: str = ""
    ranges: bool = True

    def require(self, name: str, size: int | None, stamp: str) -> None:
        if size is not None and size != self.size:
            raise changed(name, f"it had {self.size} bytes when it was opened and has {size} now")
        if stamp and self.stamp and stamp != self.stamp:
            raise changed(name, f"its version was {self.stamp} when it was opened and is {stamp} now")


def stamp_of(info: Mapping[str, Any]) -> str:
    """What tells one version of a file from another, from fsspec's info or a web server's headers; "" where there is nothing."""
    names = ("etag", "generation", "content-md5", "last-modified", "lastmodified", "last_modified", "mtime", "updated", "created")
    lower = {key.lower(): value for key, value in info.items()}
    return next((f"{name} {lower[name]}" for name in names if lower.get(name)), "")


class RemoteFile:
    """A file behind a URL, read in aligned chunks that are kept in memory for a while and on disk for long."""

    def __init__(self, name: str, access: Access) -> None:
        self.name, self.access, self.cache = name, access, Cache(access.folder, access.capacity)
        self._version: Version | None = None
        self._key = ""

    @property
    def size(self) -> int:
        return self.version.size

    @property
    def version(self) -> Version:
        """Asked for once; the children of a process inherit it, so that all of them insist on the same one."""
        if self._version is None:
            self._version = persist(self.name, self.access, self._ask)
            text = "\x1f".join([self.name, str(self._version.size), self._version.stamp, str(self.access.chunk)])
            self._key = hashlib.sha256(text.encode()).hexdigest()
        return self._version

    def _ask(self) -> Version:
        """Which version the server has now."""
        fs = filesystem(self.name)
        info = call(fs, "info", fs._strip_protocol(self.name))
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "a folder")
        if info.get("size") is None:
            raise UserError(f"{shown(self.name)}: the server does not say how large it is. Copy the shard to this machine.")
        return Version(int(info["size"]), stamp_of(info))

    def close(self) -> None:
        """Nothing is open: connections belong to the process, chunks to the cache."""

    def read(self, offset: int, size: int) -> bytes:
        if (size := extent(offset, size, self.size)) == 0:
            return b""
        chunk = self.access.chunk
        numbers = range(offset // chunk, (offset + size - 1) // chunk + 1)
        parts = {number: self._kept(number, offset, size) for number in numbers}
        for run in runs((number for number in numbers if parts[number] is None), max(1, REQUEST // chunk)):
            fetched = persist(self.name, self.access, lambda run=run: self._fetch(run))  # type: ignore[misc]
            for number, data in fetched.items():
                parts[number] = data[self._inside(number, offset, size)]
        return b"".join(part for part in parts.values() if part is not None)

    def _inside(self, number: int, offset: int, size: int) -> slice:
        """The part of a chunk that a read wants."""
        start = number * self.access.chunk
        return slice(max(0, offset - start), min(self.access.chunk, offset + size - start))

    def _length(self, number: int) -> int:
        return min(self.access.chunk, self.size - number * self.access.chunk)

    def _span(self, run: range) -> tuple[int, int]:
        """The bytes [start, end) of neighbouring chunks."""
        return run.start * self.access.chunk, min(run.stop * self.access.chunk, self.size)

    def _kept(self, number: int, offset: int, size: int) -> bytes | None:
        wanted, chunks = self._inside(number, offset, size), here().chunks
        if (data := chunks.get((self._key, number))) is not None:
            chunks.move_to_end((self._key, number))
            return data[wanted]
        return self.cache.get(self._key, number, self._length(number), wanted.start, wanted.stop)

    def _keep(self, number: int, data: bytes) -> None:
        here().remember((self._key, number), data)
        self.cache.put(self._key, number, data)

    def _fetch(self, run: range) -> dict[int, bytes]:
        """The chunks of `run` from the server, in one request, kept for later."""
        start, end = self._span(run)
        fs = filesystem(self.name)
        path = fs._strip_protocol(self.name)
        data = call(fs, "cat_file", path, start=start, end=end)
        # Asked after the bytes came: if it is still the version that was opened, they are of that version too.
        now = self._ask()
        self.version.require(self.name, now.size, now.stamp)
        if len(data) != end - start:
            raise Hiccup(f"{len(data)} bytes came for bytes {start} to {end}")
        return self._split(run, data)

    def _split(self, run: range, data: bytes) -> dict[int, bytes]:
        """The bytes of a run as its chunks, each of them kept."""
        chunk = self.access.chunk
        parts = {number: bytes(data[(number - run.start) * chunk : (number - run.start + 1) * chunk]) for number in run}
        for number, part in parts.items():
            self._keep(number, part)
        return parts


def runs(numbers: Iterable[int], longest: int) -> Iterator[range]:
    """Neighbouring numbers together, at most `longest` of them."""
    run = range(0)
    for number in numbers:
        if run and number == run.stop and len(run) < longest:
            run = range(run.start, number + 1)
            continue
        if run:
            yield run
        run = range(number, number + 1)
    if run:
        yield run
