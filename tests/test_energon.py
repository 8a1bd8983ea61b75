"""megatron-energon and the suite read the same tars to the same samples: the suite's shards there, energon's layout here."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import webdataset

from data_pipelines.corpora.config import TarsConfig
from data_pipelines.document import Document, Image, Origin
from data_pipelines.formats import read_document
from data_pipelines.prepare import prepare
from data_pipelines.reader import Members, SplitReader
from data_pipelines.shards import Manifest, SplitWriter

DOCS = Path(__file__).parents[1] / "docs" / "data.md"
FORMATS = {"captions": "img2dataset", "interleaved": "energon", "text": "text"}
SAMPLES = 11

pytest.importorskip("megatron.energon", reason="needs the extra 'energon': pip install -c constraints.txt -e '.[energon]'")


def picture(number: int) -> tuple[str, bytes]:
    """(extension, bytes) of a picture that no other number has: WebP, PNG, JPEG in turn."""
    extension, kind, options = [("webp", "WEBP", {"lossless": True}), ("png", "PNG", {}), ("jpg", "JPEG", {})][number % 3]
    pixels = np.random.default_rng(number).integers(0, 256, (6 + number % 4, 9, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind, **options)
    return extension, buffer.getvalue()


def caption(number: int) -> dict[str, str | bytes]:
    extension, data = picture(number)
    return {extension: data, "txt": f"Bild Nr. {number}, größer\n", "json": json.dumps({"caption": "not this one"})}


def page(number: int) -> dict[str, str | bytes]:
    """Text and pictures in an order of its own: none, one or two pictures; before, between or after the text."""
    slots: list[str | tuple[str, bytes]] = [f"page {number} ☃\n", f"then {number}\n"]
    for place in range(number % 3):
        extension, data = picture(100 + 2 * number + place)
        slots.insert((number + place) % (len(slots) + 1), (f"{place:03d}.{extension}", data))
    images = [None if isinstance(slot, str) else slot[0] for slot in slots]
    texts = [slot if isinstance(slot, str) else None for slot in slots]
    members: dict[str, str | bytes] = {slot[0]: slot[1] for slot in slots if not isinstance(slot, str)}
    return {"json": json.dumps({"images": images, "texts": texts})} | members


def prose(number: int) -> dict[str, str | bytes]:
    return {"txt": f"Stück {number}\r\n" * (number + 1)}


MAKERS = {"captions": caption, "interleaved": page, "text": prose}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a corpus of several shards a split, after the commands of docs/data.md."""
    home = tmp_path_factory.mktemp("energon")
    folder = home / "data" / "starter"
    folder.mkdir(parents=True)
    manifest = Manifest(corpus="starter", recipe="tests")
    for source, make in MAKERS.items():
        for split in ("train", "val"):
            writer = SplitWriter(folder, source, split, format=FORMATS[source], shard_bytes=500)
            for number in range(SAMPLES):
                writer.write(make(number + (50 if split == "val" else 0)))
            manifest.splits.setdefault(source, {})[split] = writer.close()
            assert len(manifest.splits[source][split].shards) > 1
    manifest.save(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shell(documented("bash"), home)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, "the corpus is untouched"
    return home


def documented(language: str) -> str:
    """The code of that language in the paragraph on energon of docs/data.md."""
    paragraph = DOCS.read_text().partition("megatron-energon\n")[2].partition("\n## ")[0]
    (code,) = re.findall(rf"```{language}\n(.*?)```", paragraph, flags=re.DOTALL)
    return code


def shell(commands: str, folder: Path) -> None:
    """Run in bash, with the commands of this Python first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-euc", commands], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-3000:]}"


def documented_encoder(folder: Path) -> Any:
    """The task encoder of docs/data.md, imported from a file as a user's would be."""
    file = folder / "documented_pages.py"
    file.write_text(documented("python"))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Pages()


def read_with_energon(folder: Path, encoder: Any = None, rank: int = 0, ranks: int = 1) -> list[Any]:
    """Every sample once, by key; the first that energon cannot read fails the test."""
    from megatron import energon
    from megatron.energon.errors import reraise_exception

    workers = energon.WorkerConfig(rank=rank, world_size=ranks, num_workers=0, global_error_handler=reraise_exception)
    chosen = {"task_encoder": encoder} if encoder else {}
    samples = energon.get_val_dataset(folder, split_part="train", worker_config=workers, batch_size=None, **chosen)
    return sorted(energon.get_loader(samples), key=key_of)


def key_of(sample: Any) -> str:
    return sample["__key__"] if isinstance(sample, dict) else sample.__key__


def raw_encoder() -> Any:
    """Hands every member over as its bytes."""
    from megatron.energon import Cooker, DefaultTaskEncoder, stateless

    class Raw(DefaultTaskEncoder):
        decoder = None
        cookers = (Cooker(stateless(lambda sample: sample)),)

    return Raw()


def suite(folder: Path, source: str) -> list[tuple[Members, Document]]:
    """What the suite's reader gives for the train split, by key."""
    manifest = Manifest.load(folder)
    split = manifest.split(source, "train")
    reader = sorted(SplitReader(folder, manifest, source, "train"), key=lambda members: (members.key, members.shard))
    return [(members, read_document(split.format, members, Origin(source, members.shard, members.key))) for members in reader]


def shown(parts: tuple[str | Image, ...]) -> Iterator[str | bytes]:
    """Text as it is, pictures as their pixels."""
    for part in parts:
        yield part if isinstance(part, str) else rgb(np.asarray(PIL.Image.open(io.BytesIO(part.data)).convert("RGB")))


def seen(part: Any) -> str | bytes:
    """The same of energon's: pictures come as float (3, height, width) in 0 to 1."""
    return part if isinstance(part, str) else rgb((part * 255).round().byte().permute(1, 2, 0).numpy())


def rgb(pixels: np.ndarray) -> bytes:
    return repr(pixels.shape).encode() + pixels.tobytes()


def test_captions(prepared: Path) -> None:
    ours = suite(prepared / "data" / "starter", "captions")
    assert len(ours) == SAMPLES
    decoded = read_with_energon(prepared / "energon" / "captions-train")
    assert [(s.__key__, seen(s.image), s.caption) for s in decoded] == [(m.key, *shown(d.parts)) for m, d in ours]
    raw = read_with_energon(prepared / "energon" / "captions-train", raw_encoder())
    assert [(s.__key__, s.image, s.caption) for s in raw] == [(m.key, d.images[0].data, m["txt"]) for m, d in ours]


def test_text(prepared: Path) -> None:
    ours = suite(prepared / "data" / "starter", "text")
    found = read_with_energon(prepared / "energon" / "text-train")
    assert [(s.__key__, s.text) for s in found] == [(m.key, d.text) for m, d in ours]
    assert len(found) == SAMPLES


def test_interleaved_pages(prepared: Path, tmp_path: Path) -> None:
    ours = suite(prepared / "data" / "starter", "interleaved")
    found = read_with_energon(prepared / "energon" / "interleaved-train", documented_encoder(tmp_path))
    assert [(s.__key__, *map(seen, s.sequence)) for s in found] == [(m.key, *shown(d.parts)) for m, d in ours]
    assert {len(d.images) for _, d in ours} == {0, 1, 2}


def test_every_member_of_a_page_on_two_ranks(prepared: Path) -> None:
    read = partial(read_with_energon, prepared / "energon" / "interleaved-train", raw_encoder(), ranks=2)
    found = sorted(read(rank=0) + read(rank=1), key=key_of)
    members = [{name: value for name, value in sample.items() if not name.startswith("__")} for sample in found]
    ours = suite(prepared / "data" / "starter", "interleaved")
    assert [(key_of(s), s["__shard__"], m) for s, m in zip(found, members, strict=True)] == [
        (m.key, m.shard, dict(m)) for m, _ in ours
    ]


def test_shards_laid_out_as_energon_documents_them(tmp_path: Path) -> None:
    """Samples in folders inside the tar, a part named detail.json, shards below train/: prepared by energon, then read here."""
    from megatron.energon.tools.prepare import command

    fields = json.dumps({"image": "webp,png,jpg", "caption": "txt"})
    kinds = {"captions": ["CaptioningSample", "--field-map", fields], "interleaved": ["CrudeWebdataset"]}
    for source, kind in kinds.items():
        place = tmp_path / source / "train"
        place.mkdir(parents=True)
        for shard in range(2):
            with webdataset.TarWriter(str(place / f"shard_{shard:04d}.tar"), encoder=False) as writer:
                for number in range(shard * 5, shard * 5 + 5):
                    members = MAKERS[source](number) | {"detail.json": "{}"}
                    content = {name: data.encode() if isinstance(data, str) else data for name, data in members.items()}
                    writer.write({"__key__": f"samples/sample_{number:04d}", **content})
        options = ["--non-interactive", "--num-workers=1", "--split-parts=train:train/.*", "--sample-type", *kind]
        command([str(tmp_path / source), *options], standalone_mode=False)
    tars = {source: str(tmp_path / source / "train" / "*.tar") for source in kinds}
    corpus = prepare(TarsConfig(name="mine", vocab_size=300, val_share=0.0, **tars))  # type: ignore[arg-type]
    captions, pages = suite(corpus, "captions"), suite(corpus, "interleaved")
    assert len(captions) == len(pages) == 10
    found = read_with_energon(tmp_path / "captions")
    assert [(m.key, *shown(d.parts)) for m, d in captions] == [(s.__key__, seen(s.image), s.caption) for s in found]
    found = read_with_energon(tmp_path / "interleaved", documented_encoder(tmp_path))
    assert [(m.key, *shown(d.parts)) for m, d in pages] == [(s.__key__, *map(seen, s.sequence)) for s in found]
