"""PackedBatch: the contract between the data pipelines and the model.

S = sequence length in tokens, B = sequences, N = images of the batch, H = image side in pixels

input_ids     int64 (B, S)        image slots hold the tokeniser's <image> id
labels        int64 (B, S)        already shifted: labels[b, s] is the token to predict at s; IGNORE on padding, before image
                                  tokens, and at every document's last position
position_ids  int64 (B, S)        restart at 0 with every document
document_ids  int64 (B, S)        1, 2, ... within a sequence; 0 = padding. Tokens attend only within their document
images        uint8 (N, 3, H, H); where features of a frozen tower are kept, only those images that have none yet
image_slots   int64 (N, 3)        row, start, length: where each image's tokens stand
kinds         int8 (B, S)         which kind of data each token belongs to, an index into KINDS; -1 = padding
feature_places  int64 (N,)        numpy, on the host, or None: where each image's features are kept; -1: the next of `images`
image_keys      uint8 (N, 16)     numpy, on the host, or None: a digest of each image's encoded bytes (loader.image_key)
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_pipelines.config import KINDS
from data_pipelines.packing import IGNORE

if TYPE_CHECKING:
    from data_pipelines.faults import Fault

__all__ = ["IGNORE", "KINDS", "PackedBatch"]


@dataclass
class PackedBatch:
    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    images: torch.Tensor
    image_slots: torch.Tensor
    kinds: torch.Tensor
    lane_states: dict[int, dict[str, Any]] = field(default_factory=dict)
    """lane -> the state it is in once its sequence of this batch has been consumed (see lanes.py): what a checkpoint keeps."""
    faults: list[Fault] = field(default_factory=list)
    """What these lanes could not read since their sequences before."""
    feature_places: np.ndarray | None = None
    image_keys: np.ndarray | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """Move every tensor; the copy is asynchronous from pinned memory."""
        tensors = (f.name for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor))
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in tensors})

    @property
    def loss_tokens(self) -> int:
        """How many positions carry a loss."""
        return int((self.labels != IGNORE).sum())
