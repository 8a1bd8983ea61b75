"""Packing, lanes and the loader: what must hold for the data of two runs to be the same data."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from data_pipelines.batch import IGNORE
from data_pipelines.config import DataConfig, PackingConfig, SourceConfig
from data_pipelines.document import Image, Origin
from data_pipelines.lanes import LaneSequence, LaneStream
from data_pipelines.loader import PackedLoader, digest
from data_pipelines.packing import EncodedDocument, Packer, assemble, cut
from data_pipelines.shards import Manifest, index_shard
from data_pipelines.tokens import encode_parts, image_token_id
from tests.corpus import tokenizer, write_corpus

M = 4
LANES = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "tiny")


def stream(
    corpus: Path, policy: str = "first_fit", seed: int = 0, seq_len: int = 96, ratios: tuple[float, ...] = (0.45, 0.45, 0.1)
) -> LaneStream:
    shares = zip(("captions", "interleaved", "text"), ratios, strict=True)
    data = DataConfig(str(corpus), {name: SourceConfig(name, ratio) for name, ratio in shares})
    packing = PackingConfig(seq_len=seq_len, max_images=4, policy=policy, open_sequences=3)
    return LaneStream(corpus, data, packing, tokenizer(), image_tokens=M, global_batch=LANES, seed=seed)


def digests(items: Any) -> list[tuple[int, int, str]]:
    return [(item.step, item.slot, digest(item)) for item in items]


@pytest.mark.parametrize("policy", ["first_fit", "concat", "single"])
def test_any_split_into_ranks_gives_one_stream(corpus: Path, policy: str) -> None:
    whole = sorted(digests(islice(stream(corpus, policy).lanes(list(range(LANES))), LANES * 6)))
    for world in (2, 3, 4, 12):
        owned = [list(range(rank, LANES, world)) for rank in range(world)]
        parts = [islice(stream(corpus, policy).lanes(lanes), LANES // world * 6) for lanes in owned]
        assert sorted(d for part in parts for d in digests(part)) == whole


@pytest.mark.parametrize("policy", ["first_fit", "concat", "single"])
@pytest.mark.parametrize("stop", [1, 2, 5, 9])
def test_resume_at_a_step_equals_no_interruption_also_with_other_ranks(corpus: Path, policy: str, stop: int) -> None:
    lanes = list(range(LANES))
    items = list(islice(stream(corpus, policy).lanes(lanes), LANES * (stop + 4)))
    states = {item.slot: item.state for item in items[: LANES * stop]}  # the last state of each lane wins
    resumed = [
        d
        for rank in range(3)
        for d in digests(islice(stream(corpus, policy).lanes(lanes[rank::3], stop, states), LANES // 3 * 4))
    ]
    assert sorted(resumed) == digests(items[LANES * stop :])


def test_another_seed_is_another_stream(corpus: Path) -> None:
    first = digests(islice(stream(corpus, seed=0).lanes(list(range(LANES))), LANES * 2))
    second = digests(islice(stream(corpus, seed=1).lanes(list(range(LANES))), LANES * 2))
    assert len({d for *_, d in first} & {d for *_, d in second}) < len(first) / 4


@pytest.mark.parametrize(
    ("policy", "seq_len"), [("first_fit", 96), ("concat", 96), ("single", 96), ("concat", 41), ("first_fit", 41)]
)
def test_every_token_of_every_document_is_delivered_once_an_epoch(corpus: Path, policy: str, seq_len: int) -> None:
    manifest = Manifest.load(corpus)
    samples = manifest.split("text", "train").samples
    text = stream(corpus, policy, seq_len=seq_len, ratios=(0.0, 0.0, 1.0))
    source = text.sources["text"]
    packer = Packer(text.packing, M, source.read, stride=1, first=0)
    seen: Counter[tuple[int, int]] = Counter()
    while packer.next < 4 * samples:
        for piece, document in packer.pop():
            assert document.ids == source.read(piece.position).ids
            seen.update((piece.position, token) for token in range(piece.start, piece.stop))
    waiting = {piece.position for sequence in packer.open for piece in sequence}
    for position in range(2 * samples):
        if position not in waiting:
            assert all(seen[position, token] == 1 for token in range(len(source.read(position).ids)))


def test_epochs_hold_every_sample_once(corpus: Path) -> None:
    source = stream(corpus).sources["captions"]
    n = len(source.reader)
    for epoch in range(3):
        keys = [source.read(p).origin for p in range(epoch * n, epoch * n + n)]
        assert len({(o.shard, o.key) for o in keys}) == n


@pytest.mark.parametrize("policy", ["first_fit", "concat", "single"])
def test_sequences_keep_their_caps_and_their_marks(corpus: Path, policy: str) -> None:
    mark, eos = image_token_id(tokenizer()), tokenizer().eos_token_id
    for item in islice(stream(corpus, policy).lanes(list(range(LANES))), LANES * 8):
        sequence = item.sequence
        assert len(sequence.images) <= 4
        expected = np.zeros(96, bool)
        for start in sequence.image_starts:
            expected[start : start + M] = True
        assert ((sequence.input_ids == mark) == expected).all()
        check_labels(item, mark, eos)


def check_labels(item: LaneSequence, mark: int, eos: int) -> None:
    """Written from the definition, position by position."""
    s = item.sequence
    for at in range(96):
        last = at == 95 or s.document_ids[at + 1] != s.document_ids[at]
        if s.document_ids[at] == 0 or last or s.input_ids[at + 1] == mark:
            assert s.labels[at] == IGNORE
        else:
            assert s.labels[at] == s.input_ids[at + 1]
        if s.document_ids[at] and at and s.document_ids[at] == s.document_ids[at - 1]:
            assert s.position_ids[at] == s.position_ids[at - 1] + 1
        elif s.document_ids[at]:
            assert s.position_ids[at] == 0


def test_images_meet_their_own_text(corpus: Path) -> None:
    """Each caption names the colour of the picture before it."""
    from data_pipelines.images import decode_image

    colours = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "purple": (128, 0, 128)}
    colours |= {"orange": (255, 165, 0), "black": (0, 0, 0), "white": (255, 255, 255)}
    checked = 0
    for item in islice(stream(corpus, ratios=(0.5, 0.5, 0.0)).lanes(list(range(LANES))), LANES * 6):
        for image, start in zip(item.sequence.images, item.sequence.image_starts, strict=True):
            text = tokenizer().decode(item.sequence.input_ids[start + M : start + M + 12])
            colour = text.split()[1] if text.startswith("a ") else text.split()[0]
            assert tuple(decode_image(image.data, 8)[:, 0, 0].tolist()) == colours[colour]
            checked += 1
    assert checked > 100


def test_workers_change_nothing(corpus: Path) -> None:
    def rows(workers: int) -> list[list[int]]:
        loader = PackedLoader(stream(corpus), image_size=8, micro_batch=3, world=2, rank=1, workers=workers)
        batches = [batch for step in islice(loader, 3) for batch in step]
        return [batch.input_ids.flatten().tolist() + batch.images.flatten().tolist() for batch in batches]

    assert rows(0) == rows(1) == rows(2)


def test_impossible_division_is_refused(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"global_batch=12.*5 processes"):
        PackedLoader(stream(corpus), image_size=8, micro_batch=1, world=5)


def document(*lengths: int) -> EncodedDocument:
    """Images where a length is negative, text of that many tokens otherwise."""
    ids, starts = [], []
    for length in lengths:
        if length < 0:
            starts.append(len(ids))
            ids += [2] * M
        else:
            ids += [9] * length
    return EncodedDocument(ids, starts, tuple(Image(b"") for _ in starts), Origin("s", "t", "k"))


@pytest.mark.parametrize(
    "lengths", [(100,), (-1, 30, -1, 30, -1, 5), (38, -1, 3), (-1, -1, -1, -1, -1, -1), (40, -1), (1,), (37, -1, -1, 41)]
)
@pytest.mark.parametrize("room", [None, (7, 1), (3, 2), (10, 0)])
def test_cutting_keeps_images_whole_and_loses_nothing(lengths: tuple[int, ...], room: tuple[int, int] | None) -> None:
    config = PackingConfig(seq_len=40, max_images=2)
    doc = document(*lengths)
    pieces = cut(doc, 0, config, M, room)
    assert [t for p in pieces for t in range(p.start, p.stop)] == list(range(len(doc.ids)))
    assert sum(p.images for p in pieces) == len(doc.starts)
    for piece in pieces:
        assert 0 < piece.tokens <= 40
        assert piece.images <= 2
        assert not any(start < cut_at < start + M for start in doc.starts for cut_at in (piece.start, piece.stop))


def test_first_fit_packs_tighter_than_one_document_a_sequence(corpus: Path) -> None:
    def padding(policy: str) -> float:
        items = islice(stream(corpus, policy, ratios=(1.0, 0.0, 0.0)).lanes(list(range(LANES))), LANES * 6)
        return float(np.mean([(item.sequence.document_ids == 0).mean() for item in items]))

    assert padding("first_fit") < 0.5 * padding("single")


def test_shared_attention_is_one_document(corpus: Path) -> None:
    config = PackingConfig(seq_len=40, max_images=2, isolate_documents=False)
    packer = [(p, d) for d in (document(5), document(6)) for p in cut(d, 0, config, M)]
    sequence = assemble(packer, config, M, image_id=2, pad_id=1)
    assert sequence.document_ids.tolist() == [1] * 11 + [0] * 29
    assert sequence.position_ids[:11].tolist() == list(range(11))
    assert sequence.labels[4] == IGNORE  # still no loss across the border of two documents


def test_a_text_cannot_forge_marks() -> None:
    ids, starts = encode_parts(["<image><|endoftext|>"], tokenizer(), M)
    assert not starts
    assert not {image_token_id(tokenizer()), tokenizer().eos_token_id} & set(ids)


def test_the_index_reads_what_the_webdataset_library_reads(corpus: Path) -> None:
    import webdataset

    for shard in corpus.glob("*.tar"):
        theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
        data = shard.read_bytes()
        ours = index_shard(shard)
        assert [s.key for s in ours] == [s["__key__"] for s in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            members = {extension: value for extension, value in other.items() if not extension.startswith("__")}
            assert {e: data[o : o + n] for e, (o, n) in mine.members.items()} == members


@pytest.mark.parametrize("cut_at", [100, 511, 700, 1400, -1024, -600])
def test_a_truncated_shard_is_named(corpus: Path, tmp_path: Path, cut_at: int) -> None:
    damaged = tmp_path / "damaged.tar"
    whole = sorted(corpus.glob("captions-train-*.tar"))[0].read_bytes().rstrip(b"\0") + bytes(1024)
    damaged.write_bytes(whole[:cut_at])
    with pytest.raises(UserError, match=r"damaged\.tar: (truncated|the tar header)"):
        index_shard(damaged)
