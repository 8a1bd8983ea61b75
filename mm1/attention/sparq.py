"""SparQ attention (arXiv 2312.04985): one decoding step that reads a part of the cache, and the dense step it is measured by.

For each key-value head, with the g query heads q of its group, keys K and values V of S valid tokens, head size d:

    1. i1    = the r components with the largest sum over the group of |q|
    2. tau   = sqrt(d |q[i1]|_1 / |q|_1)                        for each query head
       s_hat = softmax(q[i1] K[:, i1]^T / tau)                  for each query head
    3. i2    = the k tokens with the largest sum over the group of s_hat, the last l valid ones always among them
    4. y3    = softmax(q K[i2]^T / sqrt(d)) V[i2]
    5. alpha = the sum of s_hat[i2];  y = alpha y3 + (1 - alpha) mean(V)

Step 2 reads r of the d components of every key (from the copy that lies component by component), step 4 reads k keys and values
whole: S r + 2 k d + 4 d elements instead of 2 S d + 2 d. The paper sums softmaxed scores over the group (`group=softmax`); its
authors' code sums logits (`group=logits`).

Where no token would be left out (k >= S), and below `dense_below`, the step is `dense_decode`, to the bit.

`sparq_decode` and `dense_decode` choose the fastest code for the tensors they get; `sparq_torch` is the method itself, in
PyTorch, for any device, dtype and head size, and what the others are tested against.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm1.attention.segments import Segment, dense_shared
from mm1.attention.settings import GROUPS as GROUPS
from mm1.attention.settings import SparqSettings

_BACKENDS = {"cpu": "mm1.attention.sparq_cpu", "cuda": "mm1.attention.sparq_triton"}


def sparq_decode(
    q: Tensor,
    keys: Tensor,
    keys_t: Tensor,
    values: Tensor,
    start: Tensor,
    stop: Tensor,
    value_mean: Tensor,
    settings: SparqSettings,
    *,
    scale: float | None = None,
) -> Tensor:
    """One query position a row by the fastest code there is: (B, Hq, d) in q's dtype.

    q (B, Hq, d); keys, values (B, Hkv, C, d); keys_t (B, Hkv, d, C), the same keys; start, stop int64 (B,): valid are the slots
    start[b] <= s < stop[b], and what lies outside never shows, be it NaN or infinite; value_mean float32 (B, Hkv, d): mean of the
    valid values. Scores, softmaxes and sums are float32 (float64 stays float64). scale: default 1 / sqrt(d). A row without valid
    slots is zero.
    """
    backend = backend_for(q)
    if backend is not None:
        return backend(q, keys, keys_t, values, start, stop, value_mean, settings, scale=scale)
    return sparq_torch(q, [Segment(keys, keys_t, values, start, stop)], value_mean, settings, scale=scale)


def sparq_shared(
    q: Tensor, prefix: Segment, suffix: Segment, value_mean: Tensor, settings: SparqSettings, *, scale: float | None = None
) -> Tensor:
    """`sparq_decode` where the rows share a prefix (batch 1) and have a suffix each: one ranking over both.

    Slots of the suffix outside the valid ones must be finite.
    """
    backend = backend_for(q, "sparq_shared")
    if backend is not None:
        return backend(q, prefix, suffix, value_mean, settings, scale=scale)
    return sparq_torch(q, [prefix, suffix], value_mean, settings, scale=scale)


@functools.cache
def _module(device: str) -> Any:
    """The module for a device, None if there is none."""
    if device not in _BACKENDS:
        return None
    try:
        return importlib.import_module(_BACKENDS[device])
    except ImportError as error:
        return _without(device, error)


@functools.cache
def _ready(device: str) -> bool:
    """Whether the device's module works here, once it has built what must be built."""
    try:
        _module(device).load()
    except Exception as error:  # a compiler's or a driver's
        _without(device, error)
        return False
    return True


def _without(device: str, error: Exception) -> None:
    logging.getLogger(__name__).warning("SparQ attention on %s runs in PyTorch, slower than it could: %s", device, error)


def backend_for(q: Tensor, name: str = "sparq_decode") -> Callable[..., Tensor] | None:
    """The function `name` of mm1/attention/sparq_cpu.py or sparq_triton.py; None where PyTorch does it, which is said once if the
    module is there and does not work."""
    device = q.device.type
    module = _module(device)
    return getattr(module, name, None) if module is not None and module.supports(q) and _ready(device) else None


def sparq_torch(
    q: Tensor, segments: list[Segment], value_mean: Tensor, settings: SparqSettings, *, scale: float | None = None
) -> Tensor:
    """`sparq_decode` (one segment) and `sparq_shared` (two) in PyTorch."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    is_dense = torch.stack([s.stop - s.start for s in segments]).clamp(min=0).sum(0) <= settings.dense_up_to
    if is_dense.all():
        return dense_segments(q, segments, scale)
    sparse = _sparse(q, segments, value_mean, settings, scale)
    return torch.where(is_dense[:, None, None], dense_segments(q, segments, scale), sparse) if is_dense.any() else sparse


@dataclass(frozen=True)
class Selection:
    """What a step reads: components (B, Hkv, r) of the keys, tokens (B, Hkv, k) whole, in no order; alpha (B, Hkv, g, 1)."""

    components: Tensor
    tokens: Tensor
    alpha: Tensor


def select(q: Tensor, segments: list[Segment], settings: SparqSettings, scale: float) -> Selection:
    """Steps 1 to 3 and alpha; tokens are numbered through the segments. Rows must have k valid tokens or more."""
    d = q.shape[-1]
    x = q.reshape(len(q), segments[0].keys.shape[1], -1, d).to(_accumulator(q))

    # 1. the components of the query that matter, one choice a group
    i1 = x.abs().sum(2).topk(min(settings.r, d), sorted=False).indices
    x1 = x.gather(3, _each_head(i1, x))

    # 2. scores from those components alone; the temperature makes up for the rest
    part, total = x1.abs().sum(-1, keepdim=True), x.abs().sum(-1, keepdim=True)
    ratio = torch.where(part > 0, part / total, 1.0)  # a head with nothing in i1 scores all tokens alike
    x1 = x1 * (scale * ratio.rsqrt())
    valid = torch.cat([segment.valid() for segment in segments], -1)
    logits = torch.cat([_component_scores(x1, i1, segment, d) for segment in segments], -1)
    logits.masked_fill_(~valid[:, None, None], -math.inf)
    s_hat = logits.softmax(-1)

    # 3. the tokens that matter, one choice a group
    rank = (s_hat if settings.group == "softmax" else logits).sum(2)
    later = valid.sum(-1, keepdim=True) - valid.cumsum(-1)  # valid tokens after each
    rank = rank.masked_fill((later < settings.window)[:, None], math.inf).masked_fill(~valid[:, None], -math.inf)
    i2 = rank.topk(min(settings.k, rank.shape[-1]), sorted=False).indices
    return Selection(i1, i2, s_hat.gather(3, _each_head(i2, x)).sum(-1, keepdim=True))


def _sparse(q: Tensor, segments: list[Segment], value_mean: Tensor, settings: SparqSettings, scale: float) -> Tensor:
    segments = [_trimmed(segment) for segment in segments]
    chosen = select(q, segments, settings, scale)
    x = q.reshape(len(q), segments[0].keys.shape[1], -1, q.shape[-1]).to(_accumulator(q))

    # 4. exact attention to the chosen
    keys, values = (_take([getattr(s, name) for s in segments], chosen.tokens).to(x.dtype) for name in ("keys", "values"))
    y = (x @ keys.transpose(-1, -2) * scale).softmax(-1) @ values

    # 5. what the others would have had goes to the mean value
    if settings.reallocate:
        y = chosen.alpha * y + (1 - chosen.alpha) * value_mean[:, :, None].to(x.dtype)
    return y.reshape(q.shape).to(q.dtype)


def _each_head(index: Tensor, x: Tensor) -> Tensor:
    """A group's choice (B, Hkv, n) for each of its query heads (B, Hkv, g, n)."""
    return index[:, :, None].expand(-1, -1, x.shape[2], -1)


def _trimmed(segment: Segment) -> Segment:
    """Without the slots that are valid in no row, but for one where there is no other."""
    first = int(segment.start.min())
    end = max(first + 1, int(segment.stop.max()))
    keys, values = (tensor[:, :, first:end] for tensor in (segment.keys, segment.values))
    assert segment.keys_t is not None
    return Segment(keys, segment.keys_t[..., first:end], values, segment.start - first, segment.stop - first)


def _component_scores(x1: Tensor, i1: Tensor, segment: Segment, d: int) -> Tensor:
    """q[i1] K[:, i1]^T (B, Hkv, g, C). A shared segment is read once for all rows where that is less than r components a row."""
    batch, kv_heads, g, r = x1.shape
    keys_t = segment.keys_t
    assert keys_t is not None
    shared = keys_t.shape[0] == 1
    if shared and batch * r >= d:
        chosen = x1.new_zeros(batch, kv_heads, g, d).scatter(3, _each_head(i1, x1), x1)
        rows = chosen.transpose(0, 1).reshape(kv_heads, batch * g, d)
        return (rows @ keys_t[0].to(x1.dtype)).view(kv_heads, batch, g, -1).transpose(0, 1)
    # index_select copies whole rows: seven times as fast as gather on a CPU
    heads = torch.arange(keys_t.shape[0] * kv_heads, device=i1.device).view(-1, kv_heads, 1)
    components = keys_t.flatten(0, 2).index_select(0, (heads * d + i1).flatten())
    return x1 @ components.view(batch, kv_heads, r, -1).to(x1.dtype)


def _take(parts: list[Tensor], index: Tensor) -> Tensor:
    """Rows `index` (B, Hkv, k) of tensors (B or 1, Hkv, C_i, d) as if these were joined along C: (B, Hkv, k, d)."""
    taken = None
    first = 0
    heads = torch.arange(index.shape[1], device=index.device)[:, None]
    for part in parts:
        batch = torch.arange(len(part), device=index.device)[:, None, None]
        rows = part[batch, heads, (index - first).clamp(0, part.shape[2] - 1)]
        taken = rows if taken is None else torch.where((index >= first)[..., None], rows, taken)
        first += part.shape[2]
    assert taken is not None
    return taken


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def dense_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    stop: Tensor,
    *,
    scale: float | None = None,
    extents: list[tuple[int, int]] | None = None,
) -> Tensor:
    """One query position a row, every valid token attended to; arguments and result as in `sparq_decode`.

    The query heads of a group become the query rows of one attention over their key-value head: on a CPU that reads the cache
    four times as fast as scaled_dot_product_attention's enable_gqa. Rows of one extent go together, without a mask. extents:
    start and stop on the host where they are known there, so that a GPU need not be waited for. On a CPU it is sparq_cpu.cpp
    that attends, where that can be built.
    """
    backend = backend_for(q, "dense_decode") if q.device.type == "cpu" else None
    if backend is not None:
        return backend(q, keys, values, start, stop, scale=scale)
    extents = extents or list(zip(start.tolist(), stop.tolist(), strict=True))
    if len(set(extents)) == 1:
        return _dense_rows(q, keys, values, *extents[0], scale)
    output = torch.empty_like(q)
    for row, (first, end) in enumerate(extents):  # each row as it would be by itself
        one = slice(row, row + 1)
        output[one] = _dense_rows(q[one], keys[one], values[one], first, end, scale)
    return output


def _dense_rows(q: Tensor, keys: Tensor, values: Tensor, first: int, end: int, scale: float | None) -> Tensor:
    if end <= first:
        return torch.zeros_like(q)
    packed = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[-1])
    output = torch.nn.functional.scaled_dot_product_attention(packed, keys[:, :, first:end], values[:, :, first:end], scale=scale)
    return output.reshape(q.shape)


def dense_segments(q: Tensor, segments: list[Segment], scale: float) -> Tensor:
    """q (B, Hq, d) -> (B, Hq, d): all valid tokens of a row's segment, or of a shared prefix and the row's own."""
    if len(segments) == 1:
        return dense_decode(q, segments[0].keys, segments[0].values, segments[0].start, segments[0].stop, scale=scale)
    prefix, suffix = segments
    return dense_shared(q[:, :, None], prefix, suffix, suffix.valid()[:, None], scale)[:, :, 0]
