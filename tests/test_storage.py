"""Reading shards: wherever they lie, a read gives the file's bytes or says why not, and never bytes of something else."""

# ruff: noqa: F811 (a fixture's name is both an import and an argument)
from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from data_pipelines.storage import (
    Access,
    MissingError,
    ShardFile,
    exists,
    expand,
    is_remote,
    local_path,
    matches,
    open_file,
    shown,
    size_of,
)
from data_pipelines.storage.local import LocalFile
from data_pipelines.storage.process import here
from data_pipelines.storage.remote import RemoteFile
from data_pipelines.storage.web import WebFile
from tests.storage import CHUNK, DATA, ROOMY, Server, access, in_a_child, places, quick, server  # noqa: F401 (fixtures)

# ------------------------------------------------------------------------------------------------------------- any reads

READS = st.lists(st.tuples(st.integers(0, len(DATA) + 10), st.integers(0, 3 * CHUNK)), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reads=READS, gigabytes=st.sampled_from([0.0, 0.0002, ROOMY]), again=st.booleans())
def test_any_reads_are_slices(places: dict[str, str], reads: list[tuple[int, int]], gigabytes: float, again: bool) -> None:
    """With no cache, one that holds two chunks, a roomy one; again: with nothing in memory before every read."""
    for url in places.values():
        file = open_file(url, access(cache_gb=gigabytes))
        assert (file.name, file.size) == (url, len(DATA))
        for offset, size in reads:
            if again:
                here().chunks.clear()
            assert file.read(offset, size) == DATA[offset : offset + size]


def test_the_end_and_nothing(places: dict[str, str], server: Server) -> None:
    for url in places.values():
        file = open_file(url, access())
        assert file.read(len(DATA) - 3, 10) == DATA[-3:]
        assert file.read(len(DATA), 10) == file.read(5, 0) == b""
        with pytest.raises(ValueError, match="negative"):
            file.read(-1, 10)
        file.close()
        assert file.read(1, 2) == DATA[1:3]
    assert open_file(server.url("empty.tar"), access()).read(0, 10) == b""


# ----------------------------------------------------------------------------------------------------- names and settings


def test_names(tmp_path: Path) -> None:
    assert [is_remote(name) for name in ("s3://b/x", "HTTPS://h/x", "memory://x", "a+b://x")] == [True] * 4
    assert [is_remote(name) for name in ("file:///x", "/x", "x", "a:b", Path("s3://b/x"), "./s3://")] == [False] * 6
    assert [type(open_file(name)) for name in ("Http://h/x", "HTTPS://h/x", "s3://b/x", "file:///x")] == [
        WebFile,
        WebFile,
        RemoteFile,
        LocalFile,
    ]
    assert local_path("file:///a/b") == local_path("file://localhost/a/b") == Path("/a/b")
    assert shown("https://me:secret@h/x?X-Signature=y") == "https://...@h/x?..."


def test_sizes_and_presence(places: dict[str, str], server: Server, tmp_path: Path) -> None:
    for url in places.values():
        assert size_of(url, access()) == len(DATA)
        assert exists(url, access())
        assert not exists(url + ".no", access())
        with pytest.raises(MissingError, match=re.escape(".no: no such file")):
            open_file(url + ".no", access()).read(0, 1)
    assert not exists(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        open_file(tmp_path).read(0, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cache_gb", -1.0),
        ("cache_gb", float("inf")),
        ("chunk_mb", 0.0),
        ("chunk_mb", 5e3),
        ("retries", -1),
        ("cache_dir", "s3://x"),
        ("cache_dir", "file:///x"),
        ("cache_dir", ""),
    ],
)
def test_impossible_settings(key: str, value: Any) -> None:
    Access().validate()
    with pytest.raises(UserError, match=f"data.access.{key}="):
        Access(**{key: value}).validate()


def test_patterns(places: dict[str, str], server: Server, tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe({"/shards/c.tar": b"c", "/shards/b*.tar": b"b", "/shards/bb.tar": b"bb"})
    for name in ("c.tar", "b*.tar", "bb.tar"):
        (tmp_path / name).write_bytes(b"")
    for folder in (str(tmp_path), "memory://shards"):
        assert matches(f"{folder}/*.tar") == [f"{folder}/{name}.tar" for name in ("a", "b*", "bb", "c")]
        assert matches(f"{folder}/b*.tar") == [f"{folder}/b*.tar"]  # the file of just that name
        assert matches(f"{folder}/no*.tar") == matches(f"{folder}/no.tar") == []
        assert expand(f"{folder}/{{c,a}}.tar") == [f"{folder}/c.tar", f"{folder}/a.tar"]
        with pytest.raises(UserError, match=r"\{a,no\}.tar \(.*/no.tar\): no such file"):
            expand(f"{folder}/{{a,no}}.tar")
    assert expand(server.url("{b,a}.tar")) == [server.url("b.tar"), server.url("a.tar")]
    assert matches(server.url("a.tar?signature=*")) == [server.url("a.tar?signature=*")]
    assert matches(server.url("no.tar")) == []
    with pytest.raises(UserError, match="a web server cannot list files"):
        matches(server.url("*.tar"))


# ------------------------------------------------------------------------------------------------------------ processes


def test_a_fork_after_use_reads_on(places: dict[str, str]) -> None:
    for url in places.values():
        file = open_file(url, access(cache_gb=0))
        assert file.read(0, 9) == DATA[:9]

        def work(file: ShardFile = file) -> None:
            for number in (5, 2, 0):
                assert file.read(number * CHUNK, 9) == DATA[number * CHUNK :][:9]
            file.close()

        in_a_child(work)
        in_a_child(work)
        assert file.read(6 * CHUNK, 9) == DATA[6 * CHUNK :][:9]


def test_pickled_files_insist_on_the_version_they_were_opened_with(places: dict[str, str], server: Server) -> None:
    for url in places.values():
        file = open_file(url, access(retries=0))
        assert file.read(3, 9) == DATA[3:12]
        copy = pickle.loads(pickle.dumps(file))
        assert copy.read(3, 9) == DATA[3:12]
        copy.close()
        assert file.read(5, 9) == DATA[5:14]
    file = open_file(server.url("b.tar"), access(cache_gb=0))
    assert file.size
    copy = pickle.loads(pickle.dumps(file))
    server.etags["b.tar"] = '"two"'
    with pytest.raises(UserError, match="changed while in use"):
        copy.read(0, 1)


def test_importing_and_local_reading_need_no_driver(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    code = (
        "import sys; from data_pipelines.storage import open_file; open_file(sys.argv[1]).read(0, 9);"
        "assert not {'fsspec', 'aiohttp', 'torch', 's3fs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.tar")], check=True, timeout=30)
