"""PackedBatch: the contract between the data pipelines and the model.

    S = sequence length in tokens, B = sequences, N = images of the batch, H = image side in pixels

    input_ids     int64 (B, S)        image slots hold the tokeniser's <image> id
    labels        int64 (B, S)        already shifted: labels[b, s] is the token to predict at s; IGNORE on padding, before image
                                      tokens, and at every document's last position
    position_ids  int64 (B, S)        restart at 0 with every document
    document_ids  int64 (B, S)        1, 2, ... within a sequence; 0 = padding. Tokens attend only within their document
    images        uint8 (N, 3, H, H)
    image_slots   int64 (N, 3)        row, start, length: where each image's tokens stand
    kinds         int64 (B,)          which kind of data each sequence holds, an index into KINDS
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch

IGNORE = -100
KINDS = ("captions", "interleaved", "text")


@dataclass
class PackedBatch:
    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    images: torch.Tensor
    image_slots: torch.Tensor
    kinds: torch.Tensor
    lane_states: list[dict[str, Any]] = field(default_factory=list)
    """For each row, the state its lane is in once this sequence has been consumed (see lanes.py): what a checkpoint keeps."""

    def to(self, device: torch.device | str) -> PackedBatch:
        """Move every tensor; the copy is asynchronous from pinned memory."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self) if f.name != "lane_states"}
        return PackedBatch(**moved, lane_states=self.lane_states)

    @property
    def loss_tokens(self) -> int:
        """How many positions carry a loss."""
        return int((self.labels != IGNORE).sum())
