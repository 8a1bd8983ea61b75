"""The commands that look at data.

verify finds what was broken on purpose and nothing else; stream and inspect show what training sees.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import pytest

from configs.command import compose
from configs.errors import UserError
from data_pipelines.inspect import InspectConfig, contact_sheet, look
from data_pipelines.loader import PackedLoader
from data_pipelines.packing import IGNORE
from data_pipelines.page import page
from data_pipelines.reader import SplitReader, read_all
from data_pipelines.shards import Manifest, SplitWriter
from data_pipelines.storage import open_file
from data_pipelines.stream import StreamConfig, StreamSettings, lines, open_stream
from data_pipelines.tar import Sample, samples
from data_pipelines.verify import Report, main, verify_shard
from data_pipelines.views import End, Text, runs
from mm1.config import TrainConfig
from tests.corpus import square, tokenizer, write_corpus

# ----------------------------------------------------------------------------------------------------------------- verify


def shard(path: Path, members: list[tuple[str, bytes]]) -> list[int]:
    """Write a tar as the standard library does; returns where each member's header stands, and at last the closing blocks."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        starts = []
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            starts.append(tar.offset)
            tar.addfile(info, io.BytesIO(data))
        return [*starts, tar.offset]


def captions(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    pairs = [((f"{i:04d}.txt", f"caption {i}".encode()), (f"{i:04d}.png", square("red"))) for i in range(first, first + count)]
    return [member for pair in pairs for member in pair]


def verified(path: Path, *, images: bool = False, format: str | None = None) -> Report:
    return verify_shard(path, format, images=images)


def test_a_good_shard_has_counts_and_no_faults(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", captions(5))
    report = verified(tmp_path / "a.tar", images=True)
    assert (report.samples, report.documents, report.images, report.faults) == (5, 5, 5, [])
    assert report.characters == 5 * len("caption 0")
    assert report.format == "img2dataset"


def test_a_shard_cut_at_any_border_keeps_every_sample_before_the_cut(tmp_path: Path) -> None:
    starts = shard(tmp_path / "whole.tar", captions(4))
    whole = (tmp_path / "whole.tar").read_bytes()
    for border in starts:
        for cut in {border - 1, border, border + 1, border + 512, border + 520} - {-1, 0}:
            (tmp_path / "cut.tar").write_bytes(whole[:cut])
            report = verified(tmp_path / "cut.tar", format="img2dataset")
            ends = [starts[i] - (-len(square("red")) % 512) for i in range(2, len(starts), 2)]  # a sample's last byte
            assert report.documents == sum(end <= cut for end in ends), (border, cut)
            if cut < starts[-1] + 1024:
                assert any("truncated" in fault.reason for fault in report.faults), (border, cut)
            # Of what is left, a sample is either good or has a fault under its key.
            keys = {fault.key for fault in report.faults if fault.key}
            assert report.samples <= report.documents + len(keys)


@pytest.mark.parametrize("filling", [b"\xff", b"\0"])
@pytest.mark.parametrize("broken", range(16))
def test_a_damaged_header_costs_its_own_sample_alone(tmp_path: Path, broken: int, filling: bytes) -> None:
    starts = shard(tmp_path / "a.tar", captions(8))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[starts[broken] : starts[broken] + 512] = filling * 512
    (tmp_path / "a.tar").write_bytes(data)
    report = verified(tmp_path / "a.tar")
    assert report.documents == report.images == 7
    lost = report.faults[0] if broken % 2 == 0 else report.faults[1]
    assert lost.start == starts[broken]
    assert {fault.key for fault in report.faults} == {None, f"{broken // 2:04d}"}
    if broken < 15:
        assert lost.end == starts[broken + 1]


def test_members_are_not_paired_across_a_damaged_region(tmp_path: Path) -> None:
    """One key on both sides: the picture of one sample and the text of another must stay apart."""
    starts = shard(tmp_path / "a.tar", [("k.png", square("red")), ("x.txt", b"lost"), ("x.png", b"lost"), ("k.txt", b"not red")])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    for at in starts[1:3]:
        data[at : at + 100] = b"\xff" * 100
    (tmp_path / "a.tar").write_bytes(data)
    report = verified(tmp_path / "a.tar", format="img2dataset")
    assert report.documents == 0
    assert [fault.key for fault in report.faults if fault.key] == ["k", "k"]


def test_a_name_whose_long_header_was_lost_is_not_trusted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("d" * 98 + "/k.txt", "d" * 98 + "/k.png"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    (found,) = [item for item in samples(open_file(tmp_path / "a.tar")) if isinstance(item, Sample)]
    assert list(found.members) == ["txt", "png"]
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[:512] = b"\xff" * 512
    (tmp_path / "a.tar").write_bytes(data)
    report = verified(tmp_path / "a.tar", format="text")
    assert any("may be cut short" in fault.reason for fault in report.faults)
    assert report.documents == 0


def test_every_fault_of_a_shard_is_found_and_every_good_sample_counted(tmp_path: Path) -> None:
    members = captions(12)
    members[5] = ("0002.png", b"<html>404 not found</html>")
    members[17] = ("0008.png", square("blue", 64)[:-40])  # the header is whole: only decoding tells
    members = [member for member in members if member[0] not in {"0004.txt", "0010.png"}]
    starts = shard(tmp_path / "a.tar", members)
    header_only, decoded = verified(tmp_path / "a.tar"), verified(tmp_path / "a.tar", images=True)
    assert [fault.key for fault in header_only.faults] == ["0002", "0004", "0010"]
    assert [fault.key for fault in decoded.faults] == ["0002", "0004", "0008", "0010"]
    assert (header_only.documents, decoded.documents, decoded.samples) == (9, 8, 12)
    page = decoded.faults[0]
    assert (page.start, page.end) == (starts[5] + 512, starts[5] + 512 + len(members[5][1]))
    assert (tmp_path / "a.tar").read_bytes()[page.start : page.end] == members[5][1]


def test_two_broken_pictures_of_one_page_are_two_faults(tmp_path: Path) -> None:
    page = json.dumps({"images": ["0.png", None, "1.png"], "texts": [None, "between", None]}).encode()
    shard(tmp_path / "a.tar", [("k.0.png", b"no"), ("k.1.png", b"no"), ("k.json", page)])
    assert [fault.key for fault in verified(tmp_path / "a.tar", format="energon").faults] == ["k", "k"]


def test_a_picture_beyond_the_cap_is_a_fault_without_being_decoded(tmp_path: Path) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    shard(tmp_path / "a.tar", [*captions(2), ("9.txt", b"large"), ("9.png", buffer.getvalue())])
    (fault,) = verified(tmp_path / "a.tar").faults
    assert fault.key == "9"
    assert "81,000,000 pixels" in fault.reason


def test_pictures_inside_a_json_are_decoded_too(tmp_path: Path) -> None:
    def page(data: bytes) -> bytes:
        image = {"image_name": "a.png", "matched_text_index": 0, "image_base64": base64.b64encode(data).decode()}
        return json.dumps({"text_list": ["A sentence."], "image_info": [image]}).encode()

    shard(tmp_path / "a.tar", [("1.json", page(square("red"))), ("2.json", page(square("blue", 64)[:-40]))])
    assert verified(tmp_path / "a.tar").faults == []
    report = verified(tmp_path / "a.tar", images=True)
    assert report.format == "mmc4"
    assert [fault.key for fault in report.faults] == ["2"]


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "empty"), (b"\x1f\x8b\x08" + bytes(600), "compressed"), (bytes(10240), "holds no samples")]
)
def test_what_is_no_shard_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    (fault,) = verified(tmp_path / "a.tar").faults
    assert said in fault.reason


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "tiny")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "tiny")


def verify_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    status = main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_corpus_is_compared_with_its_manifest(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.load(corpus)
    manifest.splits["text"]["train"].characters = sum(len(members["txt"]) for members in read_all(corpus, "text", "train"))
    manifest.save(corpus)
    _, said = verify_json(capsys, str(corpus))
    # The tests' corpus counts no characters: each split but the one mended here is reported, and nothing else.
    assert len(said["corpus_faults"]) == 5
    assert all("characters" in fault["reason"] for fault in said["corpus_faults"])

    first = corpus / manifest.splits["captions"]["train"].shards[0].file
    data = bytearray(first.read_bytes())
    at = data.index(b"square number")
    data[at] ^= 1  # one bit of a caption: still a perfect shard, but not this corpus's
    first.write_bytes(data)
    (corpus / manifest.splits["text"]["val"].shards[0].file).unlink()
    status, said = verify_json(capsys, str(corpus))
    faults = {(Path(f["shard"]).name, f["reason"].split(":")[0]) for s in said["shards"] for f in s["faults"]}
    assert status == 1
    assert faults == {(first.name, "sha256"), (manifest.splits["text"]["val"].shards[0].file, "cannot be read")}


def test_exit_status_and_json(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = str(corpus / "captions-*.tar")
    status, said = verify_json(capsys, pattern, "--images")
    assert (status, said["ok"], said["totals"]["faults"]) == (0, True, 0)
    assert said["totals"]["documents"] == 24 + 12
    first = sorted(corpus.glob("captions-train-*.tar"))[0]
    shutil.copyfile(first, tmp_path / "cut.tar")
    with open(tmp_path / "cut.tar", "r+b") as file:
        file.truncate(700)
    status, said = verify_json(capsys, pattern, str(tmp_path / "cut.tar"), "--processes", "2")
    assert (status, said["ok"], said["totals"]["documents"]) == (1, False, 24 + 12)
    assert main([pattern]) == 0
    assert "No faults." in capsys.readouterr().out
    assert main([str(tmp_path / "cut.tar")]) == 1
    assert "truncated" in capsys.readouterr().out
    assert main([str(tmp_path / "none-{0..2}.tar")]) == 2
    said = capsys.readouterr().err
    assert re.search(r"none-0.tar\): no such file.* Nor is there a corpus of that name", said)
    assert main([str(tmp_path)]) == 2
    assert "*.tar" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- stream


SIZES = ("train.global_batch=12", "packing.seq_len=96", "packing.max_images=4", "connector.num_tokens=4")


def streamed(corpus: Path, *overrides: str) -> list[str]:
    return list(lines(compose("stream", StreamConfig, [f"data.corpus={corpus}", *SIZES, *overrides])))


def by_step_and_slot(printed: list[str]) -> list[str]:
    return sorted(printed, key=lambda line: [int(number) for number in line.split()[:2]])


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 2), (4, 0), (6, 2), (12, 1)])
def test_the_lines_of_all_ranks_are_those_of_one(unbroken: Path, world: int, workers: int) -> None:
    one = streamed(unbroken, "steps=4")
    assert [line.split()[:2] for line in one] == [[str(step), str(slot)] for step in range(4) for slot in range(12)]
    split = [f"world_size={world}", f"workers={workers}", "steps=4"]
    ranks = [streamed(unbroken, f"rank={rank}", *split) for rank in range(0, world, world - 1 if world == 12 else 1)]
    whole = one if world != 12 else [line for line in one if int(line.split()[1]) in {0, 11}]
    assert by_step_and_slot([line for rank in ranks for line in rank]) == whole


@pytest.mark.parametrize("policy", ["first_fit", "concat", "single"])
def test_start_equals_dropping_the_first_steps(unbroken: Path, policy: str) -> None:
    whole = streamed(unbroken, f"packing.policy={policy}", "steps=9")
    assert streamed(unbroken, f"packing.policy={policy}", "start=5", "steps=4") == whole[5 * 12 :]
    assert streamed(unbroken, f"packing.policy={policy}", "start=5", "steps=4", "workers=2") == whole[5 * 12 :]


def test_other_data_are_other_lines(unbroken: Path) -> None:
    ways = [(), ("seed=1",), ("packing.policy=single",), ("data.sources.captions.split=val",), ("connector.num_tokens=5",)]
    assert len({tuple(streamed(unbroken, "steps=2", *way)) for way in ways}) == len(ways)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [(["world_size=5"], "must divide"), (["rank=1"], "rank=1"), (["start=-1"], "start=-1"), (["packing.seq_len=3"], "seq_len")],
)
def test_impossible_streams_are_refused(unbroken: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        streamed(unbroken, *overrides)


@pytest.mark.parametrize(("name", "schema"), [("stream", StreamConfig), ("inspect", InspectConfig)])
def test_the_data_shown_are_those_of_the_base_configuration(name: str, schema: type[StreamSettings]) -> None:
    shown, trained = compose(name, schema), compose("train", TrainConfig)
    assert (shown.data, shown.packing, shown.seed) == (trained.data, trained.packing, trained.seed)
    assert (shown.train.global_batch, shown.connector.num_tokens) == (trained.train.global_batch, trained.image_tokens)
    if isinstance(shown, InspectConfig):
        assert shown.image_encoder.image_size == trained.image_encoder.image_size


# ---------------------------------------------------------------------------------------------------------------- inspect


HOSTILE = "<script>alert(1)</script> & \"quoted\" 'single' \x07 <img src=x onerror=alert(1)> 😀</span></div>"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("corpora") / "hostile")
    manifest = Manifest.load(folder)
    for source, format in (("captions", "img2dataset"), ("text", "text")):
        writer = SplitWriter(folder, source, "train", format=format)
        for number in range(8):
            picture = {"png": square("green")} if source == "captions" else {}
            writer.write({**picture, "txt": f"{number} {HOSTILE}"}, images=len(picture))
        manifest.splits[source]["train"] = writer.close()
    manifest.save(folder)
    return folder


class Read(HTMLParser):
    """What a browser would make of the page: tags, attributes, and the text inside each document's body."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.bodies: list[str] = []
        self.stack: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in {"meta", "img", "br"}:
            return
        self.stack.append(dict(attrs).get("class") or f"<{tag}>")
        if self.stack[-1] == "body":
            self.bodies.append("")

    def handle_endtag(self, tag: str) -> None:
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if "body" in self.stack[3:] and not {"end", "<small>"} & set(self.stack):
            self.bodies[-1] += data


def inspected(corpus: Path, *overrides: str) -> tuple[InspectConfig, str, list]:
    sizes = [*SIZES, "image_encoder.image_size=8", "steps=3", "sequences=36"]
    config = compose("inspect", InspectConfig, [f"data.corpus={corpus}", *sizes, *overrides])
    tallies, views = look(config)
    return config, page(config, range(config.start, config.start + config.steps), tallies, views), views


def shards_texts(folder: Path) -> dict[str, str]:
    """origin -> the text of its document, straight from the shards."""
    found = {}
    for source in Manifest.load(folder).splits:
        for members in read_all(folder, source, "train"):
            spans = json.loads(members["json"])["texts"] if "json" in members else [members["txt"].decode()]
            found[f"{source}:{members.shard}:{members.key}"] = "".join(span for span in spans if span)
    return found


@pytest.mark.parametrize("policy", ["first_fit", "single"])
def test_the_page_holds_every_document_escaped_and_every_image(hostile: Path, policy: str) -> None:
    _, written, views = inspected(hostile, "packing.seq_len=512", "packing.max_images=12", f"packing.policy={policy}")
    documents = [document for shown in views for document in shown.documents]
    read, texts = Read(written), shards_texts(hostile)
    assert len(documents) == len(read.bodies) >= 36
    for document, body in zip(documents, read.bodies, strict=True):
        expected = texts[document.origins[0]].replace("\x07", "\N{SYMBOL FOR BELL}")
        assert body == expected
        assert isinstance(document.parts[-1], End)  # none is so long that it was cut
    images = [attributes for tag, attributes in read.tags if tag == "img"]
    assert len(images) == written.count("<img ") == sum(len(document.pictures) for document in documents) > 20
    assert all((image["src"] or "").startswith("data:image/png;base64,") and image["width"] == "8" for image in images)


def test_a_corpus_cannot_put_code_into_the_page(hostile: Path) -> None:
    _, written, _ = inspected(hostile)
    read = Read(written)
    assert "<script" not in written
    assert "&lt;script&gt;" in written
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "iframe", "link", "object", "a"})
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert read.stack == []


@pytest.mark.parametrize("policy", ["first_fit", "concat"])
def test_black_text_is_what_the_labels_ask_for(unbroken: Path, policy: str) -> None:
    config, _, views = inspected(unbroken, f"packing.policy={policy}")
    stream, _ = open_stream(config)
    items = [item for item, _ in islice(PackedLoader(stream, image_size=None, micro_batch=1).sequences(), 36)]
    for shown, item in zip(views, items, strict=True):
        labels = item.sequence.labels[item.sequence.labels != IGNORE]
        parts = [part for document in shown.documents for part in document.parts]
        scored = "".join(part.text for part in parts if isinstance(part, Text) and not part.unscored)
        assert scored == tokenizer().decode(labels[labels != tokenizer().eos_token_id])
        assert shown.loss_tokens == len(labels)


def test_borders_and_images_are_where_the_model_gets_them(unbroken: Path) -> None:
    config, _, views = inspected(unbroken)
    stream, _ = open_stream(config)
    batches = [b for step in islice(PackedLoader(stream, image_size=8, micro_batch=12), 3) for b in step]
    for batch, group in zip(batches, (views[i : i + 12] for i in (0, 12, 24)), strict=True):
        for row, shown in enumerate(group):
            owners = [number for number, d in enumerate(shown.documents, 1) for _ in range(d.start, d.stop)]
            assert owners + [0] * (96 - len(owners)) == batch.document_ids[row].tolist()
        pictures = [part for shown in group for document in shown.documents for part in document.pictures]
        assert [part.start for part in pictures] == batch.image_slots[:, 1].tolist()
        assert all((part.pixels == image).all() for part, image in zip(pictures, batch.images, strict=True))


def test_tallies_count_all_steps_and_views_only_the_first(unbroken: Path) -> None:
    config, _, every = inspected(unbroken)
    tallies, views = look(compose("inspect", InspectConfig, [f"data.corpus={unbroken}", *SIZES, "steps=3", "sequences=2"]))
    assert len(views) == 2
    assert sum(t.sequences for t in tallies) == 36
    assert sum(t.tokens for t in tallies) == 36 * config.packing.seq_len
    assert sum(t.padding for t in tallies) == sum(shown.length - shown.used for shown in every)
    assert sum(t.images for t in tallies) == sum(len(d.pictures) for shown in every for d in shown.documents)
    assert sum(t.loss_tokens for t in tallies) == sum(shown.loss_tokens for shown in every)
    for tally in tallies:
        assert abs(tally.sequences / 36 - tally.target) < 1 / 12


def test_a_picture_that_training_leaves_out_is_named_and_crossed_out(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = SplitReader(corpus, Manifest.load(corpus), "captions", "train")
    offset, size, _ = reader.index.sample(3)[1]["png"]
    with open(corpus / reader[3].shard, "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    for isolated, where in ((True, rf"captions:{reader[3].shard}:{reader[3].key}"), (False, r"step \d+, slot \d+")):
        _, _, views = inspected(corpus, f"packing.isolate_documents={isolated}")
        said = [line for line in capsys.readouterr().err.splitlines() if "crossed-out" in line]
        assert all(re.search(rf"training leaves out.*: {where}: png: not a whole", line) for line in said)
        squares = [picture.pixels for shown in views for document in shown.documents for picture in document.pictures]
        assert 0 < sum(bool((pixels[:, 0, 1] == 220).all()) for pixels in squares) == len(said) < len(squares)


def test_text_is_not_cut_inside_a_character() -> None:
    ids = tokenizer().encode("😀 smile", add_special_tokens=False)
    found = runs(ids, [True] + [False] * (len(ids) - 1), tokenizer())
    assert [run.text for run in found] == ["😀", " smile"]


def test_too_many_sequences_are_refused(unbroken: Path) -> None:
    with pytest.raises(UserError, match=r"sequences=40.*36"):
        inspected(unbroken, "sequences=40")


def test_a_contact_sheet_has_a_band_for_each_sequence(unbroken: Path) -> None:
    config, _, views = inspected(unbroken)
    whole, half = contact_sheet(views, config.packing.seq_len), contact_sheet(views[:18], config.packing.seq_len)
    assert whole.width == half.width
    assert whole.height > half.height > 18 * 56


@pytest.mark.parametrize("module", ["verify", "stream", "inspect"])
def test_help_needs_no_torch(module: str) -> None:
    code = "import sys; sys.argv = ['x', '--help']; import atexit; atexit.register(lambda: print('torch' in sys.modules));"
    code += f"from data_pipelines.{module} import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"data_pipelines.{module}" in done.stdout
    assert done.stdout.endswith("False\n")
