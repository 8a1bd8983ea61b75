"""Dense attention over a cache in two pieces: a prefix that all rows share, stored once, and each row's own suffix.

    prefix: the queries of all rows x P shared tokens, one matrix product a head  ->  y1, lse1
    suffix: each row's queries x its own tokens                                  ->  y2, lse2
    y = (exp(lse1) y1 + exp(lse2) y2) / (exp(lse1) + exp(lse2))

lse is the logarithm of the softmax's denominator. The prefix is read from memory once however many rows there are, which is what
sparse attention over a shared prefix has to be measured by (docs/sparq.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A stretch of cache: keys, values (B, Hkv, C, d), keys_t (B, Hkv, d, C); B may be 1 for a stretch that all rows share.

    Row b's valid slots are start[b] <= s < stop[b] (int64 (B,)); those outside never show in a result.
    """

    keys: Tensor
    keys_t: Tensor | None
    values: Tensor
    start: Tensor
    stop: Tensor

    def valid(self) -> Tensor:
        """bool (B, C)."""
        slots = torch.arange(self.keys.shape[2], device=self.keys.device)
        return (slots >= self.start[:, None]) & (slots < self.stop[:, None])


@dataclass(frozen=True, eq=False)
class Prefix:
    """What rows share: keys, values (1, Hkv, P, d), keys_t (1, Hkv, d, P) or None, P slots of which the first `padding` are not
    valid; total (1, Hkv, d) float64 and count of the valid values."""

    keys: Tensor
    keys_t: Tensor | None
    values: Tensor
    padding: int
    total: Tensor
    count: int

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def segment(self, batch: int) -> Segment:
        start = torch.full((batch,), self.padding, dtype=torch.int64, device=self.keys.device)
        return Segment(self.keys, self.keys_t, self.values, start, torch.full_like(start, self.length))

    def to(self, device: Any) -> Prefix:
        keys_t = None if self.keys_t is None else self.keys_t.to(device)
        return Prefix(self.keys.to(device), keys_t, self.values.to(device), self.padding, self.total.to(device), self.count)

    def __deepcopy__(self, memo: Any) -> Prefix:
        return self  # nobody writes to it


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, H, N, d), keys and values (B, H, S, d), mask bool (B, 1, N, S) -> output (B, H, N, d) and lse (B, H, N), in float32
    (float64 stays). A query that sees nothing gets 0 and -inf. Masked keys and values must be finite."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    if keys.shape[2] == 0:
        return torch.zeros_like(q, dtype=exact), q.new_full(q.shape[:3], -math.inf, dtype=exact)
    if q.device.type == "cpu" and mask is None:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, False, scale=scale)
        return output.to(exact), lse.to(exact)
    if q.device.type == "cuda" and mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, keys, values, 0.0, False, False, scale=scale)[:2]
        return output.to(exact), lse.to(exact)
    scores = (q.to(exact) * scale) @ keys.to(exact).transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse.clamp(min=torch.finfo(exact).min)[..., None]).exp() @ values.to(exact), lse


def merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(output, lse) of disjoint sets of tokens -> the output over all of them; 0 where no set had any."""
    lse = torch.stack([lse for _, lse in parts])
    weights = (lse - lse.logsumexp(0).clamp(min=torch.finfo(lse.dtype).min)).exp()
    return sum((w[..., None] * output for w, (output, _) in zip(weights, parts, strict=True)), torch.zeros(()).to(lse))


def attend_shared(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attend` for keys and values (1, Hkv, P, d) that all rows of q (B, Hkv, N, d) see whole."""
    batch, heads, count, d = q.shape
    rows = q.transpose(0, 1).reshape(1, heads, batch * count, d)
    output, lse = attend(rows, keys, values, None, scale)
    return (
        output.view(heads, batch, count, d).transpose(0, 1),
        lse.view(heads, batch, count).transpose(0, 1),
    )


def dense_shared(q: Tensor, prefix: Segment, suffix: Segment, visible: Tensor, scale: float) -> Tensor:
    """Query positions (B, Hq, n, d) over a shared prefix, seen whole, and the suffix slots `visible` (B, n, S): (B, Hq, n, d).

    The suffix's masked slots must be finite.
    """
    batch, _, count, d = q.shape
    kv_heads = prefix.keys.shape[1]
    packed = q.reshape(batch, kv_heads, -1, d)  # the g query heads of a group, one after the other, n positions each
    group = packed.shape[2] // count
    width = visible.shape[2]
    mask = visible[:, None].repeat(1, 1, group, 1)
    first, end = int(prefix.start[0]), int(prefix.stop[0])
    parts = [
        attend_shared(packed, prefix.keys[:, :, first:end], prefix.values[:, :, first:end], scale),
        attend(packed, suffix.keys[:, :, :width], suffix.values[:, :, :width], mask, scale),
    ]
    return merge(parts).view(q.shape).to(q.dtype)
