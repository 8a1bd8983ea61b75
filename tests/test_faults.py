"""Damaged data: every good sample is delivered, every bad one is named once, and nothing is ever paired wrongly."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import PIL.Image
import pytest

from configs.errors import UserError
from data_pipelines.config import DataConfig, PackingConfig, SourceConfig
from data_pipelines.document import Origin
from data_pipelines.faults import Fault, FaultLog, Loss, SampleFault, check_budgets
from data_pipelines.formats import READERS, read_document
from data_pipelines.images import SquareDecoder
from data_pipelines.lanes import LaneSequence, LaneStream, totals
from data_pipelines.loader import PackedLoader
from data_pipelines.packing import MOST_LOST_IN_A_ROW, Feed
from data_pipelines.reader import ShardError, SplitReader
from data_pipelines.shards import Manifest, SplitWriter, index_path
from data_pipelines.tar import Damage, Sample, read_members, samples
from tests.corpus import square, tokenizer, write_corpus

M = 4
SAMPLES = 24
"""Captions of tests.corpus, each naming its number and the colour of its picture."""


def opened(corpus: Path, seed: int = 0, kinds: tuple[str, ...] = ("captions",), policy: str = "first_fit") -> LaneStream:
    data = DataConfig(str(corpus), {kind: SourceConfig(kind, 1 / len(kinds)) for kind in kinds})
    packing = PackingConfig(seq_len=96, max_images=4, policy=policy, open_sequences=3)
    return LaneStream(corpus, data, packing, tokenizer(), image_tokens=M, global_batch=4, seed=seed)


def sequences(stream: LaneStream, steps: int, image_size: int = 8) -> Iterator[LaneSequence]:
    return islice(stream.lanes([0, 1, 2, 3], decoder=SquareDecoder(image_size)), 4 * steps)


def delivered(items: list[LaneSequence]) -> Counter[str]:
    """origin -> how often it was delivered; checks on the way that each caption names the colour of the picture before it."""
    found: Counter[str] = Counter()
    for item in items:
        s = item.sequence
        assert item.pixels is not None
        assert len(item.pixels) == len(s.image_starts)
        for pixels, start in zip(item.pixels, s.image_starts, strict=True):
            text = tokenizer().decode(s.input_ids[start + M : start + M + 14])
            colour = PIL.Image.new("RGB", (1, 1), text.split()[1]).getpixel((0, 0))
            assert tuple(pixels[0, 0].tolist()) == colour
        found.update(str(origin) for origin in s.origins)
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "tiny", captions=SAMPLES)


def spoil(corpus: Path, number: int, extension: str, content: bytes | None = None, at: int = 0) -> str:
    """Overwrite bytes of one member of a training caption (its header: at = -512); returns the sample's key."""
    reader = SplitReader(corpus, Manifest.load(corpus), "captions", "train")
    members = reader[number]
    offset, size, _ = reader.index.sample(number)[1][extension]
    path = corpus / members.shard
    data = bytearray(path.read_bytes())
    new = content if content is not None else b"\xff" * size
    data[offset + at : offset + at + len(new)] = new
    path.write_bytes(data)
    return members.key


HTML = b"<html>404 not found</html>"


@pytest.mark.parametrize(
    ("extension", "content", "at", "reason"),
    [
        ("png", HTML, 0, "not a whole, decodable image"),
        ("png", b"\xff" * 30, 40, "not a whole, decodable image"),
        ("txt", b"\xff\xfe\xff", 0, "does not follow the layout"),
        ("txt", b"renamed.txt", -512, "does not hold here"),
        ("png", b"\0" * 512, -512, "does not hold here"),
    ],
)
def test_a_spoilt_sample_is_skipped_and_named_once_and_all_others_stay(
    corpus: Path, extension: str, content: bytes, at: int, reason: str
) -> None:
    key = spoil(corpus, 7, extension, content, at)
    stream = opened(corpus)
    items = list(sequences(stream, 40))
    found = delivered(items)
    faults = [fault for item in items for fault in item.faults]
    assert {fault.key for fault in faults} == {key}
    assert reason in faults[0].reason
    assert len(found) == SAMPLES - 1
    assert not [origin for origin in found if origin.endswith(f":{key}")]
    # once an epoch, for an epoch passes it once
    counts = totals(stream, {item.slot: item.state for item in items})["captions"]
    assert counts.skipped == len(faults) <= counts.read / SAMPLES + 4
    where = (corpus / faults[0].shard).read_bytes()[faults[0].start : faults[0].end]
    assert len(where) == faults[0].end - faults[0].start > 512


@pytest.mark.parametrize("keep", [0, 1, 300, 512, 700, 1100, 1536, 2048, 2600, 3500, 4097])
def test_a_truncated_shard_keeps_what_is_left_of_it(corpus: Path, keep: int) -> None:
    manifest = Manifest.load(corpus)
    shard = manifest.split("captions", "train").shards[1]
    reader = SplitReader(corpus, manifest, "captions", "train")
    ends = {
        m.key: max(o + s for o, s, _ in reader.index.sample(i)[1].values()) for i, m in enumerate(reader) if m.shard == shard.file
    }
    path = corpus / shard.file
    path.write_bytes(path.read_bytes()[:keep])
    items = list(sequences(opened(corpus), 40))
    lost = {key for key, end in ends.items() if end > keep}
    assert len(delivered(items)) == SAMPLES - len(lost)
    assert {fault.key for item in items for fault in item.faults} == lost


def test_a_shard_that_was_exchanged_gives_faults_and_no_other_samples(corpus: Path, tmp_path: Path) -> None:
    """Same size, same name, other content: the order of its samples would pair keys with what they never named."""
    manifest = Manifest.load(corpus)
    first, second = (corpus / shard.file for shard in manifest.split("captions", "train").shards[:2])
    reader = SplitReader(corpus, manifest, "captions", "train")
    keys = {members.key for members in reader if members.shard == first.name}
    first.write_bytes(second.read_bytes())
    items = list(sequences(opened(corpus), 40))
    assert {fault.key for item in items for fault in item.faults} == keys
    assert len(delivered(items)) == SAMPLES - len(keys)


def test_faults_ride_with_their_sequences_through_workers_and_do_not_change_the_stream(corpus: Path) -> None:
    spoil(corpus, 3, "png", HTML)
    spoil(corpus, 11, "txt", b"\xff")

    def run(workers: int) -> tuple[list, list]:
        loader = PackedLoader(opened(corpus), image_size=8, micro_batch=2, workers=workers)
        batches = [batch for step in islice(loader, 12) for batch in step]
        return [b.input_ids.tolist() + b.images.tolist() for b in batches], [fault for b in batches for fault in b.faults]

    alone, faults = run(0)
    assert {fault.key for fault in faults} == {"00000003", "00000011"}
    assert run(2) == (alone, faults)


def test_skips_are_counted_exactly_over_a_resume(corpus: Path) -> None:
    spoil(corpus, 5, "png", HTML)
    spoil(corpus, 9, "txt", b"\xff")
    stream = opened(corpus)
    whole = list(sequences(stream, 30))
    for stop in (1, 7, 19):
        states = {item.slot: item.state for item in whole[: 4 * stop]}
        resumed = list(islice(opened(corpus).lanes([0, 1, 2, 3], stop, states, SquareDecoder(8)), 4 * (30 - stop)))
        assert [item.state for item in resumed] == [item.state for item in whole[4 * stop :]]
        assert [item.faults for item in resumed] == [item.faults for item in whole[4 * stop :]]


@pytest.mark.parametrize("policy", ["concat", "first_fit"])
def test_a_document_that_was_cut_is_one_loss_however_many_of_its_pieces_are_lost(corpus: Path, policy: str) -> None:
    reader, bad = SplitReader(corpus, Manifest.load(corpus), "interleaved", "train"), 2
    for name, (offset, size, _) in reader.index.sample(bad)[1].items():
        if name.endswith(".png"):
            with open(corpus / reader[bad].shard, "r+b") as file:
                file.seek(offset)
                file.write(bytes(size))
    data = DataConfig(str(corpus), {"interleaved": SourceConfig("interleaved", 1.0)})
    packing = PackingConfig(seq_len=24, max_images=1, policy=policy, open_sequences=3)  # a piece for each picture
    stream = LaneStream(corpus, data, packing, tokenizer(), image_tokens=M, global_batch=1, seed=0)
    items = list(islice(stream.lanes([0], decoder=SquareDecoder(8)), 120))
    pieces = sum(len(item.faults) for item in items)
    lost = totals(stream, {0: items[-1].state})["interleaved"].skipped
    read = [place for place in range(items[-1].state["feeds"]["interleaved"][0]) if stream.sources[0].order[0, place] == bad]
    assert len(read) - 1 <= lost <= len(read)  # the last may still wait
    assert pieces > 2 * lost > 4
    for at in range(0, 60, 7):  # wherever a run was stopped, also between two pieces of the document
        resumed = islice(stream.lanes([0], at + 1, {0: items[at].state}, SquareDecoder(8)), 30)
        assert [item.state for item in resumed] == [item.state for item in items[at + 1 : at + 31]]


def test_states_without_lost_documents_are_restored() -> None:
    feed = Feed(0, "captions", lambda place: None, M)
    feed.restore([5, 0, 5, 60, 4, 4, 48, 4, 1])
    assert feed.counts.skipped == 1
    assert feed.state() == [5, 0, 5, 60, 4, 4, 48, 4, 1]


def test_a_source_of_nothing_but_damage_stops_instead_of_running_for_ever(corpus: Path) -> None:
    for shard in Manifest.load(corpus).split("captions", "train").shards:
        (corpus / shard.file).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{MOST_LOST_IN_A_ROW + 1:,} samples in a row"):
        next(sequences(opened(corpus), 1))


def test_a_missing_shard_and_an_unreadable_one_are_no_damage(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from data_pipelines.storage import retry

    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    real, failing = os.pread, [0]

    def pread(handle: int, size: int, offset: int) -> bytes:
        failing[0] += 1
        if failing[0] % 3:
            raise OSError(5, "Input/output error")
        return real(handle, size, offset)

    expected = delivered(list(sequences(opened(corpus), 10)))
    monkeypatch.setattr(os, "pread", pread)
    items = list(sequences(opened(corpus), 10))
    assert delivered(items) == expected  # retried, every time
    assert not [fault for item in items for fault in item.faults]

    def dead(handle: int, size: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", dead)
    with pytest.raises(ShardError, match="Input/output error"):
        list(sequences(opened(corpus), 10))
    monkeypatch.setattr(os, "pread", real)
    (corpus / Manifest.load(corpus).split("captions", "train").shards[0].file).unlink()
    with pytest.raises(ShardError, match=r"captions-train-000000\.tar"):
        list(sequences(opened(corpus), 10))


# ----------------------------------------------------------------------------------------------------------- the accounts


def test_the_log_has_each_fault_once_also_after_a_kill(tmp_path: Path) -> None:
    faults = [Fault("captions", "a.tar", f"{i}", i, i + 1, "why") for i in range(5)]
    log = FaultLog(tmp_path / "faults.jsonl")
    assert log.add(faults[:3]) == faults[:3]
    assert log.add(faults[1:4]) == [faults[3]]
    with open(tmp_path / "faults.jsonl", "a") as file:
        file.write('{"source": "captions", "sh')
    again = FaultLog(tmp_path / "faults.jsonl")
    assert len(again) == 4
    again.add(faults)
    rows = [Fault(**json.loads(line)) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert rows == faults


def test_budgets() -> None:
    check_budgets({"a": Loss(10_000, 108), "b": Loss(100, 0)}, {"a": 0.01, "b": 0.0}, "log")
    check_budgets({"a": Loss(20, 8)}, {"a": 0.01}, "log")
    for loss, share in ((Loss(10_000, 109), 0.01), (Loss(20, 9), 0.01), (Loss(10**6, 1), 0.0)):
        with pytest.raises(UserError, match=rf"a: {loss.skipped:,} of {loss.read:,}.*data\.sources\.a\.max_faults={share:g}"):
            check_budgets({"a": loss}, {"a": share}, "log")


# ------------------------------------------------------------------------------------------------------------- the fuzzer


class Bytes:
    """A ShardFile over bytes."""

    name = "fuzzed.tar"

    def __init__(self, data: bytes) -> None:
        self.data, self.size, self.reads = data, len(data), 0

    def read(self, offset: int, size: int) -> bytes:
        self.reads += 1
        assert offset >= 0
        assert size >= 0
        return self.data[offset : offset + size]

    def close(self) -> None: ...


def caption_shard(count: int = 8) -> tuple[bytes, list[tuple[int, int]], list[dict[str, bytes]]]:
    """(tar, byte range of each sample, its members): caption i names i, and picture i holds i in its pixels."""
    buffer, ranges, contents = io.BytesIO(), [], []
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(count):
            picture = io.BytesIO()
            PIL.Image.new("RGB", (4, 4), (i * 20, 7, 9)).save(picture, "PNG")
            members = {"png": picture.getvalue(), "txt": f"number {i} ".encode() * (1 + i % 3 * 40)}
            start = tar.offset
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{i:08d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            ranges.append((start, tar.offset))
            contents.append(members)
    return buffer.getvalue(), ranges, contents


def mutated(rng: random.Random, data: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """(damaged bytes, ranges of the original that are no longer intact)."""
    kind = rng.choice(["flip", "zero", "noise", "cut", "drop", "insert", "double", "swap", "header"])
    size = rng.choice([1, 2, 7, 100, 511, 512, 513, 1024, 3000])
    at = rng.randrange(len(data))
    if kind in ("drop", "insert", "double") and rng.random() < 0.5:
        at, size = at // 512 * 512, max(512, size // 512 * 512)
    end = min(len(data), at + size)
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :], [(at, at + 1)]
    if kind == "zero":
        return data[:at] + bytes(end - at) + data[end:], [(at, end)]
    if kind == "noise":
        return data[:at] + rng.randbytes(end - at) + data[end:], [(at, end)]
    if kind == "cut":
        return data[:at], [(at, len(data))]
    if kind == "drop":
        return data[:at] + data[end:], [(at, end)]
    if kind == "insert":
        return data[:at] + rng.randbytes(size) + data[at:], [(at, at + 1)]
    if kind == "double":
        return data[:end] + data[at:end] + data[end:], [(max(0, at - 1), end + 1)]
    if kind == "swap":
        other = rng.randrange(len(data))
        first, second = sorted((at, other))
        size = min(size, second - first, len(data) - second)
        a, b = data[first : first + size], data[second : second + size]
        swapped = data[:first] + b + data[first + size : second] + a + data[second + size :]
        return swapped, [(first, first + size), (second, second + size)]
    block = at // 512 * 512  # fields of what may be a header, rewritten with a valid checksum
    header = bytearray(data[block : block + 512].ljust(512, b"\0"))
    field, value = rng.choice([(124, b"%011o\0" % rng.choice([0, 1, 511, 513, 10**9])), (156, bytes([rng.randrange(256)])),
                               (0, b"00000001.txt\0"), (124, b"\xff" * 12), (124, b"-0000000777\0")])  # fmt: skip
    header[field : field + len(value)] = value
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:block] + bytes(header) + data[block + 512 :], [(max(0, block - 1), len(data))]


@pytest.mark.parametrize("part", range(8))
def test_ten_thousand_mutated_shards(part: int) -> None:
    """No crash, no hang, no picture with another sample's caption, and no sample lost whose bytes are untouched."""
    data, ranges, contents = caption_shard()
    pictures = {members["png"]: i for i, members in enumerate(contents)}
    lost_something = 0
    for number in range(1250):
        rng = random.Random(part * 10_000 + number)
        damaged, gone = data, []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            if not gone or len(damaged) == len(data):  # ranges of the original mean nothing once bytes have moved
                damaged, more = mutated(rng, damaged)
                gone += more
        if not damaged:
            continue
        file = Bytes(damaged)
        items = list(samples(file))
        assert file.reads < 4 * len(damaged) / 512 + 50
        kept = set()
        for item in items:
            if isinstance(item, Damage):
                assert 0 <= item.start <= item.end
                continue
            members = read_members(file, item)
            if members.get("png") in pictures and "txt" in members:
                owner = pictures[members["png"]]
                text = members["txt"].decode("utf-8", "replace")
                named = {int(word) for word in text.split("number ")[1:2] for word in [word.split(" ")[0]] if word.isdigit()}
                intact = members["txt"] in [c["txt"] for c in contents]
                assert not intact or named == {owner}, (part, number)
                if members == contents[owner]:
                    kept.add(owner)
            for format in READERS:
                try:
                    document = read_document(format, members, Origin("s", "t", item.key))
                    assert all(isinstance(part, str) or part.data is not None for part in document.parts)
                except UserError:
                    pass
        good = {i for i, (start, end) in enumerate(ranges) if not any(a < end and start < b for a, b in gone)}
        assert good <= kept, (part, number, good - kept)
        lost_something += kept != set(range(len(ranges)))
    assert lost_something > 600  # the mutations do bite


@pytest.mark.parametrize("part", range(4))
def test_mutated_json_is_read_or_named(part: int) -> None:
    page = {"images": [None, "0.png", None], "texts": ["before", None, "after"]}
    mmc4 = {"text_list": ["a", "b"], "image_info": [{"matched_text_index": 1, "image_name": "x", "image_base64": "aGk="}]}
    rng = random.Random(part)
    accepted = refused = named = 0
    for _ in range(1500):
        text = bytearray(json.dumps(rng.choice([page, mmc4])).encode())
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(text))
            text[at : at + rng.choice([0, 1, 1, 4])] = rng.choice(
                [b"", b"null", b"[", b"}", b'"', b"-1", b"1e999", b"\\ud800", b"\xff", b"{}"]
            )
        members = {"json": bytes(text), "0.png": square("red")}
        for format in ("energon", "mmc4", "mint1t"):
            try:
                document = read_document(format, members, Origin("s", "t", "k"))
            except UserError as error:
                named += "s:t:k" in str(error)
                refused += 1
            else:
                accepted += 1
                assert document.text.encode() is not None
    assert accepted > 20
    assert named == refused > 1000


def test_numbers_of_headers_are_checked_before_they_are_believed() -> None:
    """A name of gigabytes, a size below zero, one beyond the end: each is a damage, and none makes the scan go backwards."""
    data, ranges, _ = caption_shard(3)
    for kind, size in (
        (b"L", b"%011o\0" % 10**9),
        (b"x", b"%011o\0" % (1 << 20)),
        (b"0", b"\xff" * 12),
        (b"0", b"-0000000777\0"),
    ):
        header = bytearray(data[ranges[1][0] : ranges[1][0] + 512])
        header[124:136], header[156:157] = size, kind
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        file = Bytes(data[: ranges[1][0]] + bytes(header) + data[ranges[1][0] + 512 :])
        items = list(samples(file))
        assert next(item.key for item in items if isinstance(item, Sample)) == "00000000"
        assert any(isinstance(item, Damage) for item in items)
        assert file.reads < 60


def test_links_and_paths_lead_nowhere(tmp_path: Path) -> None:
    """A member called ../../x or a link is bytes under a strange key, or nothing: no file is written, no link followed."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, target in (("k.txt", tarfile.SYMTYPE, str(secret)), ("l.txt", tarfile.LNKTYPE, str(secret))):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        info = tarfile.TarInfo("../../etc/x.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    before = sorted(tmp_path.rglob("*"))
    items = list(samples(Bytes((tmp_path / "a.tar").read_bytes())))
    assert [item.key for item in items if isinstance(item, Sample)] == ["../../etc/x"]
    assert sum("no regular file" in item.reason for item in items if isinstance(item, Damage)) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_that_is_damaged_or_of_another_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    path = index_path(corpus, "captions", "train")
    good = path.read_bytes()
    manifest = Manifest.load(corpus)
    for content in (
        b"",
        b"nonsense",
        good[:40],
        good[:-64],
        good.replace(b'"version": 1', b'"version": 9'),
        b"mm1index" + struct.pack("<Q", 1 << 60),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"captions-train\.idx"):
            SplitReader(corpus, manifest, "captions", "train")
    path.write_bytes(index_path(corpus, "text", "train").read_bytes())
    with pytest.raises(UserError, match="does not belong"):
        SplitReader(corpus, manifest, "captions", "train")


def test_pixels_are_capped_before_anything_is_decoded(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipelines import images

    monkeypatch.setattr(images, "MAX_PIXELS", 200)
    items = list(sequences(opened(corpus), 1))
    assert all("256" in fault.reason or "16x16" in fault.reason for item in items for fault in item.faults)
    assert not delivered(items)


def test_a_split_writer_keeps_members_of_a_sample_together(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "s", "train", format="energon", shard_bytes=2000)
    for i in range(9):
        writer.write({"json": f"{i}", "0.png": bytes(900), "1.png": bytes([i] * 10)})
    manifest = Manifest("s", "tests", {"s": {"train": writer.close()}})
    manifest.save(tmp_path)
    reader = SplitReader(tmp_path, manifest, "s", "train")
    assert [(m["json"], m["1.png"][:1]) for m in reader] == [(f"{i}".encode(), bytes([i])) for i in range(9)]
    with pytest.raises(SampleFault):
        raise reader[0].fault("pickles and prints")
