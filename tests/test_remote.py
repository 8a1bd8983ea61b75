"""A corpus of shards behind URLs is the same corpus: prepared, verified and streamed through a server that fails now and then."""

# ruff: noqa: F811 (a fixture's name is both an import and an argument)
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.config import DataConfig, PackingConfig, SourceConfig
from data_pipelines.corpora.config import TarsConfig
from data_pipelines.lanes import LaneStream
from data_pipelines.loader import PackedLoader, digest
from data_pipelines.prepare import prepare
from data_pipelines.shards import Manifest
from data_pipelines.storage import Access
from data_pipelines.storage.process import forget
from data_pipelines.tokens import load_tokenizer
from data_pipelines.verify import main as verify
from tests.storage import Server, bucket, fine, quick, serving, status  # noqa: F401 (fixtures)
from tests.test_tars import config, shards  # noqa: F401 (fixtures)

SOURCES = ("captions", "interleaved", "text")


def digests(folder: Path, access: Access, workers: int = 0, block: int = 1) -> list[tuple[int, int, str]]:
    data = DataConfig(str(folder), {name: SourceConfig(name, 1 / 3) for name in SOURCES}, access=access, block=block)
    tokenizer = load_tokenizer(folder / "tokenizer")
    stream = LaneStream(folder, data, PackingConfig(96, 4), tokenizer, image_tokens=4, global_batch=4, seed=0)
    loader = PackedLoader(stream, image_size=None, micro_batch=1, workers=workers)
    return [(item.step, item.slot, digest(item)) for item, _ in islice(loader.sequences(), 60)]


@pytest.fixture
def web(shards: Path) -> Iterator[Server]:
    yield from serving(Server({path.name: path.read_bytes() for path in sorted(shards.glob("*.tar"))}))


def remote(config: TarsConfig, place: str) -> TarsConfig:
    return replace(
        config,
        name="remote",
        captions=f"{place}/cap-{{000..003}}.tar",
        interleaved=f"{place}/page-{{000..002}}.tar",
        text=[f"{place}/text-000.tar"],
    )


@pytest.mark.usefixtures("quick")
def test_shards_on_a_web_server_with_hiccups(
    config: TarsConfig,
    web: Server,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = prepare(config)
    web.faults = [*islice(cycle([fine, status(503), fine, status(500)]), 60)]
    there = prepare(remote(config, web.url("")[:-1]))
    assert Manifest.load(there).fingerprint == Manifest.load(here).fingerprint
    access = Access(chunk_mb=4096 / 2**20, retries=4)
    web.faults = [*islice(cycle([status(429), fine]), 40)]
    expected = digests(here, access)
    assert digests(there, access) == expected
    asked = len(web.asked)
    assert digests(there, access, workers=2) == expected
    assert len(web.asked) - asked <= 2 * 8 + 8, "chunks come from the cache, files are asked for their version only"
    assert digests(there, access, block=4) == digests(here, access, block=4)

    capsys.readouterr()
    assert verify([str(there), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["faults"] == 0


@pytest.mark.usefixtures("quick")
def test_shards_in_a_bucket_whose_every_second_read_fails(
    config: TarsConfig,
    shards: Path,
    bucket: tuple[Any, Any],
) -> None:
    client, proxy = bucket
    client.create_bucket(Bucket="corpus")
    for path in shards.glob("*.tar"):
        client.put_object(Bucket="corpus", Key=f"mine/{path.name}", Body=path.read_bytes())
    proxy.failure = 503
    here, there = prepare(config), prepare(replace(remote(config, "s3://corpus/mine"), interleaved="s3://corpus/mine/page-*.tar"))
    assert Manifest.load(there).fingerprint == Manifest.load(here).fingerprint
    access = Access(chunk_mb=4096 / 2**20, retries=6)
    assert digests(there, access, workers=2) == digests(here, access)
    assert proxy.count > 10
    forget()
