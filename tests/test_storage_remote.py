"""Drivers of fsspec: S3 through a proxy that fails, a driver that is missing, a file that changes behind a driver."""

# ruff: noqa: F811 (a fixture's name is both an import and an argument)
from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from configs.errors import UserError
from data_pipelines.storage import ReadError, exists, matches, open_file
from tests.storage import CHUNK, DATA, Proxy, access, bucket, in_a_child, places, quick, server  # noqa: F401 (fixtures)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # a test before may have loaded the driver
    with pytest.raises(UserError, match=r"s3://.*pip install 'mm1-ablations\[remote\]'"):
        open_file("s3://bucket/a.tar", access()).read(0, 1)
    with pytest.raises(UserError, match="Protocol not known"):
        open_file("nonsense://a.tar", access()).read(0, 1)


def test_a_changed_file_in_memory_is_noticed(places: dict[str, str]) -> None:
    """fsspec's common road, without headers: asked again after every request."""
    import fsspec

    file = open_file(places["memory"], access())
    assert file.read(0, 10) == DATA[:10]
    fsspec.filesystem("memory").pipe_file("/shards/a.tar", DATA[::-1])
    with pytest.raises(UserError, match="changed while in use"):
        file.read(3 * CHUNK, 10)


def test_s3(bucket: tuple[Any, type[Proxy]]) -> None:
    """One server for all of it: starting one costs seconds."""
    client, proxy = bucket
    assert matches("s3://shards/in/*.tar") == ["s3://shards/in/a.tar", "s3://shards/in/b.tar"]
    proxy.failure = 503
    file = open_file("s3://shards/in/a.tar", access())
    for offset, size in [(0, 9), (CHUNK - 5, 10), (len(DATA) - 9, 99), (3 * CHUNK, 3 * CHUNK)]:
        assert file.read(offset, size) == DATA[offset : offset + size]
    asked = proxy.asked
    assert file.read(3 * CHUNK, CHUNK) == DATA[3 * CHUNK : 4 * CHUNK]
    assert proxy.asked == asked
    in_a_child(lambda: None if open_file("s3://shards/in/b.tar", access()).read(9, 9) == DATA[::-1][9:18] else os._exit(3))
    with pytest.raises(ReadError, match=r"s3://shards/in/b.tar could not be read in 1 attempts"):
        open_file("s3://shards/in/b.tar", access(retries=0, cache_gb=0)).read(5 * CHUNK, 9)
    proxy.failure, proxy.count = -1, 0
    with pytest.raises(ReadError, match="in 1 attempts"):  # s3fs does not try again on its own account
        open_file("s3://shards/in/b.tar", access(retries=0, cache_gb=0)).read(5 * CHUNK, 9)
    assert open_file("s3://shards/in/b.tar", access(cache_gb=0)).read(5 * CHUNK, 9) == DATA[::-1][5 * CHUNK :][:9]
    proxy.failure = 0
    for name in ("s3://shards/in/no.tar", "s3://nowhere/a.tar"):
        assert not exists(name, access())
    proxy.failure, proxy.count = 403, 0
    with pytest.raises(UserError, match=r"no access .*AWS_ACCESS_KEY_ID.*FSSPEC_S3_ENDPOINT_URL"):
        open_file("s3://shards/in/b.tar", access(cache_gb=0)).read(7 * CHUNK, 9)
    proxy.failure = 0
    client.put_object(Bucket="shards", Key="in/a.tar", Body=DATA[::-1])  # of the same size
    with pytest.raises(UserError, match="changed while in use: its version was"):
        file.read(2 * CHUNK, 9)


def test_s3_without_credentials(bucket: tuple[Any, type[Proxy]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"no access .*AWS_ACCESS_KEY_ID") as caught:
        open_file("s3://shards/in/a.tar", access()).read(0, 1)
    assert not isinstance(caught.value, ReadError)
