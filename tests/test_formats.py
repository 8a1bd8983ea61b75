"""Every layout as the public tools write it becomes exactly one Document; conversion keeps parts and order, or names the row."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageChops
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.command import compose
from configs.errors import UserError
from data_pipelines import prepare as prepare_module
from data_pipelines.corpora import convert
from data_pipelines.corpora.config import ConvertConfig, TarsConfig
from data_pipelines.corpora.convert import records
from data_pipelines.document import Document, Image
from data_pipelines.formats import read_document, rows
from data_pipelines.formats.pictures import stored
from data_pipelines.formats.store import url_path
from data_pipelines.prepare import PrepareConfig, prepare
from data_pipelines.reader import read_all
from data_pipelines.shards import Manifest
from tests.test_tars import caption, page, picture, prose, write

BASE = ConvertConfig(name="mine", vocab_size=300, val_share=0.0)


def pixels(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data)).convert("RGB")


def jsonl(path: Path, rows: list[Any]) -> Path:
    """Lines of JSON, packed as the name says."""
    plain = "".join(json.dumps(row) + "\n" for row in rows).encode()
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(pack.get(path.suffix, bytes)(plain))
    return path


def parquet(path: Path, rows: list[dict[str, Any]], schema: pyarrow.Schema | None = None, group: int = 2) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=group, compression="zstd")
    return path


def put(store: Path, url: str, data: bytes, suffix: str = ".jpg") -> None:
    """What a download script keeps: the documented place of a URL, spelt out here independently of the code."""
    name = hashlib.sha256(url.encode()).hexdigest()
    (store / name[:2]).mkdir(parents=True, exist_ok=True)
    (store / name[:2] / (name + suffix)).write_bytes(data)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


def converted(config: ConvertConfig, source: str = "interleaved") -> list[Document]:
    """All documents of a finished conversion, train before val."""
    folder = prepare(config)
    found = []
    for name, split in Manifest.load(folder).splits[source].items():
        for members in read_all(folder, source, name):
            found.append(read_document(split.format, members, convert.Origin(source, members.shard, members.key)))
    return found


def shown(document: Document) -> list[str | bytes]:
    return [part if isinstance(part, str) else part.data for part in document.parts]


# ------------------------------------------------------------------------------------------------------ golden fixtures
# each: (files in, the one document expected); a picture expected as its bytes

SCHEMA = pyarrow.schema(
    {
        "images": pyarrow.list_(pyarrow.string()),
        "metadata": pyarrow.string(),
        "general_metadata": pyarrow.string(),
        "texts": pyarrow.list_(pyarrow.string()),
    }
)
URLS = ["https://a.example/ö.jpg?x=1", "http://b.example/2"]
OBELICS = {
    "images": [None, URLS[0], None, URLS[1]],
    "metadata": json.dumps([None, {"src": URLS[0]}, None, {"src": URLS[1]}]),
    "general_metadata": json.dumps({"url": "https://a.example"}),
    "texts": ["Before.\n\n", None, "Between ☃.", None],
}
MMC4_ROW = {
    "url": "https://c.example",
    "text_list": ["One.", "Two.", "Three.", "Four."],
    "image_info": [
        {"image_name": "late.png", "raw_url": "x", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "first.png", "raw_url": "y", "matched_text_index": 0, "matched_sim": 0.2},
        {"image_name": "later.png", "raw_url": "z", "matched_text_index": 2, "matched_sim": 0.25},
    ],
    "similarity_matrix": [[0.1] * 4] * 3,
}
MMC4_PARTS = [picture(2), "One. Two. ", picture(1), picture(3), "Three. Four."]


def with_base64(row: dict[str, Any]) -> dict[str, Any]:
    infos = [info | {"image_base64": base64.b64encode(picture(n)).decode()} for n, info in enumerate(row["image_info"], 1)]
    return row | {"image_info": infos}


def tiff(frames: list[PIL.Image.Image]) -> bytes:
    buffer = io.BytesIO()
    frames[0].save(buffer, "TIFF", save_all=True, append_images=frames[1:], compression="tiff_lzw")
    return buffer.getvalue()


FRAMES = [
    PIL.Image.effect_noise((9, 5), 80).convert("RGB"),
    PIL.Image.new("L", (4, 6), 99),
    PIL.Image.new("CMYK", (3, 3), (9, 8, 7, 6)),
]
MINT = {
    "images": [None, "page_0_image_7", "page_0_image_9", None, "page_1_image_2"],
    "texts": ["Abstract", None, None, "Methods", None],
    "pdf_name": "a.pdf",
    "image_metadata": [{"page": 0}],
}


@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl", "o.jsonl.gz", "o.jsonl.zst"])
def test_obelics_and_omnicorpus(tmp_path: Path, store: Path, name: str) -> None:
    put(store, URLS[0], picture(1), ".png")
    put(store, URLS[1], picture(2), "")  # a store without extensions
    file = parquet(tmp_path / name, [OBELICS], SCHEMA) if name.endswith("parquet") else jsonl(tmp_path / name, [OBELICS])
    (document,) = converted(replace(BASE, interleaved=str(file), image_store=str(store)))
    assert shown(document) == ["Before.\n\n", picture(1), "Between ☃.", picture(2)]
    assert [part.name for part in document.images] == ["000.png", "001.png"]


def test_the_stores_layout_is_the_documented_one() -> None:
    assert url_path("https://example.org/a.jpg") == "70/" + hashlib.sha256(b"https://example.org/a.jpg").hexdigest()


def test_mmc4_with_a_folder_of_images(tmp_path: Path, store: Path) -> None:
    for number, info in enumerate(MMC4_ROW["image_info"], 1):  # type: ignore[arg-type, var-annotated]
        (store / info["image_name"]).write_bytes(picture(number))
    file = jsonl(tmp_path / "docs_shard_0_v2.jsonl", [MMC4_ROW])
    (document,) = converted(replace(BASE, interleaved=str(file), image_store=str(store)))
    assert shown(document) == MMC4_PARTS


def test_mmc4_with_base64_in_rows_and_in_tars_in_place(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "m.jsonl.gz", [with_base64(MMC4_ROW)])
    (document,) = converted(replace(BASE, interleaved=str(file)))
    assert shown(document) == MMC4_PARTS
    tar = write(tmp_path / "m.tar", [{"json": json.dumps(with_base64(MMC4_ROW))}])
    folder = prepare(TarsConfig(name="there", interleaved=str(tar), vocab_size=300))
    split = Manifest.load(folder).split("interleaved", "train")
    assert (split.format, split.images) == ("mmc4", 3)
    (members,) = read_all(folder, "interleaved", "train")
    assert shown(read_document("mmc4", members, convert.Origin("interleaved", members.shard, members.key))) == MMC4_PARTS


def test_mint1t_frames_follow_the_images_that_are_not_null(tmp_path: Path) -> None:
    # the first page has no picture: energon reads it as well, and only the second tells the two apart
    alone = {"json": json.dumps({"images": [None], "texts": ["no picture"]})}
    tar = write(tmp_path / "mint.tar", [alone, {"json": json.dumps(MINT), "tiff": tiff(FRAMES)}])
    _, document = converted(replace(BASE, interleaved=str(tar)))
    assert [part if isinstance(part, str) else "image" for part in document.parts] == [
        "Abstract",
        "image",
        "image",
        "Methods",
        "image",
    ]
    for image, frame in zip(document.images, FRAMES, strict=True):
        assert PIL.ImageChops.difference(pixels(image.data), frame.convert("RGB")).getbbox() is None
    folder = prepare(TarsConfig(name="there", interleaved=str(tar), vocab_size=300))
    assert Manifest.load(folder).split("interleaved", "train").format == "mint1t"


def test_tars_of_the_suites_own_layouts_are_converted_too(tmp_path: Path) -> None:
    made = {"captions": caption(5), "interleaved": page(6), "text": prose(7)}
    given = {source: str(write(tmp_path / f"{source}.tar", [sample])) for source, sample in made.items()}
    config = replace(BASE, captions=given["captions"], interleaved=given["interleaved"], text=given["text"])
    assert [shown(d) for d in converted(config, "captions")] == [[picture(5), "picture 5"]]
    expected = ["page 6\n", picture(6), "then\n", picture(106), "the end\n"]
    assert [shown(d) for d in converted(config, "interleaved")] == [expected]
    assert [shown(d) for d in converted(config, "text")] == [[prose(7)["txt"]]]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.json.gz", "t.jsonl.zst", "t.parquet"])
@pytest.mark.parametrize("key", ["text", "content"])
def test_text(tmp_path: Path, name: str, key: str) -> None:
    given_rows = [{key: f"Döcument {i}\n", "meta": {"n": i}} for i in range(70)]
    file = parquet(tmp_path / name, given_rows, group=9) if name.endswith("parquet") else jsonl(tmp_path / name, given_rows)
    config = replace(BASE, text=str(file), text_key=key)
    assert [shown(d) for d in converted(config, "text")] == [[row[key]] for row in given_rows]
    (entry,) = Manifest.load(prepare(config)).settings["inputs"]  # type: ignore[misc, attr-defined]
    assert (entry["documents"], entry["layout"], entry["sha256"]) == (70, "text", hashlib.sha256(file.read_bytes()).hexdigest())


# ------------------------------------------------------------------------------------------------------------ properties

PARTS = st.lists(
    st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.integers(0, 255)), min_size=1, max_size=6
)


@settings(max_examples=20, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=8), st.sampled_from(["p.parquet", "p.jsonl", "p.jsonl.gz", "p.jsonl.zst"]))
def test_a_conversion_keeps_every_part_and_the_order_of_documents(documents: list[list[str | int]], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, images = Path(folder), Path(folder) / "store"
        pages = []
        for parts in documents:
            for part in parts:
                if isinstance(part, int):
                    put(images, f"u{part}", picture(part))
            lists = {"images": [f"u{p}" if isinstance(p, int) else None for p in parts]}
            pages.append(lists | {"texts": [p if isinstance(p, str) else None for p in parts]})
        images.mkdir(exist_ok=True)
        schema = pyarrow.schema({key: pyarrow.list_(pyarrow.string()) for key in ("images", "texts")})
        file = parquet(base / name, pages, schema) if name.endswith("parquet") else jsonl(base / name, pages)
        config = replace(BASE, interleaved=str(file), image_store=str(images))
        manifest = convert.prepare(config, base / "out")
        expected = [[p if isinstance(p, str) else picture(p) for p in parts] for parts in documents]
        found = read_all(base / "out", "interleaved", "train")
        assert [shown(read_document("energon", m, convert.Origin("i", m.shard, m.key))) for m in found] == expected
        again = convert.prepare(config, base / "again")
        assert again.fingerprint == manifest.fingerprint


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.data(), st.sampled_from(["p.parquet", "p.jsonl", "p.jsonl.gz", "p.jsonl.zst"]))
def test_a_malformed_row_is_named_wherever_it_stands(count: int, data: st.DataObject, name: str) -> None:
    bad = data.draw(st.integers(0, count))
    given_rows = [{"images": [None], "texts": ["good"]}] * count
    given_rows.insert(bad, {"images": [None], "texts": [None]})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        file = parquet(path, given_rows, SCHEMA) if name.endswith("parquet") else jsonl(path, given_rows)
        row = f"row {bad}" if name.endswith("parquet") else f"line {bad + 1}"
        with pytest.raises(UserError, match=rf"interleaved:.*{name}:{row}: slot 0 must hold .* neither"):
            convert.prepare(replace(BASE, interleaved=str(file)), Path(folder) / "out")
        assert [entry.name for entry in Path(folder).iterdir()] == [name]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 9))
def test_lines_do_not_depend_on_where_the_file_is_cut_into_pieces(lines: list[bytes], size: int) -> None:
    whole = b"\n".join(lines)
    pieces = (whole[i : i + size] for i in range(0, len(whole), size))
    expected = whole.split(b"\n")
    assert list(rows._lines(Path("x"), pieces)) == (expected[:-1] if expected[-1] == b"" else expected)


def test_several_zstd_frames_and_gzip_members_are_one_file(tmp_path: Path) -> None:
    halves = [b'{"text": "a"}\n{"te', b'xt": "b"}\n']
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"
    zst, gz = tmp_path / "a.jsonl.zst", tmp_path / "a.jsonl.gz"
    zst.write_bytes(zstandard.ZstdCompressor().compress(halves[0]) + skippable + zstandard.ZstdCompressor().compress(halves[1]))
    gz.write_bytes(b"".join(map(gzip.compress, halves)))
    for path in (zst, gz):
        assert [row for _, row, _ in rows.read_rows(path)] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.99])
@pytest.mark.parametrize("count", [1, 2, 300])
def test_each_document_is_in_one_split_and_both_exist_where_they_can(tmp_path: Path, share: float, count: int) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{"text": f"document {i}"} for i in range(count)])
    config = replace(BASE, text=str(file), val_share=share)
    assert sorted(d.text for d in converted(config, "text")) == sorted(f"document {i}" for i in range(count))
    splits = Manifest.load(prepare(config)).splits["text"]
    assert list(splits) == (["train", "val"] if share and count > 1 else ["train"])
    if share and count == 300:
        assert abs(splits["val"].samples - share * count) < 25


def test_pictures_are_shrunk_only_when_they_are_larger(tmp_path: Path) -> None:
    large = io.BytesIO()
    PIL.Image.new("RGBA", (400, 100), (0, 0, 0, 0)).save(large, "PNG")
    tar = write(tmp_path / "c.tar", [{"png": large.getvalue(), "txt": "large"}, caption(3)])
    first, second = converted(replace(BASE, captions=str(tar), image_size=64), "captions")
    assert pixels(first.images[0].data).size == (64, 16)
    assert min(pixels(first.images[0].data).getpixel((5, 5))) > 250  # type: ignore[type-var, arg-type]  # transparent is white
    assert second.images[0].data == picture(3)
    assert stored(picture(3), None, 85) == (picture(3), "png")


# ------------------------------------------------------------------------------------------------------- missing images


def with_missing(tmp_path: Path, store: Path) -> ConvertConfig:
    put(store, URLS[0], picture(1))
    put(store, URLS[1], b"<html>gone</html>")
    alone = {"images": ["http://never"], "texts": [None]}
    file = jsonl(tmp_path / "o.jsonl", [OBELICS, alone, {"images": [None], "texts": ["the end"]}])
    return replace(BASE, interleaved=str(file), image_store=str(store))


def test_missing_images_are_all_listed_and_refused(tmp_path: Path, store: Path, home: Path) -> None:
    with pytest.raises(
        UserError, match=r"2 images are missing.*'http://b.example/2' of interleaved:.*o.jsonl:line 1.*drop"
    ) as error:
        prepare(with_missing(tmp_path, store))
    listing = home / "data" / "mine.missing_images.jsonl"
    assert str(listing) in str(error.value)
    listed = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [entry["image"] for entry in listed] == [URLS[1], "http://never"]
    assert "no picture that can be decoded" in listed[0]["reason"]
    assert sorted(path.name for path in (home / "data").iterdir()) == [".mine.lock", "mine.missing_images.jsonl"]


def test_missing_images_are_dropped_and_counted_when_asked(tmp_path: Path, store: Path, home: Path) -> None:
    found = converted(replace(with_missing(tmp_path, store), missing_images="drop"))
    assert [shown(d) for d in found] == [["Before.\n\n", picture(1), "Between ☃."], ["the end"]]
    made = Manifest.load(home / "data" / "mine").settings
    assert (made["missing_images"], made["emptied_documents"]) == (2, 1)
    assert len((home / "data" / "mine" / "missing_images.jsonl").read_text().splitlines()) == 2


def test_rows_that_name_images_need_a_store(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "o.jsonl", [OBELICS])
    with pytest.raises(UserError, match=r"o.jsonl:line 1: names the image .*corpus\.image_store=DIR"):
        prepare(replace(BASE, interleaved=str(file)))


# --------------------------------------------------------------------------------------------------- malformed, and named

GOOD = {"images": [None], "texts": ["good"]}
INFO = {"image_name": "a.png", "matched_text_index": 0}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"images": ["u"], "texts": ["both"]}, "slot 0 must hold either an image or a text, and holds both"),
        ({"images": [None, None], "texts": ["a", None]}, "slot 1 .* holds neither"),
        ({"images": [None], "texts": ["a", "b"]}, "1 image slots but 2 text slots"),
        ({"images": "u", "texts": ["a"]}, "'images' must be a list, and is str"),
        ({"images": [7], "texts": [None]}, "slot 0 of 'images' must hold a URL"),
        ({"images": [None], "texts": [7]}, "slot 0 holds 7, which is no text"),
        ({"texts": ["a"]}, "KeyError: 'images'"),
        ({"images": [None], "texts": ["\ud800"]}, "no valid Unicode"),
        ({"images": [], "texts": []}, "holds neither text nor image"),
    ],
)
def test_a_malformed_obelics_row_is_named(tmp_path: Path, store: Path, row: dict[str, Any], said: str) -> None:
    file = jsonl(tmp_path / "o.jsonl", [GOOD, row])
    with pytest.raises(UserError, match=rf"interleaved:.*o\.jsonl:line 2: .*{said}"):
        prepare(replace(BASE, interleaved=str(file), image_store=str(store)))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"text_list": ["a"], "image_info": [INFO | {"matched_text_index": 1}]},
            r"\[0\].matched_text_index is 1; .* 1 sentences",
        ),
        ({"text_list": ["a", "b"], "image_info": [INFO | {"matched_text_index": True}]}, "matched_text_index is True"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a"}]}, "KeyError: 'matched_text_index'"),
        ({"text_list": ["a"], "image_info": [INFO | {"image_base64": "?"}]}, "image_base64 is not base64"),
        ({"text_list": ["a"], "image_info": [INFO | {"image_base64": "AAAA"}]}, "a.png is no picture that can be decoded"),
        ({"text_list": ["a"], "image_info": [INFO | {"image_name": None}]}, "neither 'image_base64' nor"),
        ({"text_list": ["a"], "image_info": [INFO | {"image_name": "../secret.png"}]}, "is no plain file name"),
        ({"text_list": ["a"], "image_info": [INFO | {"image_name": "/etc/passwd"}]}, "is no plain file name"),
        ({"text_list": ["a", None], "image_info": []}, r"text_list\[1\] must be a string"),
        ({"text_list": None, "image_info": []}, "'text_list' must be a list"),
    ],
)
def test_a_malformed_mmc4_row_is_named(tmp_path: Path, store: Path, row: dict[str, Any], said: str) -> None:
    (tmp_path / "secret.png").write_bytes(picture(1))
    good = {"text_list": ["good"], "image_info": []}
    file = jsonl(tmp_path / "m.jsonl", [good, row])
    with pytest.raises(UserError, match=rf"interleaved:.*m\.jsonl:line 2: .*{said}"):
        prepare(replace(BASE, interleaved=str(file), image_store=str(store)))


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"json": json.dumps(MINT), "tiff": tiff(FRAMES[:2])}, "3 images but 2 frames in the tiff"),
        ({"json": json.dumps(MINT), "tiff": tiff([*FRAMES, FRAMES[0]])}, "3 images but more frames"),
        ({"json": json.dumps(MINT)}, "3 images but no tiff member"),
        ({"json": json.dumps(MINT), "tiff": b"II*\0junk"}, "frame 0 of the tiff cannot be decoded"),
        ({"json": json.dumps(MINT), "tiff": picture(1)}, "frame 0 of the tiff cannot be decoded"),
    ],
)
def test_a_malformed_mint1t_sample_is_named(tmp_path: Path, sample: dict[str, Any], said: str) -> None:
    tar = write(tmp_path / "mint.tar", [{"json": json.dumps(MINT), "tiff": tiff(FRAMES)}, sample])
    with pytest.raises(UserError, match=rf"interleaved:.*mint\.tar:00001: {said}"):
        prepare(replace(BASE, interleaved=str(tar)))


def test_a_malformed_parquet_row_is_named_from_zero(tmp_path: Path) -> None:
    file = parquet(tmp_path / "o.parquet", [GOOD, GOOD, {"images": [None], "texts": [None]}], SCHEMA)
    with pytest.raises(UserError, match=r"o\.parquet:row 2: slot 0 .* neither"):
        prepare(replace(BASE, interleaved=str(file)))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("[1]", "line 2: must be a JSON object"),
        ("{", "line 2: no JSON"),
        ('{"text": 7}', "line 2: 'text' must be a string, and holds 7"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, row: str, said: str, home: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "good"}\n' + row + "\n")
    with pytest.raises(UserError, match=rf"t\.jsonl:{said}"):
        prepare(replace(BASE, text=str(tmp_path / "t.jsonl")))
    assert [path.name for path in (home / "data").iterdir()] == [".mine.lock"]  # nothing half made is left


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.jsonl.zst", "t.parquet"])
def test_a_file_that_ends_too_early_is_no_shorter_corpus(tmp_path: Path, name: str) -> None:
    texts = [{"text": hashlib.sha256(str(i).encode()).hexdigest() * 20} for i in range(2000)]
    file = parquet(tmp_path / name, texts, group=100) if name.endswith("parquet") else jsonl(tmp_path / name, texts)
    whole = file.read_bytes()
    for kept in (0.5, 0.999):
        file.write_bytes(whole[: int(len(whole) * kept)])
        with pytest.raises(UserError, match=rf"{name}: .*(damaged|too early)"):
            prepare(replace(BASE, text=str(file)))


@pytest.mark.parametrize("layout", [None, "obelics"])
def test_empty_and_doubled_files_are_named(tmp_path: Path, layout: str | None) -> None:
    good = parquet(tmp_path / "a.parquet", [GOOD], SCHEMA)
    config = replace(BASE, interleaved=str(tmp_path / "*.parquet"), interleaved_format=layout)
    parquet(tmp_path / "b.parquet", [], SCHEMA)
    with pytest.raises(UserError, match=r"b\.parquet: holds no samples"):
        prepare(config)
    (tmp_path / "b.parquet").write_bytes(good.read_bytes())
    with pytest.raises(UserError, match=r"b\.parquet and .*a\.parquet are the same, byte for byte"):
        prepare(config)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("cap", ["MAX_LINE_BYTES", "SLACK_BYTES"])
def test_decompression_bombs_stop_early(tmp_path: Path, suffix: str, cap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, cap, 2_000_000)
    mark = b" " if cap == "MAX_LINE_BYTES" else b"\n"
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    file = tmp_path / f"t.jsonl{suffix}"
    file.write_bytes(pack(b'{"text": "a"}\n' + mark * 40_000_000))
    said = "a line of more than" if cap == "MAX_LINE_BYTES" else "decompression bomb"
    with pytest.raises(UserError, match=said):
        list(rows.read_rows(file))


def test_a_parquet_bomb_is_refused_by_its_footer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SLACK_BYTES", 2_000_000)
    file = parquet(tmp_path / "t.parquet", [{"text": "a" * 20_000_000, "other": "b"}])
    with pytest.raises(UserError, match="decompression bomb"):
        list(rows.read_rows(file))
    assert list(rows.read_rows(file, ("other",))) == [("row 0", {"other": "b"}, file.stat().st_size)]  # text is not unpacked


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no samples"),
        (b"PK\x03\x04rest", "zip archive. Unpack it: unzip"),
        (b'[{"text": "a"}]', "one JSON array"),
        (gzip.compress(bytes(257) + b"ustar" + bytes(300), mtime=0), "compressed tar.*gunzip"),
        (b"plain words", "no tar, jsonl.*begins with b'plain words'"),
    ],
)
def test_files_that_hold_no_rows_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        prepare(replace(BASE, text=str(tmp_path / "t.jsonl")))


# --------------------------------------------------------------------------------------------------- finding the layout


def test_an_unknown_layout_names_what_was_seen_and_what_is_known(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", [{"pages": [], "title": "a"}])
    with pytest.raises(UserError, match=r"Seen: .*line 1 has pages, title\. Known: obelics: parallel lists.*; mmc4: text_list"):
        prepare(replace(BASE, interleaved=str(file)))
    tar = write(tmp_path / "x.tar", [{"json": "{}", "html": "a"}])
    with pytest.raises(UserError, match=r"x\.tar:00000 has html, json\. Known: energon: .*; mmc4: .*; mint1t: "):
        prepare(replace(BASE, interleaved=str(tar)))


def test_a_layout_that_is_set_is_not_looked_for(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "o.jsonl", [GOOD])
    with pytest.raises(UserError, match="does not follow the layout 'mmc4'"):
        prepare(replace(BASE, interleaved=str(file), interleaved_format="mmc4"))
    with pytest.raises(UserError, match=r"interleaved with corpus\.interleaved_format=mint1t come as a tar"):
        prepare(replace(BASE, interleaved=str(file), interleaved_format="mint1t"))
    alone = write(tmp_path / "p.tar", [{"json": json.dumps(GOOD)}])
    folder = prepare(TarsConfig(name="set", interleaved=str(alone), interleaved_format="mint1t", vocab_size=300))
    assert Manifest.load(folder).split("interleaved", "train").format == "mint1t"


def test_looking_for_the_layout_misses_no_record(tmp_path: Path) -> None:
    tar = write(tmp_path / "p.tar", [page(i) for i in range(3)])
    assert len(list(records("interleaved", tar, BASE))) == len(converted(replace(BASE, interleaved=str(tar)))) == 3


@pytest.mark.parametrize(("name", "module"), [("t.parquet", "pyarrow"), ("t.jsonl.zst", "zstandard")])
def test_without_the_extra_the_error_names_it(tmp_path: Path, name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet(tmp_path / name, [{"text": "a"}]) if name.endswith("parquet") else jsonl(tmp_path / name, [{"text": "a"}])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}.*pip install 'mm1-ablations\[formats\]'"):
        prepare(replace(BASE, text=str(file)))
    with pytest.raises(UserError, match=rf"needs {module}"):
        list(rows.read_rows(file))


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_yaml_file_and_the_dataclass_agree() -> None:
    made = compose("prepare", PrepareConfig, ["corpus=convert", "corpus.name=mine", "corpus.text=/a.jsonl"]).corpus
    assert made == ConvertConfig(name="mine", text="/a.jsonl")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("corpus.interleaved_format=webdataset", "corpus=convert reads energon, mmc4, mint1t, obelics"),
        ("corpus.missing_images=ignore", "must be refuse or drop"),
        ("corpus.image_size=1", "16 to 8192"),
        ("corpus.quality=0", "1 to 100"),
        ("corpus.image_store=/nowhere", "no such folder"),
        ("corpus.text_key=''", "text_key is empty"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose("prepare", PrepareConfig, ["corpus=convert", "corpus.name=mine", "corpus.text=/a.jsonl", override])


def test_a_converted_corpus_ends_with_the_command_that_trains_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{"text": f"words {i}"} for i in range(5)])
    folder = prepare(replace(BASE, text=str(file)))
    assert "python -m mm1.train data=own data.corpus=mine data.sources.captions.ratio=0" in capsys.readouterr().out
    assert prepare_module.ensure_corpus("mine") == folder
    assert isinstance(Manifest.load(folder).settings["inputs"], list)
    assert all(not isinstance(part, Image) for d in converted(replace(BASE, text=str(file)), "text") for part in d.parts)
