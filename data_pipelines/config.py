"""Typed settings of the data: which corpus, in which ratios, packed how. Checked while composing, without reading a file."""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.errors import UserError
from data_pipelines.storage import Access

KINDS = ("captions", "interleaved", "text")
POLICIES = ("first_fit", "best_fit", "next_fit", "concat", "single")
UNITS = ("sequence", "document", "token")


@dataclass
class SourceConfig:
    """One stream of documents: a source of the corpus, and the share of the data (in data.unit) that comes from it."""

    kind: str
    ratio: float
    split: str = "train"
    max_faults: float = 0.01
    """Share of the samples read that may be unusable (beyond the first 8) before the run stops; 0: the first one stops it."""


@dataclass
class DataConfig:
    corpus: str
    """A corpus prepared under <home>/data by its name, or any prepared folder by its path."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    unit: str = "sequence"
    """What the ratios are shares of: sequence (MM1's; each holds documents of one source), document or token."""
    block: int = 1
    """Neighbouring samples that are read together: 1 for shards on this machine, 64 or so for remote ones (order.LaneOrder)."""
    access: Access = field(default_factory=Access)

    def validate(self) -> None:
        self.access.validate()
        if self.unit not in UNITS:
            raise UserError(f"data.unit={self.unit}: must be one of {', '.join(UNITS)}.")
        if not 1 <= self.block <= 65_536:
            raise UserError(f"data.block={self.block}: samples that are read together, 1 to 65536.")
        for name, source in self.sources.items():
            if source.kind not in KINDS:
                raise UserError(f"data.sources.{name}.kind={source.kind}: must be one of {', '.join(KINDS)}.")
            if not 0 <= source.ratio <= 1:
                raise UserError(f"data.sources.{name}.ratio={source.ratio}: must lie between 0 and 1.")
            if not 0 <= source.max_faults <= 1:
                raise UserError(f"data.sources.{name}.max_faults={source.max_faults}: a share, between 0 and 1.")
        total = sum(source.ratio for source in self.sources.values())
        if abs(total - 1) > 1e-6:
            parts = " + ".join(f"data.sources.{name}.ratio={source.ratio:g}" for name, source in self.sources.items())
            raise UserError(f"The data ratios must sum to 1: {parts} = {total:g}.")


@dataclass
class PackingConfig:
    seq_len: int
    """Tokens a sequence, image tokens included."""
    max_images: int
    """Images a sequence at most, so that no rank's vision tower gets more than its share."""
    policy: str = "first_fit"
    """first_fit, best_fit: whole documents, into the first open sequence with room or the one it fills best; next_fit: into the
    last one; concat: end to end, cut where the sequence is full; single: one document a sequence."""
    open_sequences: int = 8
    """Sequences first_fit and best_fit keep open; more pack tighter and keep more documents waiting."""
    isolate_documents: bool = True
    """False lets the documents of a sequence attend to each other: an ablation, not a setting for use."""

    def validate(self, num_image_tokens: int) -> None:
        for key in ("seq_len", "max_images", "open_sequences"):
            if getattr(self, key) < 1:
                raise UserError(f"packing.{key}={getattr(self, key)}: must be at least 1.")
        if self.policy not in POLICIES:
            raise UserError(f"packing.policy={self.policy}: must be one of {', '.join(POLICIES)}.")
        if num_image_tokens >= self.seq_len:
            raise UserError(
                f"packing.seq_len={self.seq_len} has no room for an image of connector.num_tokens={num_image_tokens} and a word."
            )
