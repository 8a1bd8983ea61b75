"""Bytes of shards wherever they lie: on this machine or behind a URL, at random, whatever the network does meanwhile.

    open_file(path)  ->  LocalFile    os.pread
                     ->  RemoteFile   memory -> disk cache -> range request     (aligned chunks, data.access.chunk_mb)

Three things can happen to a read, and they are kept apart. A hiccup (timeouts, 5xx, connections cut, short bodies, EIO) is
retried with growing pauses; if it does not pass it is a ReadError, which says nothing about the data and never counts as damage.
What only the user can mend (no such file, no access, no driver) is a UserError at once. A file that is no longer the one that was
opened is a UserError too, so that a run never mixes two versions of a shard.

fsspec (Read the Docs: "Using Async") makes filesystems that must not cross a fork; here each process makes its own at first use.
Nothing but the standard library is imported before a URL is opened. docs/remote.md is the user's side of this file.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import math
import os
import re
import stat
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from configs.errors import UserError
from data_pipelines import paths
from data_pipelines.order import keyed

PAUSE = 0.5
"""Seconds before the first retry, doubled every time up to LONGEST_PAUSE."""
LONGEST_PAUSE = 30.0
SILENCE = 60.0
"""Seconds without a byte after which an HTTP request counts as failed."""
PATIENCE = 600.0
"""Seconds after which any remote request counts as failed."""
REQUEST = 64 << 20
"""Bytes one request asks for at most, unless a chunk is larger."""
MEMORY = 64 << 20
"""Bytes of chunks just fetched that a process keeps in memory, over all its files."""
BLOCK = 64 << 10
"""Bytes of a cached chunk that have a checksum of their own, so that a small read verifies and reads a small part."""
DIGEST = 16
REMOTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
PERMANENT = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file (a part of its path is not a folder)",
    errno.ENAMETOOLONG: "no such file (its name is too long)",
    errno.ELOOP: "its links lead in a circle",
    errno.EACCES: "reading it is not permitted",
    errno.EPERM: "reading it is not permitted",
    errno.EISDIR: "it is a folder",
    errno.EMFILE: "this process has too many files open (see: ulimit -n)",
    errno.ENFILE: "this machine has too many files open",
}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
T = TypeVar("T")


class ReadError(UserError):
    """A file that could not be read after all retries. Its content is not in doubt: the same read may succeed later."""


class MissingError(UserError):
    """There is no such file."""


class _Hiccup(Exception):
    """A failure that is worth another attempt."""


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


@dataclass(frozen=True)
class Access:
    """How files are read (data.access). It changes nothing about what is read, so no fingerprint contains it."""

    cache_dir: str | None = None
    """Where chunks of remote files are kept, None: <home>/cache. Processes and runs may share it."""
    cache_gb: float = 50.0
    """Room (10^9 bytes) for the cache; the chunks used longest ago make way. 0: keep nothing on disk."""
    chunk_mb: float = 8.0
    """Remote files are read and cached in aligned chunks of this size (2^20 bytes)."""
    retries: int = 5
    """Further attempts after a read that failed."""

    def validate(self) -> None:
        if not (math.isfinite(self.cache_gb) and self.cache_gb >= 0):
            raise UserError(f"data.access.cache_gb={self.cache_gb}: must be 0 (keep nothing on disk) or more.")
        if not (math.isfinite(self.chunk_mb) and 1 <= self.chunk_mb * 2**20 <= 2**30):
            raise UserError(f"data.access.chunk_mb={self.chunk_mb}: must be more than 0 and at most 1024.")
        if self.retries < 0:
            raise UserError(f"data.access.retries={self.retries}: must be 0 (give up at the first failure) or more.")
        if self.cache_dir is not None and (not self.cache_dir or REMOTE.match(self.cache_dir)):
            raise UserError(f"data.access.cache_dir={self.cache_dir!r}: must be a folder on this machine, or null.")

    @property
    def chunk(self) -> int:
        return int(self.chunk_mb * 2**20)

    @property
    def capacity(self) -> int:
        return int(self.cache_gb * 1e9)

    @property
    def folder(self) -> Path:
        return Path(self.cache_dir).expanduser().resolve() if self.cache_dir else paths.home() / "cache"


def is_remote(path: str | Path) -> bool:
    """Whether a name is a URL of anything but this machine's files. A Path never is: it folds the two slashes into one."""
    found = REMOTE.match(path) if isinstance(path, str) else None
    return found is not None and found[1].lower() != "file"


def local_path(path: str | Path) -> Path:
    """The absolute path of a file on this machine, named by a path or by file://."""
    text = re.sub(r"^file://(localhost(?=/))?", "", str(path), flags=re.IGNORECASE)
    return Path(os.path.abspath(Path(text).expanduser()))


def open_file(path: str | Path, access: Access = Access()) -> ShardFile:
    """A file for random reads. Costs nothing: it is looked for at its first use (which then may raise MissingError)."""
    return RemoteFile(str(path), access) if is_remote(path) else LocalFile(str(path), access)


def size_of(path: str | Path, access: Access = Access()) -> int:
    """Bytes of a file. Raises MissingError, UserError, ReadError."""
    file = open_file(path, access)
    try:
        return file.size
    finally:
        file.close()


def exists(path: str | Path, access: Access = Access()) -> bool:
    """Whether there is such a file (a folder is none). Raises UserError where that cannot be told, as without access."""
    if not is_remote(path):
        return local_path(path).is_file()
    try:
        return size_of(path, access) >= 0
    except MissingError:
        return False


def matches(piece: str, access: Access = Access()) -> list[str]:
    """Files that a pattern without braces names: the one of just that name (also with a * in it), else what it matches, sorted.

    A web server cannot be asked what it holds: an http(s) piece is one URL, and a * in it raises UserError.
    """
    if not is_remote(piece):
        path = local_path(piece)
        if path.is_file():
            return [str(path)]
        found = glob.glob(str(path), recursive=True) if glob.has_magic(piece) else []
        return sorted(match for match in found if os.path.isfile(match))
    web = re.match("https?://", piece, re.IGNORECASE)
    if web and "*" in piece.partition("?")[0]:
        raise UserError(f"{shown(piece)}: a web server cannot list files. Name them with braces, as in shard-{{000..127}}.tar.")
    if exists(piece, access):
        return [piece]
    if web or not glob.has_magic(piece):
        return []

    def listed() -> list[str]:
        fs = filesystem(piece)
        path = fs._strip_protocol(piece)
        before = piece[: len(piece) - len(path)]  # scheme and host, which fsspec takes off and does not give back
        found = _call(fs, "glob", path, detail=True)
        return sorted(before + name for name, info in found.items() if info["type"] == "file")

    return persist(piece, access, listed)


def expand(pattern: str, access: Access = Access()) -> list[str]:
    """All files a pattern names: braces in their order, what * matches in sorted order. Raises UserError if any is not there."""
    from braceexpand import braceexpand

    try:
        pieces = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{shown(pattern)}: {error}. Write braces as in shard-{{000..127}}.tar.") from error
    found: list[str] = []
    for piece in pieces:
        if not (files := matches(piece, access)):
            part = f" ({shown(piece)})" if piece != pattern else ""
            raise MissingError(f"{shown(pattern)}{part}: no such file. Correct the pattern, or bring the shards there.")
        found += files
    return found


def shown(name: str) -> str:
    """A name as messages may show it: a URL without its password, and without its query, which may be a signature."""
    if not is_remote(name):
        return name
    return re.sub(r"\?.*", "?...", re.sub(r"(://)[^/@]*@", r"\1...@", name), flags=re.DOTALL)


# ------------------------------------------------------------------------------------------------------------- retrying


def persist(name: str, access: Access, attempt: Callable[[], T], recover: Callable[[], None] = lambda: None) -> T:
    """Do what `attempt` does, again after a pause where it fails in passing; `recover` runs before each further attempt."""
    for number in range(access.retries + 1):
        try:
            return attempt()
        except Exception as error:
            if isinstance(error, UserError):
                raise
            if verdict := (judge_remote(name, error) if is_remote(name) else judge_local(name, error)):
                raise verdict from error
            if number == access.retries:
                raise ReadError(
                    f"{shown(name)} could not be read in {number + 1} attempts; the last error: {described(error)}. This says "
                    "nothing about the file's content. When the disk or the network is well again, the same command goes on from "
                    "the last checkpoint (data.access.retries sets the number of further attempts)."
                ) from error
            # Workers that were cut off together must not come back together; keyed, so that nobody's random state moves.
            jitter = 0.5 + keyed("pause", name, os.getpid(), number) / 2**65
            time.sleep(min(PAUSE * 2**number, LONGEST_PAUSE) * jitter)
            recover()
    raise AssertionError("unreachable")


def described(error: BaseException) -> str:
    # aiohttp's texts can hold the whole URL, signature included.
    text = re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", str(error))
    return f"{type(error).__name__}: {text}" if text and not isinstance(error, _Hiccup) else text or type(error).__name__


def judge_local(name: str, error: Exception) -> UserError | None:
    """The UserError that an error of this machine's files stands for; None: try again."""
    if not isinstance(error, OSError | _Hiccup):
        raise error
    if (number := getattr(error, "errno", None)) not in PERMANENT:
        return None
    kind = MissingError if number in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG) else UserError
    return kind(f"{name}: {PERMANENT[number]}. Correct the name or its permissions, or bring the file there.")


def judge_remote(name: str, error: Exception) -> UserError | None:
    """The UserError that an error of a remote request stands for; None: try again. Raises any other error again."""
    where, scheme = shown(name), REMOTE.match(name)[1].lower()  # type: ignore[index]
    kinds = " ".join(cls.__name__ for cls in type(error).__mro__)
    if isinstance(error, ImportError):
        install = "pip install 'mm1-ablations[remote]'"
        return UserError(f"{where}: the driver for {scheme}:// is missing ({error}). Install it: {install}")
    status = status_of(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return MissingError(f"{where}: no such file ({status or described(error)}). Correct the name, or bring the file there.")
    credentials = re.search("Credential|ProfileNotFound|DefaultCredentialsError|RefreshError|UnauthorizedSSOToken", kinds)
    if isinstance(error, PermissionError) or status in (401, 403) or (credentials and not getattr(error, "retryable", False)):
        advice = ADVICE.get(scheme, ADVICE[""])
        return UserError(f"{where}: no access ({status or described(error)}). {advice} See docs/remote.md.")
    if "CertificateError" in kinds or "SSLCertVerificationError" in kinds:
        return UserError(f"{where}: its certificate is not trusted ({described(error)}). Correct the URL, or SSL_CERT_FILE.")
    if status in (412, 416):
        return changed(name, f"the server no longer has the bytes that were there ({status})")
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        return UserError(f"{where}: the request is refused ({described(error)}). Correct the URL or the endpoint.")
    if isinstance(error, IsADirectoryError):
        return UserError(f"{where}: it is a folder, not a file. Name the shards in it, as in {where.rstrip('/')}/*.tar.")
    if isinstance(error, _Hiccup | OSError | TimeoutError | EOFError):
        return None
    package = (type(error).__module__ or "").partition(".")[0]
    if isinstance(error, ValueError):  # fsspec's and the drivers' word for a URL or a setting they cannot use; also aiohttp's
        return UserError(f"{where}: {described(error)}. Correct the URL, or the settings of {scheme}:// (docs/remote.md).")
    if package in ("aiohttp", "aiobotocore", "botocore", "google", "gcsfs", "requests", "urllib3"):
        return None
    raise error


ADVICE = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, for another server FSSPEC_S3_ENDPOINT_URL, for public "
    "buckets FSSPEC_S3_ANON=true.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS or run gcloud auth application-default login, for public buckets set "
    "FSSPEC_GS_TOKEN=anon.",
    "gcs": "Set GOOGLE_APPLICATION_CREDENTIALS or run gcloud auth application-default login, for public buckets set "
    "FSSPEC_GCS_TOKEN=anon.",
    "": "Give the credentials this server wants in fsspec's configuration (~/.config/fsspec or FSSPEC_<SCHEME>_<OPTION>).",
}


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error: aiohttp and gcsfs carry it, s3fs has botocore's response in the error's cause."""
    while error is not None:
        if type(error).__module__.startswith("aiohttp") and not hasattr(error, "request_info"):
            return None  # aiohttp's parser says 400 of any answer that is cut short; the server did not
        answer = getattr(error, "response", None)
        data = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
        for value in (getattr(error, "status", None), getattr(error, "code", None), data.get("HTTPStatusCode")):
            if (text := str(value)).isdigit() and 100 <= int(text) < 600:  # gcsfs has it as text at times
                return int(text)
        error = error.__cause__
    return None


# ----------------------------------------------------------------------------------------------------------- this machine


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
                raise _Hiccup(f"nothing came at byte {offset} of {self._size}")
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


def extent(offset: int, size: int, total: int) -> int:
    """How many of the `size` bytes from `offset` on a file of `total` bytes has."""
    if offset < 0 or size < 0:
        raise ValueError(f"offset={offset} and size={size} must not be negative")
    return max(0, min(size, total - offset))


def changed(name: str, how: str) -> UserError:
    return UserError(f"{shown(name)} changed while in use: {how}. Restore it, or prepare the corpus again and begin a new run.")


# -------------------------------------------------------------------------------------------------------------- remote


class _Process:
    """What belongs to one process: filesystems with their connections, the last chunks, what was already said."""

    def __init__(self, before: _Process | None) -> None:
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


_process: _Process | None = None


def here() -> _Process:
    global _process
    if _process is None or _process.pid != os.getpid():
        _process = _Process(_process)
    return _process


def forget() -> None:
    """Drop this process's connections and chunks in memory, so that changed credentials or endpoints take effect."""
    global _process
    _process = None


def filesystem(url: str) -> Any:
    """fsspec's filesystem for a URL, one for each process and server. Raises ImportError or ValueError without a driver."""
    import fsspec

    scheme = REMOTE.match(url)[1].lower()  # type: ignore[index]
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


def _call(fs: Any, method: str, *args: object, **kwargs: object) -> Any:
    if not getattr(fs, "async_impl", False):
        return getattr(fs, method)(*args, **kwargs)
    from fsspec.asyn import sync

    return sync(fs.loop, getattr(fs, "_" + method), *args, timeout=PATIENCE, **kwargs)


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
    names = ("etag", "generation", "content-md5", "last-modified", "lastmodified", "last_modified", "mtime", "updated", "created")
    lower = {key.lower(): value for key, value in info.items()}
    return next((f"{name} {lower[name]}" for name in names if lower.get(name)), "")


class RemoteFile:
    """A file behind a URL, read in aligned chunks that are kept in memory for a while and on disk for long."""

    def __init__(self, name: str, access: Access) -> None:
        self.name, self.access, self.cache = name, access, Cache(access.folder, access.capacity)
        self._web = re.match("https?://", name, re.IGNORECASE) is not None
        self._version: Version | None = None
        self._key = ""

    @property
    def size(self) -> int:
        return self.version.size

    @property
    def version(self) -> Version:
        """Asked for once; the children of a process inherit it, so that all of them insist on the same one."""
        if self._version is None:
            self._version = persist(self.name, self.access, self._web_version if self._web else self._info)
            text = "\x1f".join([self.name, str(self._version.size), self._version.stamp, str(self.access.chunk)])
            self._key = hashlib.sha256(text.encode()).hexdigest()
        return self._version

    def _info(self) -> Version:
        fs = filesystem(self.name)
        info = _call(fs, "info", fs._strip_protocol(self.name))
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
        start = run.start * self.access.chunk
        end = min(run.stop * self.access.chunk, self.size)
        if self._web:
            return self._web_fetch(run, start, end)
        fs = filesystem(self.name)
        path = fs._strip_protocol(self.name)
        data = _call(fs, "cat_file", path, start=start, end=end)
        # Asked after the bytes came: if it is still the version that was opened, they are of that version too.
        now = self._info()
        self.version.require(self.name, now.size, now.stamp)
        if len(data) != end - start:
            raise _Hiccup(f"{len(data)} bytes came for bytes {start} to {end}")
        return self._split(run, data)

    def _split(self, run: range, data: bytes) -> dict[int, bytes]:
        chunk = self.access.chunk
        parts = {number: bytes(data[(number - run.start) * chunk : (number - run.start + 1) * chunk]) for number in run}
        for number, part in parts.items():
            self._keep(number, part)
        return parts

    # Web servers get requests of our own: fsspec's cat_file gives no headers, and they say which version the bytes are of
    # and whether Range was heard.

    def _request(self, headers: Mapping[str, str], handle: Callable[[Any], Any]) -> Any:
        import aiohttp
        from fsspec.asyn import sync

        fs = filesystem(self.name)

        async def request() -> Any:
            session = await fs.set_session()
            options = dict(fs.kwargs)
            options["headers"] = dict(options.get("headers") or {}) | {"Accept-Encoding": "identity"} | dict(headers)
            options.setdefault("timeout", aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE))
            async with session.get(fs.encode_url(self.name), **options) as answer:
                if answer.status not in (200, 206, 416):
                    answer.raise_for_status()
                    raise _Hiccup(f"the server answers {answer.status} {answer.reason}")
                return await handle(answer)

        return sync(fs.loop, request, timeout=PATIENCE)

    def _web_version(self) -> Version:
        """Asked with a GET of one byte and not with HEAD: signed URLs allow only GET, and the answer shows if Range works."""

        async def handle(answer: Any) -> Version:
            stamp = stamp_of(answer.headers)
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if answer.status in (206, 416) and total.isdigit():
                return Version(int(total), stamp)
            length = answer.headers.get("Content-Length", "")
            if answer.status != 200 or not length.isdigit() or answer.headers.get("Content-Encoding", "identity") != "identity":
                raise UserError(f"{shown(self.name)}: the server does not say how large it is. Copy the shard to this machine.")
            answer.close()  # the whole file is on its way
            return Version(int(length), stamp, ranges=int(length) <= 1)

        return self._request({"Range": "bytes=0-0"}, handle)

    def _web_fetch(self, run: range, start: int, end: int) -> dict[int, bytes]:
        if self.version.ranges:
            return self._web_get(run, start, end)
        if not self.cache.takes(self.size):
            raise UserError(
                f"{shown(self.name)}: the server cannot send parts of a file, so that every read would fetch all of its "
                f"{self.size / 1e9:.2f} GB, and the cache at {self.cache.folder} cannot keep it whole. Set data.access.cache_gb "
                f"above that (it is {self.access.cache_gb:g}) on a disk with room, or copy the shards to this machine."
            )
        with self.cache.lock(f"{self._key}.lock"):  # one process fetches the file, the others find it in the cache
            kept = {number: self.cache.get(self._key, number, self._length(number), 0, self._length(number)) for number in run}
            if all(data is not None for data in kept.values()):
                return {number: data for number, data in kept.items() if data is not None}
            return self._web_get(run, start, end)

    def _web_get(self, run: range, start: int, end: int) -> dict[int, bytes]:
        async def handle(answer: Any) -> dict[int, bytes]:
            if answer.status == 206:
                found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
                if not found or int(found[1]) != start:
                    raise _Hiccup(f"for bytes {start}-{end - 1} came {answer.headers.get('Content-Range')!r}")
                self.version.require(self.name, int(found[3]) if found[3] != "*" else None, self._stamp(answer))
                data = await answer.read()
                if len(data) != end - start:
                    raise _Hiccup(f"{len(data)} bytes came for bytes {start}-{end - 1}")
                return self._split(run, data)
            if answer.status == 416:
                total = answer.headers.get("Content-Range", "").rpartition("/")[2]
                raise changed(self.name, f"it had {self.size} bytes when it was opened and has {total or 'fewer'} now")
            return await self._whole(answer, run)

        return self._request({"Range": f"bytes={start}-{end - 1}"}, handle)

    async def _whole(self, answer: Any, run: range) -> dict[int, bytes]:
        """Range was not heard and the whole file comes: keep all of it on disk as it passes, and of it only `run` in memory."""
        length = answer.headers.get("Content-Length", "")
        self.version.require(self.name, int(length) if length.isdigit() else None, self._stamp(answer))
        wanted: dict[int, bytes] = {}
        number, buffer, store = 0, bytearray(), self.cache.takes(self.size)
        async for piece in answer.content.iter_any():
            buffer += piece
            while number * self.access.chunk < self.size and len(buffer) >= (length_now := self._length(number)):
                data, buffer = bytes(buffer[:length_now]), buffer[length_now:]
                if number in run:
                    wanted[number] = data
                    here().remember((self._key, number), data)
                if store:
                    self.cache.put(self._key, number, data)
                number += 1
        if number * self.access.chunk < self.size or buffer:
            raise _Hiccup(f"the body does not have the {self.size} bytes it should have")
        return wanted

    def _stamp(self, answer: Any) -> str:
        """The answer's stamp if it is of the kind that was there at opening: an ETag cannot be compared with a time."""
        stamp = stamp_of(answer.headers)
        return stamp if stamp.partition(" ")[0] == self.version.stamp.partition(" ")[0] else ""


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


# --------------------------------------------------------------------------------------------------------------- cache


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
    view = memoryview(data)
    blocks = range(0, len(data), BLOCK)
    return b"".join(hashlib.blake2b(view[start : start + BLOCK], digest_size=DIGEST).digest() for start in blocks)


def seal(key: str, number: int, table: bytes) -> bytes:
    """Binds the digests to the chunk they are of, so that a file under another chunk's name is not taken for it."""
    return hashlib.blake2b(f"{key}/{number}/".encode() + table, digest_size=DIGEST).digest()
