"""The commands that look at data: verify finds what was broken on purpose and nothing else; stream prints what training sees."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.command import compose
from configs.errors import UserError
from data_pipelines.shards import Manifest, index_shard
from data_pipelines.stream import StreamConfig, lines
from data_pipelines.verify import Report, main, verify_shard
from mm1.config import TrainConfig
from tests.corpus import square, write_corpus

# ----------------------------------------------------------------------------------------------------------------- verify


def shard(path: Path, members: list[tuple[str, bytes]]) -> list[int]:
    """Write a tar as the standard library does; returns where each member's header stands, and at last the closing blocks."""
    import io
    import tarfile

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
    import io
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("d" * 98 + "/k.txt", "d" * 98 + "/k.png"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert len(index_shard(tmp_path / "a.tar")) == 1
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
    manifest.splits["text"]["train"].characters = sum(
        len((corpus / s.file).read_bytes()[offset : offset + size])
        for s in manifest.splits["text"]["train"].shards
        for sample in index_shard(corpus / s.file)
        for offset, size in sample.members.values()
    )
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
    assert "no such shard" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "*.tar" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- stream


SIZES = ("train.global_batch=12", "packing.seq_len=96", "packing.max_images=4", "connector.num_tokens=4")


def streamed(corpus: Path, *overrides: str) -> list[str]:
    return list(lines(compose("stream", StreamConfig, [f"data.corpus={corpus}", *SIZES, *overrides])))


def by_step_and_slot(printed: list[str]) -> list[str]:
    return sorted(printed, key=lambda line: [int(number) for number in line.split()[:2]])


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 2), (4, 0), (4, 3), (12, 1)])
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


@pytest.mark.parametrize(("name", "schema"), [("stream", StreamConfig)])
def test_the_data_shown_are_those_of_the_base_configuration(name: str, schema: type[StreamConfig]) -> None:
    shown, trained = compose(name, schema), compose("train", TrainConfig)
    assert (shown.data, shown.packing, shown.seed) == (trained.data, trained.packing, trained.seed)
    assert (shown.train.global_batch, shown.connector.num_tokens) == (trained.train.global_batch, trained.image_tokens)


@pytest.mark.parametrize("module", ["verify", "stream"])
def test_help_needs_no_torch(module: str) -> None:
    code = "import sys; sys.argv = ['x', '--help']; import atexit; atexit.register(lambda: print('torch' in sys.modules));"
    code += f"from data_pipelines.{module} import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"data_pipelines.{module}" in done.stdout
    assert done.stdout.endswith("False\n")
