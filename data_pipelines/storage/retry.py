"""What a failed read means: another attempt, a word to the user, or neither.

Three things can happen to a read, and they are kept apart. A hiccup (timeouts, 5xx, connections cut, short bodies, EIO) is
retried with growing pauses; if it does not pass it is a ReadError, which says nothing about the data and never counts as damage.
What only the user can mend (no such file, no access, no driver) is a UserError at once. A file that is no longer the one that was
opened is a UserError too, so that a run never mixes two versions of a shard.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

from configs.errors import UserError
from data_pipelines.order import keyed
from data_pipelines.storage.access import Access
from data_pipelines.storage.file import changed
from data_pipelines.storage.names import is_remote, scheme_of, shown

PAUSE = 0.5
"""Seconds before the first retry, doubled every time up to LONGEST_PAUSE."""
LONGEST_PAUSE = 30.0
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
ADVICE = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, for another server FSSPEC_S3_ENDPOINT_URL, for public "
    "buckets FSSPEC_S3_ANON=true.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS or run gcloud auth application-default login, for public buckets set "
    "FSSPEC_GS_TOKEN=anon.",
    "gcs": "Set GOOGLE_APPLICATION_CREDENTIALS or run gcloud auth application-default login, for public buckets set "
    "FSSPEC_GCS_TOKEN=anon.",
    "": "Give the credentials this server wants in fsspec's configuration (~/.config/fsspec or FSSPEC_<SCHEME>_<OPTION>).",
}

T = TypeVar("T")


class ReadError(UserError):
    """A file that could not be read after all retries. Its content is not in doubt: the same read may succeed later."""


class MissingError(UserError):
    """There is no such file."""


class Hiccup(Exception):
    """A failure that is worth another attempt."""


def persist(name: str, access: Access, attempt: Callable[[], T], recover: Callable[[], None] = lambda: None) -> T:
    """Do what `attempt` does, again after a pause where it fails in passing; `recover` runs before each further attempt.

    Raises UserError for what only the user can mend (MissingError: no such file), ReadError when the attempts are used up.
    """
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
    """An error's kind and text as messages may show them."""
    # aiohttp's texts can hold the whole URL, signature included.
    text = re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", str(error))
    return f"{type(error).__name__}: {text}" if text and not isinstance(error, Hiccup) else text or type(error).__name__


def judge_local(name: str, error: Exception) -> UserError | None:
    """The UserError that an error of this machine's files stands for; None: try again."""
    if not isinstance(error, OSError | Hiccup):
        raise error
    if (number := getattr(error, "errno", None)) not in PERMANENT:
        return None
    kind = MissingError if number in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG) else UserError
    return kind(f"{name}: {PERMANENT[number]}. Correct the name or its permissions, or bring the file there.")


def judge_remote(name: str, error: Exception) -> UserError | None:
    """The UserError that an error of a remote request stands for; None: try again. Raises any other error again."""
    where, scheme = shown(name), scheme_of(name)
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
    if isinstance(error, Hiccup | OSError | TimeoutError | EOFError):
        return None
    package = (type(error).__module__ or "").partition(".")[0]
    if isinstance(error, ValueError):  # fsspec's and the drivers' word for a URL or a setting they cannot use; also aiohttp's
        return UserError(f"{where}: {described(error)}. Correct the URL, or the settings of {scheme}:// (docs/remote.md).")
    if package in ("aiohttp", "aiobotocore", "botocore", "google", "gcsfs", "requests", "urllib3"):
        return None
    raise error


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
