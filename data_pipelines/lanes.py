"""Lanes: the stream of packed sequences as a pure function of the seed, cut so that any number of ranks and workers can share it.

    global batch of step t  =  slot 0, 1, ... L-1          L = sequences a global batch, fixed for a run
    slot i of every step    <- lane i                      a lane has its own order through every source (order.LaneOrder)
    lane i at step t        -> mixture says which source, that source's packer says which documents

Rank r of R and worker w of W take lanes by stride, so whatever R and W are (as long as R divides L), the global batches are the
same. A lane's state is a few numbers a source; the state *after* a sequence travels with the sequence, and a checkpoint keeps the
states of the last sequences the trainer consumed. Prefetched sequences are therefore neither lost nor repeated by a resume.

What cannot be used is left out and reported: a sample that cannot be read or does not follow its layout before it is packed, a
piece with a picture that cannot be decoded from the sequence it was packed into, whose other documents stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from configs.errors import UserError
from data_pipelines.config import DataConfig, PackingConfig
from data_pipelines.document import Origin
from data_pipelines.faults import Fault, SampleFault
from data_pipelines.formats import read_document
from data_pipelines.mixture import Balance, Mixture
from data_pipelines.order import LaneOrder
from data_pipelines.packing import COUNTS, Counts, EncodedDocument, Feed, PackedSequence, Packer, Piece, assemble, images_of
from data_pipelines.reader import ShardError, SplitReader
from data_pipelines.shards import Manifest
from data_pipelines.tokens import Encoder, image_token_id, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Decoder(Protocol):
    """Turns the encoded images of a sequence into pixels, side by side in one array (images.SquareDecoder)."""

    def allocate(self, count: int) -> np.ndarray: ...

    def decode(self, data: bytes, name: str, square: np.ndarray) -> None:
        """Raises UserError for what is no picture."""


@dataclass(frozen=True)
class LaneSequence:
    """A sequence with its address and what its lane needs to go on after it."""

    step: int
    slot: int
    source: str
    """Where all of it comes from; of a sequence that several sources share, their names joined by +."""
    sequence: PackedSequence
    state: dict[str, Any]
    pixels: np.ndarray | None
    """Of the images of the sequence, uint8 (n, size, size, 3), where the stream decodes them."""
    faults: list[Fault]
    """Found in this lane since the sequence before."""


class Source:
    """One source of the corpus: its documents in the order of each lane."""

    def __init__(
        self, number: int, name: str, folder: Path, manifest: Manifest, data: DataConfig, tokenizer: PreTrainedTokenizerBase,
        *, image_tokens: int, lanes: int, seed: int,
    ) -> None:  # fmt: skip
        split = data.sources[name].split
        content = manifest.split(name, split)
        if content.samples == 0:
            raise UserError(f"{folder}: {name}/{split} is empty, so data.sources.{name}.ratio must be 0.")
        self.number, self.name, self.format = number, name, content.format
        self.reader = SplitReader(folder, manifest, name, split, data.access)
        self.order = LaneOrder(len(self.reader), lanes, seed, "order", name, split, block=data.block)
        self.encoder, self.end = Encoder(tokenizer, image_tokens), tokenizer.eos_token_id

    def read(self, lane: int, place: int) -> EncodedDocument | Fault | None:
        """The document at a lane's place, ended by the end-of-text token; None where the order has a hole.

        Raises ShardError where the shard is missing or cannot be read.
        """
        sample = self.order[lane, place]
        if sample is None:
            return None
        members = self.reader[sample]
        origin = Origin(self.name, members.shard, members.key)
        try:
            document = read_document(self.format, members, origin)
        except ShardError:
            raise
        except SampleFault as error:
            return error.fault
        except UserError as error:
            return members.fault(str(error).removeprefix(f"{origin}: ")).fault
        ids, starts = self.encoder(document.parts)
        return EncodedDocument(np.array([*ids, self.end], np.int32), starts, document.images, origin)

    def fault(self, lane: int, place: int, reason: str) -> Fault:
        """A fault of the sample at a lane's place that was found after it had been read."""
        sample = self.order[lane, place]
        assert sample is not None
        return self.reader[sample].fault(reason).fault


class Lane:
    """One lane: its feeds, its packers, and which of them fills its next sequence."""

    def __init__(self, number: int, stream: LaneStream) -> None:
        def feed(source: Source) -> Feed:
            return Feed(source.number, source.name, lambda place: source.read(number, place), stream.image_tokens)

        self.number = number
        self.feeds = [feed(source) for source in stream.sources]
        if stream.data.unit == "sequence":
            self.packers = [Packer(stream.packing, [feed]) for feed in self.feeds]
        else:
            tokens = stream.data.unit == "token"
            ratios = [stream.data.sources[feed.name].ratio for feed in self.feeds]
            unit = stream.packing.seq_len if tokens else 1
            balance = Balance(ratios, number, stream.global_batch, stream.seed, unit)

            def pick() -> int:
                if tokens:
                    return balance.pick([f.counts.taken_tokens for f in self.feeds], [min(f.ahead(), unit) for f in self.feeds])
                return balance.pick([f.counts.taken_documents for f in self.feeds], [int(f.start == 0) for f in self.feeds])

            self.packers = [Packer(stream.packing, self.feeds, pick)]

    def state(self) -> dict[str, Any]:
        return {"feeds": {f.name: f.state() for f in self.feeds}, "open": [packer.state() for packer in self.packers]}

    def restore(self, state: Mapping[str, Any]) -> None:
        for feed in self.feeds:
            feed.restore(state["feeds"][feed.name])
        for packer, waiting in zip(self.packers, state["open"], strict=True):
            packer.restore(waiting)

    def faults(self) -> list[Fault]:
        """Those found since the last call."""
        found = [fault for feed in self.feeds for fault in feed.faults]
        for feed in self.feeds:
            feed.faults = []
        return found


class LaneStream:
    """All lanes of a run, or a share of them."""

    def __init__(
        self,
        folder: Path,
        data: DataConfig,
        packing: PackingConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_tokens: int,
        global_batch: int,
        seed: int,
    ) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        self.data, self.packing, self.tokenizer, self.seed = data, packing, tokenizer, seed
        self.image_tokens, self.global_batch = image_tokens, global_batch
        self.mixture = Mixture({name: source.ratio for name, source in data.sources.items()}, global_batch, seed)
        self.sources = [
            Source(number, name, folder, self.manifest, data, tokenizer, image_tokens=image_tokens, lanes=global_batch, seed=seed)
            for number, name in enumerate(self.mixture.sources)
        ]
        self.names = [source.name for source in self.sources]
        self.kinds = [data.sources[name].kind for name in self.names]
        self.image_id = image_token_id(tokenizer)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def identity(self) -> dict[str, Any]:
        """All that decides the stream, as plain values: a checkpoint keeps it, and a resume compares it key by key."""
        data = asdict(self.data)
        return {
            "corpus": self.manifest.fingerprint,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "data": {key: data[key] for key in ("unit", "block")}
            | {"sources": {name: {k: data["sources"][name][k] for k in ("kind", "ratio", "split")} for name in self.names}},
            "packing": asdict(self.packing),
            "connector": {"num_tokens": self.image_tokens},
            "train": {"global_batch": self.global_batch},
            "seed": self.seed,
        }

    def lanes(
        self,
        lanes: list[int],
        step: int = 0,
        states: Mapping[int, Mapping[str, Any]] | None = None,
        decoder: Decoder | None = None,
    ) -> Iterator[LaneSequence]:
        """Endless: for each step from `step` on, one sequence a lane, in the order of `lanes`.

        `states`: lane -> state as a checkpoint holds it; lanes without one start at the beginning. With `decoder` the sequences
        carry pixels and no encoded images, and pieces with an image that cannot be decoded are left out of them.
        """
        running = [Lane(number, self) for number in lanes]
        for lane in running:
            if states and lane.number in states:
                lane.restore(states[lane.number])
        mixed = self.data.unit != "sequence"
        while True:
            slots = [] if mixed else self.mixture.slots(step)
            for lane in running:
                packer = lane.packers[0 if mixed else self.names.index(slots[lane.number])]
                pieces, pixels, spoilt = self._decoded(lane, packer.pop(), decoder)
                sequence = assemble(pieces, self.packing, self.image_tokens, self.image_id, self.pad_id)
                if decoder is not None:
                    sequence.images.clear()
                held = sorted({piece.source for piece, _ in pieces})
                source = "+".join(self.names[number] for number in held) if mixed else slots[lane.number]
                yield LaneSequence(step, lane.number, source, sequence, lane.state(), pixels, [*lane.faults(), *spoilt])
            step += 1

    def _decoded(
        self, lane: Lane, pieces: list[tuple[Piece, EncodedDocument]], decoder: Decoder | None
    ) -> tuple[list[tuple[Piece, EncodedDocument]], np.ndarray | None, list[Fault]]:
        """Pieces whose pictures are all whole, the pixels of these, and what is wrong with the others."""
        if decoder is None:
            return pieces, None, []
        pixels, done = decoder.allocate(sum(piece.images for piece, _ in pieces)), 0
        kept, faults = [], []
        for piece, document in pieces:
            try:
                for number, (_, image) in enumerate(images_of(piece, document), done):
                    decoder.decode(image.data, image.name, pixels[number])
            except ShardError:
                raise
            except UserError as error:
                source = self.sources[piece.source]
                known = error.fault if isinstance(error, SampleFault) else None
                faults.append(known or source.fault(lane.number, piece.place, str(error)))
                lane.feeds[piece.source].take_back(piece, document)
            else:
                kept.append((piece, document))
                done += piece.images
        return kept, pixels[:done], faults


def totals(stream: LaneStream, states: Mapping[int, Mapping[str, Any]]) -> dict[str, Counts]:
    """What the lanes in `states` have taken and delivered together, by source."""
    found = {name: Counts() for name in stream.names}
    for state in states.values():
        for name, numbers in state["feeds"].items():
            for field, value in zip(vars(found[name]), numbers[2 : 2 + COUNTS], strict=True):
                setattr(found[name], field, getattr(found[name], field) + value)
    return found
