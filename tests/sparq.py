"""The definition of SparQ attention in float64, one query head and one token at a time, as the paper's sections 3 and B state it.

Slow and plain on purpose: what mm1/attention computes, whatever its layout, batch or language, is compared with this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mm1.attention.sparq import SparqSettings


@dataclass
class Step:
    """One key-value head's step: outputs (g, d), the chosen components and tokens, alpha (g,), and the scores that ranked
    tokens (S,)."""

    y: Tensor
    components: set[int]
    tokens: set[int]
    alpha: list[float]
    rank: list[float]
    y3: Tensor


def softmax(scores: list[float]) -> list[float]:
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def group_step(q: Tensor, keys: Tensor, values: Tensor, settings: SparqSettings) -> Step:
    """q (g, d), keys and values (S, d), all valid."""
    q, keys, values = q.double(), keys.double(), values.double()
    heads, d = q.shape
    length = len(keys)
    # 1
    magnitude = q.abs().sum(0).tolist()
    components = sorted(range(d), key=lambda c: -magnitude[c])[: settings.r]
    # 2
    logits, s_hat = [], []
    for head in range(heads):
        part = sum(abs(float(q[head, c])) for c in components)
        tau = math.sqrt(d * part / float(q[head].abs().sum()))
        logits.append([float(q[head, components] @ keys[s, components]) / tau for s in range(length)])
        s_hat.append(softmax(logits[-1]))
    # 3
    summed = s_hat if settings.group == "softmax" else logits
    rank = [math.fsum(summed[head][s] for head in range(heads)) for s in range(length)]
    k = min(settings.k, length)
    local = settings.k // 4 if settings.local is None else settings.local
    latest = set(range(max(0, length - local), length))
    others = sorted(set(range(length)) - latest, key=lambda s: -rank[s])
    tokens = latest | set(others[: k - len(latest)])
    # 4 and 5
    chosen = sorted(tokens)
    mean = values.mean(0)
    y, y3, alphas = [], [], []
    for head in range(heads):
        weights = softmax([float(q[head] @ keys[s]) / math.sqrt(d) for s in chosen])
        exact = sum((weight * values[s] for weight, s in zip(weights, chosen, strict=True)), torch.zeros(d).double())
        alpha = math.fsum(s_hat[head][s] for s in chosen)
        y3.append(exact)
        alphas.append(alpha)
        y.append(alpha * exact + (1 - alpha) * mean if settings.reallocate else exact)
    return Step(torch.stack(y), set(components), tokens, alphas, rank, torch.stack(y3))


def definition(
    q: Tensor, keys: Tensor, values: Tensor, settings: SparqSettings, start: Tensor | None = None, stop: Tensor | None = None
) -> Tensor:
    """q (B, Hq, d), keys and values (B, Hkv, C, d), of which row b's slots start[b] <= s < stop[b] count: (B, Hq, d) float64."""
    rows = []
    for b in range(len(q)):
        valid = slice(0 if start is None else int(start[b]), keys.shape[2] if stop is None else int(stop[b]))
        groups = q[b].view(keys.shape[1], -1, q.shape[-1])
        rows.append(torch.cat([group_step(g, keys[b, h, valid], values[b, h, valid], settings).y for h, g in enumerate(groups)]))
    return torch.stack(rows)


def dense_definition(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Exact attention in float64 over all slots."""
    groups = q.double().view(len(q), keys.shape[1], -1, q.shape[-1])
    scores = groups @ keys.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ values.double()).view(q.shape)


def example(
    batch: int, heads: int, kv_heads: int, length: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """q, keys, values with a few large components and a few tokens that matter, as attention heads have them."""
    g = torch.Generator().manual_seed(seed)
    loud = torch.exp(torch.randn(batch, kv_heads, 1, d, generator=g, dtype=torch.float64))
    group = heads // kv_heads
    # heads of a group look along a common direction, each with its own noise and its own sharpness
    common = torch.randn(batch, kv_heads, 1, d, generator=g, dtype=torch.float64)
    own = torch.randn(batch, kv_heads, group, d, generator=g, dtype=torch.float64)
    sharp = torch.exp(0.5 * torch.randn(batch, kv_heads, group, 1, generator=g, dtype=torch.float64))
    q = ((common + own) * loud * sharp).reshape(batch, heads, d)
    keys = torch.randn(batch, kv_heads, length, d, generator=g, dtype=torch.float64)
    values = 0.7 + torch.randn(batch, kv_heads, length, d, generator=g, dtype=torch.float64)
    return q.to(dtype), keys.to(dtype), values.to(dtype)


def mean_of(values: Tensor, start: Tensor | None = None, stop: Tensor | None = None) -> Tensor:
    """The mean of the valid values, float32 (float64 stays): (B, Hkv, d)."""
    rows = []
    for b in range(len(values)):
        valid = slice(0 if start is None else int(start[b]), values.shape[2] if stop is None else int(stop[b]))
        rows.append(values[b, :, valid].double().mean(1))
    mean = torch.stack(rows)
    return mean if values.dtype == torch.float64 else mean.float()
