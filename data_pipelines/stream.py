"""Fingerprints of the training stream: one line `step slot digest` a sequence, so that two set-ups can be compared with diff.

    python -m data_pipelines.stream world_size=4 rank=1 workers=2 steps=20 start=100

The digest covers tokens, labels, positions, document ids and image bytes (loader.digest). The lines of all ranks together, sorted
by `sort -k1,1n -k2,2n`, are those of one. Keys are those of mm1.train, so that what was changed there can be pasted here.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from configs.command import command
from configs.errors import UserError
from data_pipelines.config import DataConfig, PackingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data_pipelines.lanes import LaneStream


@dataclass
class BatchConfig:
    global_batch: int
    """Sequences a step, of all ranks together."""


@dataclass
class ImageTokensConfig:
    num_tokens: int
    """Tokens one image takes in a sequence."""


@dataclass
class TokenizerConfig:
    tokenizer: str | None = None
    """A folder with a transformers tokeniser; none: the one prepared with the corpus."""


@dataclass
class StreamSettings:
    """All that decides which sequences a training sees, under the keys mm1.train has for it."""

    data: DataConfig
    packing: PackingConfig
    train: BatchConfig
    connector: ImageTokensConfig
    decoder: TokenizerConfig = field(default_factory=TokenizerConfig)
    seed: int = 0

    def validate(self) -> None:
        for key, value in (("train.global_batch", self.train.global_batch), ("connector.num_tokens", self.connector.num_tokens)):
            if value < 1:
                raise UserError(f"{key}={value}: must be at least 1.")
        self.data.validate()
        self.packing.validate(self.connector.num_tokens)


@dataclass
class StreamConfig(StreamSettings):
    world_size: int = 1
    """Processes that share a global batch."""
    rank: int = 0
    workers: int = 0
    """Worker processes of the rank's loader; 0: none."""
    start: int = 0
    """First step to print. Those before it are packed as well, since a packer's open sequences depend on all it has read."""
    steps: int = 10

    def validate(self) -> None:
        super().validate()
        if self.world_size < 1 or self.train.global_batch % self.world_size:
            raise UserError(f"world_size={self.world_size}: must divide train.global_batch={self.train.global_batch}.")
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank={self.rank}: must lie in 0 ... {self.world_size - 1} (world_size={self.world_size}).")
        for key in ("workers", "start", "steps"):
            if getattr(self, key) < 0:
                raise UserError(f"{key}={getattr(self, key)}: must not be negative.")


@command("stream", schema=StreamConfig)
def main(config: StreamConfig) -> None:
    """Print a line `step slot digest` for every packed sequence of a rank; two set-ups agree where their lines do.

    python -m data_pipelines.stream steps=20                                     one process
    python -m data_pipelines.stream world_size=4 rank=1 workers=2 steps=20       the second of four, with two workers
    python -m data_pipelines.stream start=100 steps=20                           the lines of steps 100 to 119

    Keys: world_size, rank, workers, start, steps; and those of mm1.train that decide the data: data.*, packing.*, seed,
    train.global_batch, connector.num_tokens, decoder.tokenizer. Nothing is trained and no image decoded; samples that cannot be
    read are named on standard error.
    """
    try:
        for line in lines(config):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def lines(config: StreamConfig) -> Iterator[str]:
    """`step slot digest`, by step and slot. Packs, reads ahead and hands out as a training's loader does."""
    stream, _ = open_stream(config)
    from data_pipelines.loader import PackedLoader, digest

    loader = PackedLoader(
        stream,
        image_size=None,
        micro_batch=1,
        world=config.world_size,
        rank=config.rank,
        workers=config.workers,
        first=config.start,
    )
    if loader.workers != config.workers:
        print(f"workers={config.workers} do not divide {loader.per_step} sequences: {loader.workers} used", file=sys.stderr)
    for item, _ in islice(loader.sequences(), config.steps * loader.per_step):
        for fault in item.faults:
            print(f"left out: {fault}", file=sys.stderr)
        yield f"{item.step} {item.slot} {digest(item)}"


def open_stream(settings: StreamSettings) -> tuple[LaneStream, PreTrainedTokenizerBase]:
    """The stream of a training with these settings, and its tokeniser; the corpus is prepared if the suite knows its recipe."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from data_pipelines.lanes import LaneStream
    from data_pipelines.prepare import ensure_corpus
    from data_pipelines.tokens import load_tokenizer

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the lines
        corpus = ensure_corpus(settings.data.corpus)
    tokenizer = load_tokenizer(Path(settings.decoder.tokenizer or corpus / "tokenizer"))
    stream = LaneStream(
        corpus,
        settings.data,
        settings.packing,
        tokenizer,
        image_tokens=settings.connector.num_tokens,
        global_batch=settings.train.global_batch,
        seed=settings.seed,
    )
    return stream, tokenizer


if __name__ == "__main__":
    main()
