"""Your own shards as a corpus: nothing copied, nothing lost, nothing paired wrongly; what is not in order is named."""

from __future__ import annotations

import gzip
import io
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import pytest
import webdataset

from configs.command import compose
from configs.errors import UserError
from data_pipelines.config import DataConfig, PackingConfig, SourceConfig
from data_pipelines.corpora import tars
from data_pipelines.corpora.config import TarsConfig
from data_pipelines.document import Origin
from data_pipelines.formats import read_document
from data_pipelines.lanes import LaneStream
from data_pipelines.prepare import PrepareConfig, ensure_corpus, prepare, refuse_repetition
from data_pipelines.reader import read_all
from data_pipelines.shards import Manifest
from data_pipelines.tokens import load_tokenizer
from mm1.config import TrainConfig
from tests.corpus import tokenizer

PER_SHARD = 6


def picture(number: int) -> bytes:
    """A PNG whose colour says which number it has."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (number, 255 - number, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(image: bytes) -> int:
    return int(numpy.asarray(PIL.Image.open(io.BytesIO(image)))[0, 0, 0])


def caption(number: int) -> dict[str, Any]:
    return {"png": picture(number), "txt": f"picture {number}", "json": json.dumps({"caption": f"picture {number}"})}


def page(number: int) -> dict[str, Any]:
    described = {"images": [None, "a.png", None, "b.png", None], "texts": [f"page {number}\n", None, "then\n", None, "the end\n"]}
    return {"json": json.dumps(described), "a.png": picture(number), "b.png": picture(number + 100)}


def prose(number: int) -> dict[str, Any]:
    return {"txt": f"Story {number}. " + " ".join(f"word{number}x{i}" for i in range(40)), "json": "{}"}


def write(path: Path, samples: list[dict[str, Any]]) -> Path:
    """As webdataset writes it, with keys that start anew in every shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for key, sample in enumerate(samples):
            members = {ext: value.encode() if isinstance(value, str) else value for ext, value in sample.items()}
            writer.write({"__key__": f"{key:05d}", **members})
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of captions, three of pages, one of text."""
    folder = tmp_path / "shards"
    makers: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {"cap": (caption, 4), "page": (page, 3), "text": (prose, 1)}
    for name, (make, count) in makers.items():
        for shard in range(count):
            write(folder / f"{name}-{shard:03d}.tar", [make(shard * PER_SHARD + i) for i in range(PER_SHARD)])
    return folder


@pytest.fixture
def config(shards: Path) -> TarsConfig:
    return TarsConfig(
        name="mine",
        captions=str(shards / "cap-{000..003}.tar"),
        interleaved=str(shards / "page-*.tar"),
        text=[str(shards / "text-000.tar")],
        vocab_size=300,
    )


def test_shards_stay_where_they_are_and_the_manifest_counts_them(config: TarsConfig, shards: Path, home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    folder = prepare(config)
    assert folder == home / "data" / "mine" == ensure_corpus("mine")
    assert sorted(path.name for path in folder.iterdir()) == ["index", "manifest.json", "tokenizer"]
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before
    manifest = Manifest.load(folder)
    counted = {source: sum(split.samples for split in splits.values()) for source, splits in manifest.splits.items()}
    assert counted == {"captions": 4 * PER_SHARD, "interleaved": 3 * PER_SHARD, "text": PER_SHARD}
    assert sum(split.images for split in manifest.splits["interleaved"].values()) == 2 * 3 * PER_SHARD
    every = [shard for splits in manifest.splits.values() for split in splits.values() for shard in split.shards]
    assert {Path(shard.file) for shard in every} == set(before)
    assert all(shard.bytes == Path(shard.file).stat().st_size and len(shard.sha256) == 64 for shard in every)
    assert len(load_tokenizer(folder / "tokenizer")) == 300


def test_training_reads_them_and_images_meet_their_own_captions(config: TarsConfig) -> None:
    folder = prepare(config)
    own = load_tokenizer(folder / "tokenizer")
    data = compose("train", TrainConfig, ["data=own", "data.corpus=mine"]).data
    stream = LaneStream(folder, data, PackingConfig(64, 4), own, image_tokens=4, global_batch=20, seed=0)
    seen = {"captions": 0, "interleaved": 0, "text": 0}
    single = LaneStream(
        folder,
        DataConfig("mine", {"captions": SourceConfig("captions", 1.0)}),
        PackingConfig(64, 4, "single"),
        own,
        image_tokens=4,
        global_batch=1,
        seed=0,
    )
    for item in islice(stream.lanes(list(range(20))), 60):
        seen[item.source] += 1
    assert seen == {"captions": 27, "interleaved": 27, "text": 6}
    for item in islice(single.lanes([0]), 3 * PER_SHARD):
        kept = item.sequence.input_ids[item.sequence.document_ids > 0]
        (image,) = item.sequence.images
        assert own.decode(kept[4:-1]) == f"picture {number_of(image.data)}"


def test_validation_is_whole_shards_that_training_never_sees(config: TarsConfig, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.load(prepare(config))
    said = capsys.readouterr().out
    for source, shards in (("captions", 4), ("interleaved", 3)):
        train, val = ({shard.file for shard in manifest.split(source, name).shards} for name in ("train", "val"))
        assert len(val) == 1
        assert len(train | val) == shards
        assert not train & val
        assert f"{source}: {shards} shards, 1 of them held out as the val split" in said
    assert list(manifest.splits["text"]) == ["train"]
    assert "text: 1 shard; no val split (a single shard cannot be divided without a copy)" in said
    assert "python -m mm1.train data=own data.corpus=mine\n" in said
    without = Manifest.load(prepare(replace(config, name="all", val_share=0.0)))
    assert all(list(splits) == ["train"] for splits in without.splits.values())


@pytest.mark.parametrize(("shards", "share", "count"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (300, 0.01, 3), (50, 0.0, 0)])
def test_how_many_shards_are_held_out(shards: int, share: float, count: int) -> None:
    assert len(tars.held_out("captions", [10] * shards, share, 0)) == count


@pytest.mark.parametrize("seed", range(5))
def test_a_shard_that_holds_nearly_everything_is_not_held_out(seed: int) -> None:
    assert tars.held_out("captions", [900, 10], 0.01, seed) == {1}
    assert 2 not in tars.held_out("captions", [10, 11, 900, 9], 0.5, seed)


def test_extensions_count_in_any_case_as_in_webdataset(tmp_path: Path) -> None:
    """Pages name their pictures as the files are called."""
    pages = [
        {"JSON": page(i)["json"].replace("a.png", "A.PNG"), "A.PNG": picture(i), "b.png": picture(i + 100)} for i in range(3)
    ]
    shards = {
        "captions": write(tmp_path / "c.tar", [{"JPG": picture(i), "Txt": f"picture {i}"} for i in range(3)]),
        "interleaved": write(tmp_path / "p.tar", pages),
    }
    folder = prepare(TarsConfig(name="mine", vocab_size=300, **{source: str(path) for source, path in shards.items()}))
    for source, format in (("captions", "img2dataset"), ("interleaved", "energon")):
        theirs = list(webdataset.WebDataset(str(shards[source]), shardshuffle=False))
        for number, members in enumerate(read_all(folder, source, "train")):
            assert dict(members) == {name: value for name, value in theirs[number].items() if not name.startswith("__")}
            document = read_document(format, members, Origin(source, members.shard, members.key))
            assert number_of(document.images[0].data) == number


def test_a_held_out_shard_without_a_good_sample_makes_no_val_split(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "large.tar", [caption(i) for i in range(20)])
    write(tmp_path / "small.tar", [{"png": picture(i)} for i in range(2)])  # no captions
    folder = prepare(TarsConfig(name="mine", captions=str(tmp_path / "*.tar"), vocab_size=300, max_faults=0.1))
    splits = Manifest.load(folder).splits["captions"]
    assert {name: (split.samples, len(split.shards), split.faults) for name, split in splits.items()} == {"train": (20, 2, 2)}
    assert sorted(path.name for path in (folder / "index").iterdir()) == ["captions-train.idx"]
    assert len(list(read_all(folder, "captions", "train"))) == 20
    assert "captions: no val split" in capsys.readouterr().out


def test_an_empty_shard_is_refused_also_after_one_with_faults(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [*(caption(i) for i in range(20)), {"png": picture(1)}])
    write(tmp_path / "b.tar", [])
    with pytest.raises(UserError, match=r"b\.tar: holds no samples"):
        prepare(TarsConfig(name="mine", captions=str(tmp_path / "*.tar"), vocab_size=300, max_faults=0.1, val_share=0.0))


def test_a_corpus_prepared_by_path_is_trained_on_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.tar", [caption(i) for i in range(4)])
    monkeypatch.chdir(tmp_path)
    folder = prepare(TarsConfig(name="./on disk 2/mine", captions="a.tar", vocab_size=300))
    advice = shlex.split(capsys.readouterr().out.rsplit("mm1.train ", 1)[1])
    assert compose("train", TrainConfig, advice).data.corpus == str(folder) == str(tmp_path / "on disk 2" / "mine")


def test_the_tokenizer_never_hears_the_validation_text(config: TarsConfig, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    real = tars.train_tokenizer

    def listening(texts: list[str], vocab_size: int, folder: Path) -> Path:
        heard.extend(texts)
        return real(texts, vocab_size, folder)

    monkeypatch.setattr(tars, "train_tokenizer", listening)
    folder = prepare(config)
    for name, expected in (("train", True), ("val", False)):
        for members in read_all(folder, "captions", name):
            assert (members["txt"].decode() in heard) is expected


def test_a_tokenizer_given_is_copied_without_the_weights_beside_it(config: TarsConfig, tmp_path: Path) -> None:
    given = tmp_path / "model"
    tokenizer().save_pretrained(given)
    (given / "model.safetensors").write_bytes(b"weights")
    folder = prepare(replace(config, tokenizer=str(given)))
    assert load_tokenizer(folder / "tokenizer").get_vocab() == tokenizer().get_vocab()
    assert not (folder / "tokenizer" / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"corpus\.tokenizer=.*nowhere: no tokenizer there"):
        replace(config, tokenizer=str(tmp_path / "nowhere")).validate()


def test_two_preparations_have_one_fingerprint_also_of_moved_shards(config: TarsConfig, shards: Path, tmp_path: Path) -> None:
    first = Manifest.load(prepare(config)).fingerprint
    assert Manifest.load(prepare(config, force=True)).fingerprint == first
    moved = tmp_path / "elsewhere"
    shards.rename(moved)
    patterns = {"captions": "cap-*.tar", "interleaved": "page-*.tar", "text": "text-*.tar"}
    there = replace(config, name="moved", **{source: str(moved / pattern) for source, pattern in patterns.items()})
    assert Manifest.load(prepare(there)).fingerprint == first
    smaller = replace(there, name="smaller", vocab_size=there.vocab_size - 10)
    assert Manifest.load(prepare(smaller)).fingerprint != first  # other tokens of the same bytes


# ------------------------------------------------------------------------------------------------------- what is named


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("cap-{000..005}.tar", r"corpus\.captions=.*cap-\{000\.\.005\}\.tar: 2 of 6 not found, the first is .*cap-004\.tar"),
        ("none-*.tar", r"corpus\.captions=.*none-\*\.tar: 1 of 1 not found"),
        ("", "is a folder: add /"),
        ("cap-{000,000}.tar", "cap-000.tar is named twice"),
    ],
)
def test_a_pattern_that_does_not_fit_is_named(config: TarsConfig, shards: Path, home: Path, pattern: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepare(replace(config, captions=str(shards / pattern)))
    assert not (home / "data" / "mine").exists()


def test_what_a_command_prints_is_refused(config: TarsConfig) -> None:
    with pytest.raises(UserError, match="cannot be read at random"):
        prepare(replace(config, captions="pipe:curl -s https://example.org/000.tar"))


def test_damaged_samples_are_left_out_up_to_the_share_allowed(config: TarsConfig, shards: Path) -> None:
    """Every good sample stays, each lost one is listed once, and training meets none of them."""
    whole = Manifest.load(prepare(config))
    broken = shards / "cap-002.tar"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) * 2 // 3])
    folder = prepare(replace(config, name="mended", max_faults=0.1))
    mended = Manifest.load(folder)
    lost = sum(s.samples for s in whole.splits["captions"].values()) - sum(s.samples for s in mended.splits["captions"].values())
    listed = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    assert 0 < lost < PER_SHARD
    assert {fault["shard"] for fault in listed} == {str(broken)}
    assert sum(split.faults for split in mended.splits["captions"].values()) == len(listed)
    kept = {(m.shard, m.key) for split in mended.splits["captions"] for m in read_all(folder, "captions", split)}
    good = {(m.shard, m.key) for split in whole.splits["captions"] for m in read_all(folder.parent / "mine", "captions", split)}
    assert kept < good
    assert all(shard == str(broken) for shard, _ in good - kept)


@pytest.mark.parametrize("keep", [0.3, 0.55, 0.9])
def test_a_truncated_shard_is_named(config: TarsConfig, shards: Path, home: Path, keep: float) -> None:
    broken = shards / "cap-002.tar"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=r"cap-002\.tar"):
        prepare(config)
    assert not (home / "data" / "mine").exists()


PAGE = {"images": ["a.png"], "texts": [None]}


@pytest.mark.parametrize(
    ("source", "sample", "said"),
    [
        ("captions", {"txt": "no picture"}, "needs an image and a txt member"),
        ("captions", {"png": picture(1), "txt": b"\xff\xfe"}, "UnicodeDecodeError"),
        ("captions", {"png": b"<html>gone</html>", "txt": "a web page"}, "no picture that can be decoded"),
        ("captions", {"png": picture(1), "jpg": picture(2), "txt": "two"}, "no place for the picture png"),
        ("interleaved", {"json": "{", "a.png": picture(1)}, "JSONDecodeError"),
        ("interleaved", {"json": "[]"}, "TypeError"),
        ("interleaved", {"json": json.dumps({"texts": ["a"]})}, "KeyError"),
        ("interleaved", {"json": json.dumps({"images": [None], "texts": [7]})}, "text slot 0 holds 7, which is no text"),
        ("interleaved", {"json": json.dumps(PAGE)}, "names image 'a.png'"),
        ("interleaved", {"json": json.dumps(PAGE), "a.png": picture(1), "b.png": picture(2)}, "no place for the picture b.png"),
        ("text", {"json": "{}"}, "needs a txt member"),
        ("text", {"txt": "with a picture", "png": picture(1)}, "no place for the picture png"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_sample_that_does_not_follow_its_layout_is_named(
    config: TarsConfig, tmp_path: Path, source: str, sample: dict[str, Any], said: str, first: bool
) -> None:
    good = {"captions": caption, "interleaved": page, "text": prose}[source](0)
    write(tmp_path / "wrong.tar", [sample, good] if first else [good, sample])
    with pytest.raises(UserError, match=rf"{source}:.*wrong\.tar:{0 if first else 1:05d}: .*{said}"):
        prepare(replace(config, **{source: str(tmp_path / "wrong.tar")}))


def test_empty_doubled_and_compressed_shards_are_named(config: TarsConfig, shards: Path, tmp_path: Path) -> None:
    write(shards / "cap-001.tar", [])
    with pytest.raises(UserError, match=r"cap-001\.tar: holds no samples"):
        prepare(config)
    (shards / "cap-001.tar").write_bytes((shards / "cap-000.tar").read_bytes())
    with pytest.raises(UserError, match="the same, byte for byte"):
        prepare(config)
    (shards / "cap-001.tar").write_bytes(gzip.compress((shards / "cap-000.tar").read_bytes()))
    with pytest.raises(UserError, match=r"cap-001\.tar is compressed"):
        prepare(config)


# ------------------------------------------------------------------------------------------------------ the commands


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/a/cc12m-{000..003}.tar", "/a/cc12m-{000..003}.tar"),
        ("/a/{train,more}-{0..3}.tar", "/a/{train,more}-{0..3}.tar"),
        ("~/a-*.tar", "~/a-*.tar"),
        ("[/a/x-{0..3}.tar,/b/y.tar]", ["/a/x-{0..3}.tar", "/b/y.tar"]),
        ('"/a/x-{0..3}.tar"', "/a/x-{0..3}.tar"),
    ],
)
def test_patterns_are_written_on_the_command_line_as_they_are(given: str, expected: Any) -> None:
    made = compose("prepare", PrepareConfig, ["corpus=tars", "corpus.name=mine", f"corpus.captions={given}"])
    assert isinstance(made.corpus, TarsConfig)
    assert made.corpus.captions == expected


def test_the_yaml_file_and_the_dataclass_agree() -> None:
    made = compose("prepare", PrepareConfig, ["corpus=tars", "corpus.name=mine", "corpus.text=/a.tar"]).corpus
    assert made == TarsConfig(name="mine", text="/a.tar")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["corpus.text=/a.tar"], r"corpus\.name: no value given"),
        (["corpus.name=mine"], r"no shards given.*corpus\.captions"),
        (["corpus.name=mine", "corpus.text=7"], r"corpus\.text=7"),
        (["corpus.name=mine", "corpus.text=/a.tar", "corpus.val_share=1"], r"corpus\.val_share=1"),
        (["corpus.name=mine", "corpus.text=/a.tar", "corpus.vocab_size=100"], r"corpus\.vocab_size=100"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose("prepare", PrepareConfig, ["corpus=tars", *overrides])


def test_a_pattern_the_shell_expanded_is_refused() -> None:
    refuse_repetition(["corpus=tars", "corpus.name=mine", "corpus.captions=/a/0.tar"])
    with pytest.raises(UserError, match=r"corpus\.captions is given 2 times.*quote it"):
        refuse_repetition(["corpus=tars", "corpus.captions=/a/0.tar", "corpus.captions=/a/1.tar"])


def test_training_on_own_data_asks_for_the_corpus_and_says_how_to_make_it() -> None:
    with pytest.raises(UserError, match=r"data\.corpus: no value given. Add data\.corpus=\.\.\."):
        compose("train", TrainConfig, ["data=own"])
    for name in ("nowhere", "/some/folder"):
        with pytest.raises(UserError, match=rf"python -m data_pipelines\.prepare corpus=tars corpus\.name={name} "):
            ensure_corpus(name)


def test_a_source_the_corpus_lacks_is_refused_and_the_advice_leaves_it_out(
    config: TarsConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(replace(config, interleaved=None))
    own = load_tokenizer(folder / "tokenizer")
    advice = capsys.readouterr().out.rsplit("mm1.train ", 1)[1].split()
    assert advice[:2] == ["data=own", "data.corpus=mine"]

    def stream(overrides: list[str]) -> LaneStream:
        data = compose("train", TrainConfig, overrides).data
        return LaneStream(folder, data, PackingConfig(64, 4), own, image_tokens=4, global_batch=4, seed=0)

    with pytest.raises(UserError, match=r"'mine' has no interleaved/train\. It has: captions/train"):
        stream(advice[:2])
    assert set(stream(advice).names) == {"captions", "text"}
