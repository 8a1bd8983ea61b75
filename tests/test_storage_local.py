"""Files of this machine: hiccups of network disks pass, what is gone or forbidden is said at once, descriptors are given back."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipelines.storage import ReadError, open_file
from tests.storage import DATA, access, quick  # noqa: F401 (fixtures)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENETDOWN])
def test_a_local_hiccup_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    pread, failures, handles = os.pread, [number, number, None], []

    def failing(handle: int, size: int, offset: int) -> bytes:
        handles.append(handle)
        if failures and (failure := failures.pop(0)):
            raise OSError(failure, os.strerror(failure))
        return pread(handle, min(size, 1000), offset)  # and short reads, which are allowed

    monkeypatch.setattr(os, "pread", failing)
    opened: list[object] = []
    open_ = os.open
    monkeypatch.setattr(os, "open", lambda *args, **kwargs: opened.append(args) or open_(*args, **kwargs))
    file = open_file(tmp_path / "a.tar", access())
    assert file.read(500, 5000) == DATA[500:5500]
    assert len(opened) == 3  # a stale handle would have failed for ever
    failures[:] = [number] * 9
    with pytest.raises(ReadError, match=f"in 4 attempts.*{re.escape(os.strerror(number))}"):
        file.read(0, 1)
    failures.clear()
    assert file.read(0, 1) == DATA[:1]


def test_a_local_file_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(DATA)
    file = open_file(path, access(retries=0))
    assert file.size == len(DATA)
    with monkeypatch.context() as patch:  # the file is whole, but the read comes back with nothing: a hiccup
        patch.setattr(os, "pread", lambda *_: b"")
        with pytest.raises(ReadError, match="nothing came at byte 0"):
            file.read(0, 5)
    os.truncate(path, 1000)
    with pytest.raises(UserError, match="changed while in use: it had 480000 bytes when it was opened and has 1000 now"):
        file.read(900, 200)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_local_file_that_must_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    (tmp_path / "a.tar").chmod(0)
    with pytest.raises(UserError, match="not permitted"):
        open_file(tmp_path / "a.tar").read(0, 1)


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)

    def descriptors() -> int:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(link) == str(tmp_path / "a.tar") for link in links)

    files = [open_file(tmp_path / "a.tar") for _ in range(5000)]
    assert descriptors() == 0
    assert files[0].read(0, 1) == files[1].read(0, 1)
    assert descriptors() == 2
    files[0].close()
    assert descriptors() == 1
    del files
    assert descriptors() == 0
