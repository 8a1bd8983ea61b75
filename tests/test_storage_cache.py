"""The cache of remote shards: nothing is asked for twice, nothing damaged is believed, its room is kept by all who share it."""

# ruff: noqa: F811 (a fixture's name is both an import and an argument)
from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.storage import open_file
from data_pipelines.storage.process import forget, here
from tests.storage import CHUNK, DATA, Server, access, quick, server  # noqa: F401 (fixtures)


def cached(home: Path) -> list[Path]:
    return sorted(path for path in (home / "cache").glob("*/*"))


def test_what_is_cached_is_not_asked_for(server: Server, home: Path) -> None:
    assert open_file(server.url(), access()).read(0, len(DATA)) == DATA
    assert len(cached(home)) == 8
    asked = len(server.asked)
    forget()
    file = open_file(server.url(), access())
    assert file.read(0, len(DATA)) == DATA
    assert file.read(CHUNK - 2, 4) == DATA[CHUNK - 2 : CHUNK + 2]
    assert len(server.asked) == asked + 1  # the version alone
    assert open_file(server.url("b.tar"), access()).read(0, 4) == DATA[::-1][:4]  # another file's chunk 0 is another


def test_zero_keeps_nothing(server: Server, home: Path) -> None:
    assert open_file(server.url(), access(cache_gb=0)).read(0, 9) == DATA[:9]
    assert not (home / "cache").exists()


@pytest.mark.parametrize("how", ["flip", "flip late", "short", "long", "empty", "swapped", "table"])
def test_a_damaged_cache_file_is_fetched_again(server: Server, home: Path, how: str) -> None:
    file = open_file(server.url(), access())
    assert file.read(0, 2 * CHUNK) == DATA[: 2 * CHUNK]
    zero, one = cached(home)
    good = zero.read_bytes()
    at = {"flip": 100, "flip late": CHUNK - 1, "table": CHUNK + 3}.get(how, 0)
    bad = {"short": good[:-1], "long": good + b"x", "empty": b"", "swapped": one.read_bytes()}
    zero.write_bytes(bad.get(how, good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]))
    here().chunks.clear()
    asked = len(server.asked)
    assert file.read(0, CHUNK) == DATA[:CHUNK]
    assert len(server.asked) == asked + 1
    assert zero.read_bytes() == good


def test_the_cache_stays_within_its_room_and_keeps_what_was_used_last(server: Server, home: Path) -> None:
    room = 4 * (CHUNK + 100)
    setting = access(cache_gb=room / 1e9)
    file = open_file(server.url(), setting)
    for number in [0, 1, 2, 3, 0, 4, 5, 0, 6, 7]:
        here().chunks.clear()
        for age, path in enumerate(sorted(cached(home), key=lambda path: -path.stat().st_mtime), start=1):
            os.utime(path, (time.time() - 100 * age,) * 2)  # older than the minute within which a use is not noted
        assert file.read(number * CHUNK, 10) == DATA[number * CHUNK :][:10]
        assert sum(path.stat().st_size for path in cached(home)) <= room
    names = {path.name for path in cached(home)}
    assert {"0", "7"} <= names
    assert [span for _, span in server.asked].count(f"bytes=0-{CHUNK - 1}") == 1
    assert "1" not in names


def test_a_lost_count_and_a_dead_writers_rest_are_cleared_up(server: Server, home: Path) -> None:
    setting = access(cache_gb=3 * (CHUNK + 100) / 1e9)
    file = open_file(server.url(), setting)
    assert file.read(0, 2 * CHUNK)
    rest = cached(home)[0].with_name("9.dead.partial")
    rest.write_bytes(bytes(CHUNK))
    os.utime(rest, (0, 0))
    (home / "cache" / "usage").unlink()
    assert file.read(2 * CHUNK, 2 * CHUNK) == DATA[2 * CHUNK : 4 * CHUNK]
    assert not rest.exists()
    assert sum(path.stat().st_size for path in cached(home)) <= setting.capacity


def test_a_full_disk_ends_caching_with_one_warning(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = open_file(server.url(), access())
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert file.read(0, 10) == DATA[:10]
        assert file.read(3 * CHUNK, 10) == DATA[3 * CHUNK :][:10]
    said = capsys.readouterr().err
    assert said.count("nothing more is cached") == 1
    assert "data.access.cache_dir" in said
    assert cached(home) == []


READER = """
import sys
from data_pipelines.storage import Access, open_file, retry
from data_pipelines.storage.process import here
retry.PAUSE = 0.001
url, folder, seed, chunk, room = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
file = open_file(url, Access(cache_dir=folder, chunk_mb=chunk / 2**20, cache_gb=room / 1e9))
data = open(sys.argv[6], "rb").read()
for step in range(60):
    here().chunks.clear()
    offset = (seed * 7919 + step * 104729) % file.size
    assert file.read(offset, 70000) == data[offset : offset + 70000], offset
    if step % 10 == 0:
        print(here().full, flush=True)
"""


def test_two_processes_share_a_cache(server: Server, tmp_path: Path) -> None:
    """With less room than both want, so that each removes what the other wrote."""
    (tmp_path / "data").write_bytes(DATA)
    room = 5 * (CHUNK + 100)
    command = [sys.executable, "-c", READER, server.url(), str(tmp_path / "shared")]
    rest = [str(CHUNK), str(room), str(tmp_path / "data")]
    children = [
        subprocess.Popen([*command, seed, *rest], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for seed in "12"
    ]
    for child in children:
        out, err = child.communicate(timeout=40)
        assert child.returncode == 0, err
        assert set(out.split("\n")) == {"set()", ""}, err
    assert sum(path.stat().st_size for path in (tmp_path / "shared").glob("*/*")) <= room
    assert not list((tmp_path / "shared").glob("*/*.partial"))
