"""Packing, lanes and the loader: what must hold for the data of two runs to be the same data."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from data_pipelines.batch import IGNORE
from data_pipelines.config import POLICIES, UNITS, DataConfig, PackingConfig, SourceConfig
from data_pipelines.document import Image, Origin
from data_pipelines.lanes import LaneSequence, LaneStream, totals
from data_pipelines.loader import PackedLoader, digest
from data_pipelines.order import LaneOrder, Permutation, keyed
from data_pipelines.packing import EncodedDocument, Feed, Packer, Piece, assemble, piece_end
from data_pipelines.shards import Manifest
from data_pipelines.storage import open_file
from data_pipelines.tar import Sample, read_members, samples
from data_pipelines.tokens import encode_parts, image_token_id, load_tokenizer
from tests.corpus import tokenizer, write_corpus

M = 4
LANES = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "tiny")


def stream(
    corpus: Path,
    policy: str = "first_fit",
    seed: int = 0,
    seq_len: int = 96,
    ratios: tuple[float, ...] = (0.45, 0.45, 0.1),
    unit: str = "sequence",
    block: int = 1,
    global_batch: int = LANES,
) -> LaneStream:
    shares = zip(("captions", "interleaved", "text"), ratios, strict=True)
    data = DataConfig(str(corpus), {name: SourceConfig(name, ratio) for name, ratio in shares}, unit=unit, block=block)
    packing = PackingConfig(seq_len=seq_len, max_images=4, policy=policy, open_sequences=3)
    return LaneStream(corpus, data, packing, tokenizer(), image_tokens=M, global_batch=global_batch, seed=seed)


def digests(items: Any) -> list[tuple[int, int, str]]:
    return [(item.step, item.slot, digest(item)) for item in items]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("policy", POLICIES)
def test_any_split_into_ranks_gives_one_stream(corpus: Path, policy: str, unit: str) -> None:
    whole = sorted(digests(islice(stream(corpus, policy, unit=unit).lanes(list(range(LANES))), LANES * 6)))
    for world in (2, 3, 4, 12):
        owned = [list(range(rank, LANES, world)) for rank in range(world)]
        parts = [islice(stream(corpus, policy, unit=unit).lanes(lanes), LANES // world * 6) for lanes in owned]
        assert sorted(d for part in parts for d in digests(part)) == whole


@pytest.mark.parametrize(("unit", "block"), [("sequence", 1), ("document", 1), ("token", 3)])
@pytest.mark.parametrize("policy", POLICIES)
def test_resume_at_any_step_equals_no_interruption_over_several_hops(corpus: Path, policy: str, unit: str, block: int) -> None:
    """From every step of the first epochs, each time with other ranks; states travel as JSON, as in a checkpoint. Sequences are
    short, so that documents are cut in two at many of these steps."""
    steps, lanes = 14, list(range(LANES))

    def opened() -> LaneStream:
        return stream(corpus, policy, unit=unit, block=block, seq_len=48)

    whole = digests(islice(opened().lanes(lanes), LANES * (steps + 1)))
    states: dict[int, Any] = {}
    for step, world in zip(range(steps), cycle((1, 2, 3, 4, 6, 12)), strict=False):
        found = []
        for rank in range(world):
            part = list(islice(opened().lanes(lanes[rank::world], step, states), 2 * LANES // world))
            found += digests(part)
            if rank == 0:
                later: dict[int, Any] = {}
            later |= {item.slot: json.loads(json.dumps(item.state)) for item in part[: LANES // world]}
        assert sorted(found) == whole[LANES * step : LANES * (step + 2)]
        states = later


@pytest.mark.parametrize("unit", UNITS)
def test_realised_shares_follow_the_ratios_in_the_unit_chosen(corpus: Path, unit: str) -> None:
    """Of what all lanes have taken together, each source is off by less than a sequence's worth a batch ever consumed."""
    ratios = (0.5, 0.2, 0.3)
    opened = stream(corpus, ratios=ratios, unit=unit)
    states: dict[int, Any] = {}
    worst = 0.0
    for item in islice(opened.lanes(list(range(LANES))), LANES * 40):
        states[item.slot] = item.state
        if item.slot == LANES - 1:
            taken = totals(opened, states).values()
            units = [{"sequence": c.sequences, "document": c.taken_documents, "token": c.taken_tokens}[unit] for c in taken]
            size = {"sequence": 1, "document": 1, "token": 96}[unit]
            worst = max(worst, *(abs(u - r * sum(units)) / size for u, r in zip(units, ratios, strict=True)))
    assert worst < {"sequence": 1.0001, "document": LANES / 2, "token": LANES / 2}[unit]


def test_a_lanes_state_is_small(corpus: Path) -> None:
    for policy, unit in product(POLICIES, UNITS):
        items = list(islice(stream(corpus, policy, unit=unit).lanes(list(range(LANES))), LANES * 12))
        assert max(len(json.dumps(item.state, separators=(",", ":"))) for item in items) < 1000


def test_another_seed_is_another_stream(corpus: Path) -> None:
    first = digests(islice(stream(corpus, seed=0).lanes(list(range(LANES))), LANES * 2))
    second = digests(islice(stream(corpus, seed=1).lanes(list(range(LANES))), LANES * 2))
    assert len({d for *_, d in first} & {d for *_, d in second}) < len(first) / 4


@pytest.mark.parametrize(("policy", "seq_len"), [*((policy, 96) for policy in POLICIES), ("concat", 41), ("first_fit", 41)])
def test_every_token_of_every_document_is_delivered_once_an_epoch(corpus: Path, policy: str, seq_len: int) -> None:
    samples = Manifest.load(corpus).split("text", "train").samples
    text = stream(corpus, policy, seq_len=seq_len, ratios=(0.0, 0.0, 1.0), global_batch=1)
    source = text.sources[0]
    feed = Feed(0, "text", lambda place: source.read(0, place), M)
    packer = Packer(text.packing, [feed])
    seen: Counter[tuple[int, int]] = Counter()
    while feed.place < 4 * samples:
        for piece, document in packer.pop():
            assert (document.ids == source.read(0, piece.place).ids).all()  # type: ignore[union-attr]
            seen.update((piece.place, token) for token in range(piece.start, piece.stop))
    waiting = {piece.place for sequence in packer.open for piece in sequence}
    for place in range(2 * samples):
        if place not in waiting:
            assert all(seen[place, token] == 1 for token in range(len(source.read(0, place).ids)))  # type: ignore[union-attr]


@pytest.mark.parametrize("block", [1, 3, 64])
def test_epochs_hold_every_sample_once(corpus: Path, block: int) -> None:
    """Over all lanes together; the lanes of an epoch end at different places where the blocks do not divide evenly."""
    source = stream(corpus, block=block).sources[0]
    n, blocks = len(source.reader), source.order.blocks
    for epoch in range(3):
        found: Counter[int] = Counter()
        for lane in range(LANES):
            for place in range((blocks * (epoch + 1) // LANES + 2 * LaneOrder.MIXED) * block):
                if dealt(source.order, lane, place) // blocks == epoch and (sample := source.order[lane, place]) is not None:
                    found[sample] += 1
        assert found == Counter(range(n))


def dealt(order: LaneOrder, lane: int, place: int) -> int:
    """Which block of the endless deal a lane reads at a place, by the definition."""
    if order.block == 1:
        return place * order.lanes + lane
    group, inside = divmod(place, order.MIXED * order.block)
    mixed = Permutation(order.MIXED * order.block, keyed(*order._key, "inside", lane, group))[inside]
    return (group * order.MIXED + mixed // order.block) * order.lanes + lane


@pytest.mark.parametrize("policy", POLICIES)
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


def test_pictures_of_a_ring_stay_until_their_step_is_over_however_far_workers_read_ahead(corpus: Path) -> None:
    expected = PackedLoader(stream(corpus), image_size=8, micro_batch=12)
    loader = PackedLoader(stream(corpus), image_size=8, micro_batch=12, workers=2)
    turns = len(loader._rings[0].squares) // (loader.per_step // 2) + 2  # once round the ring, and on
    for step, (ours, plain) in enumerate(islice(zip(by_step(loader), by_step(expected), strict=True), turns)):
        time.sleep(0.05)  # in which the workers fill all that they may
        for (_, images), (_, right) in zip(ours, plain, strict=True):
            assert torch.equal(images, right), step


def by_step(loader: PackedLoader) -> Iterator[list[tuple[LaneSequence, torch.Tensor]]]:
    sequences = loader.sequences()
    while True:
        yield list(islice(sequences, loader.per_step))


def test_impossible_division_is_refused(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"global_batch=12.*5 processes"):
        PackedLoader(stream(corpus), image_size=8, micro_batch=1, world=5)


def document(*lengths: int) -> EncodedDocument:
    """Images where a length is negative, text of that many tokens otherwise."""
    ids: list[int] = []
    starts: list[int] = []
    for length in lengths:
        if length < 0:
            starts.append(len(ids))
            ids += [2] * M
        else:
            ids += [9] * length
    return EncodedDocument(np.array(ids, np.int32), starts, tuple(Image(b"") for _ in starts), Origin("s", "t", "k"))


@pytest.mark.parametrize(
    "lengths", [(100,), (-1, 30, -1, 30, -1, 5), (38, -1, 3), (-1, -1, -1, -1, -1, -1), (40, -1), (1,), (37, -1, -1, 41)]
)
@pytest.mark.parametrize("room", [(40, 2), (7, 1), (4, 2), (10, 1)])
def test_cutting_keeps_images_whole_and_loses_nothing(lengths: tuple[int, ...], room: tuple[int, int]) -> None:
    doc = document(*lengths)
    feed = Feed(0, "s", lambda place: doc, M)
    pieces: list[Piece] = []
    while feed.place == 0:
        pieces.append(feed.piece(room))
    assert [t for p in pieces for t in range(p.start, p.stop)] == list(range(len(doc.ids)))
    assert sum(p.images for p in pieces) == len(doc.starts)
    for piece in pieces:
        assert 0 < piece.tokens <= room[0]
        assert piece.images <= room[1]
        assert not any(start < cut_at < start + M for start in doc.starts for cut_at in (piece.start, piece.stop))


def test_an_image_that_does_not_fit_gives_a_piece_of_nothing() -> None:
    assert piece_end(document(-1, 3), 0, (3, 5), M) == piece_end(document(-1, 3), 0, (9, 0), M) == (0, 0)


def test_first_fit_packs_tighter_than_one_document_a_sequence(corpus: Path) -> None:
    def padding(policy: str) -> float:
        items = islice(stream(corpus, policy, ratios=(1.0, 0.0, 0.0)).lanes(list(range(LANES))), LANES * 6)
        return float(np.mean([(item.sequence.document_ids == 0).mean() for item in items]))

    assert padding("first_fit") < 0.5 * padding("single")


def test_shared_attention_is_one_document(corpus: Path) -> None:
    config = PackingConfig(seq_len=40, max_images=2, isolate_documents=False)
    pieces = [(Piece(0, 0, 0, len(d.ids), 0), d) for d in (document(5), document(6))]
    sequence = assemble(pieces, config, M, image_id=2, pad_id=1)
    assert sequence.document_ids.tolist() == [1] * 11 + [0] * 29
    assert sequence.position_ids[:11].tolist() == list(range(11))
    assert sequence.labels[4] == IGNORE  # still no loss across the border of two documents


def test_a_text_cannot_forge_marks() -> None:
    ids, starts = encode_parts(["<image><|endoftext|>"], tokenizer(), M)
    assert not starts
    assert not {image_token_id(tokenizer()), tokenizer().eos_token_id} & set(ids)


def test_a_tokeniser_that_reads_marks_in_texts_is_refused(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    load_tokenizer(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in described["added_tokens"]:
        token["special"] = token["content"] != "<image>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    with pytest.raises(UserError, match="'<image>' becomes the image mark"):
        load_tokenizer(tmp_path)


def test_the_index_reads_what_the_webdataset_library_reads(corpus: Path) -> None:
    import webdataset

    for shard in corpus.glob("*.tar"):
        theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
        file = open_file(shard)
        ours = [sample for sample in samples(file) if isinstance(sample, Sample)]
        assert [s.key for s in ours] == [s["__key__"] for s in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            members = {extension: value for extension, value in other.items() if not extension.startswith("__")}
            assert read_members(file, mine) == members
