"""Lanes: the stream of packed sequences as a pure function of the seed, cut so that any number of ranks and workers can share it.

    global batch of step t  =  slot 0, 1, ... L-1          L = sequences a global batch, fixed for a run
    slot i of every step    <- lane i                      a lane owns stream positions i, i + L, i + 2L ... of every source
    lane i at step t        -> mixture says which source, that source's packer says which documents

Rank r of R and worker w of W take lanes by stride, so whatever R and W are (as long as R divides L), the global batches are the
same. A lane's state is a few numbers a source; the state *after* a sequence travels with the sequence, and a checkpoint keeps the
states of the last sequences the trainer consumed. Prefetched sequences are therefore neither lost nor repeated by a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from data_pipelines.config import DataConfig, PackingConfig
from data_pipelines.document import Origin
from data_pipelines.formats import read_document
from data_pipelines.mixture import Mixture
from data_pipelines.order import EpochOrder
from data_pipelines.packing import EncodedDocument, Packer, Sequence, assemble
from data_pipelines.shards import Manifest, ShardReader
from data_pipelines.tokens import encode_parts, image_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LaneSequence:
    """A sequence with its address and what its lane needs to go on after it."""

    step: int
    slot: int
    source: str
    kind: str
    sequence: Sequence
    state: dict[str, Any]


class Source:
    """One source of the corpus as an endless stream of encoded documents in a keyed order."""

    def __init__(
        self,
        name: str,
        folder: Path,
        manifest: Manifest,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        image_tokens: int,
        seed: int,
    ) -> None:
        content = manifest.split(name, split)
        if content.samples == 0:
            raise UserError(f"{folder}: {name}/{split} is empty, so data.sources.{name}.ratio must be 0.")
        self.name, self.format = name, content.format
        self.reader = ShardReader(folder, content)
        self.order = EpochOrder(len(self.reader), seed, "order", name, split)
        self.tokenizer, self.image_tokens = tokenizer, image_tokens

    def read(self, position: int) -> EncodedDocument:
        """The document at a stream position, ended by the end-of-text token."""
        shard, key, members = self.reader[self.order[position]]
        document = read_document(self.format, members, Origin(self.name, shard, key))
        ids, starts = encode_parts(document.parts, self.tokenizer, self.image_tokens)
        return EncodedDocument([*ids, self.tokenizer.eos_token_id], starts, document.images, document.origin)


class LaneStream:
    """All lanes of a run, or a share of them.

    `lane_states` maps lane -> state as a checkpoint holds it; lanes without one start at the beginning.
    """

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
        self.manifest = Manifest.load(folder)
        self.packing, self.image_tokens, self.global_batch = packing, image_tokens, global_batch
        self.kinds = {name: source.kind for name, source in data.sources.items()}
        self.mixture = Mixture({name: source.ratio for name, source in data.sources.items()}, global_batch, seed)
        self.sources = {
            name: Source(name, folder, self.manifest, data.sources[name].split, tokenizer, image_tokens, seed)
            for name in self.mixture.sources
        }
        self.image_id = image_token_id(tokenizer)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def lanes(self, lanes: list[int], step: int = 0, states: dict[int, dict[str, Any]] | None = None) -> Iterator[LaneSequence]:
        """Endless: for each step from `step` on, one sequence a lane, in the order of `lanes`."""
        packers = {
            lane: {
                name: Packer(self.packing, self.image_tokens, source.read, stride=self.global_batch, first=lane)
                for name, source in self.sources.items()
            }
            for lane in lanes
        }
        for lane, by_source in packers.items():
            for name, state in (states or {}).get(lane, {}).items():
                by_source[name].restore(state)
        while True:
            slots = self.mixture.slots(step)
            for lane in lanes:
                name = slots[lane]
                pieces = packers[lane][name].pop()
                sequence = assemble(pieces, self.packing, self.image_tokens, self.image_id, self.pad_id)
                state = {source: packer.state() for source, packer in packers[lane].items()}
                yield LaneSequence(step, lane, name, self.kinds[name], sequence, state)
            step += 1
