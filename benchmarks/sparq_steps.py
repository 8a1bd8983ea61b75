"""Cases of `python -m benchmarks.sparq --device cpu` that are more than one call of a kernel.

step      one decoding step of one layer as transformers runs it, from a new token's q, k, v to the attention's output. Ours:
          SparqCache.update and attention=sparq. The peer: DynamicCache.update, which copies the cache to make it longer, and
          transformers' own SDPA. `tokens` counts the new one. Room for ours is allocated ahead; doubling it when it is full
          copies a cache of S tokens once in S steps, where the peer does so in each.
shared    rows that share a prefix, with OWN tokens each, against dense attention that reads the prefix once for all of them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.sparq_cases import CASES, DTYPES, HEAD, HEADS, KV_HEADS, ROTATED, K, R, seconds
from benchmarks.sparq_cuda import TimedRow
from mm1.attention.cache import SparqCache, SparqLayer
from mm1.attention.register import sparq_attention
from mm1.attention.segments import Segment, dense_shared
from mm1.attention.sparq import SparqSettings, sparq_shared
from mm1.attention.sparq_cpu import DENSE_BELOW

OWN = 256
LEAST_SECONDS = 0.3  # a repeat
Work = Callable[[], object]


def row(name: str, repeats: int, bandwidth: float) -> TimedRow:
    which, batch, tokens = CASES[name]
    dtype = getattr(torch, DTYPES[which])
    dense = tokens < max(DENSE_BELOW[dtype], K + 1)
    shared = "shared" in name
    chosen = 2 * K * HEAD
    moved = tokens * 2 * HEAD if dense else tokens * R + chosen
    if shared:  # the components that any row may ask for, once, and each row's own
        moved = tokens * HEAD + batch * (OWN * R + chosen)
    moved *= KV_HEADS * dtype.itemsize * (1 if shared else batch)
    fastest = [float("inf"), float("inf")]
    with torch.inference_mode():
        pairs = _shared(dtype, batch, tokens) if shared else _steps(dtype, batch, tokens)
        for _ in range(repeats):
            spent, calls = 0.0, 0
            while spent < LEAST_SECONDS or calls < 5:
                calls += 1
                for side, work in enumerate(next(pairs)):
                    took = seconds(work)
                    spent += took
                    fastest[side] = min(fastest[side], took)
    mine, peer = (1e6 * took for took in fastest)
    best = "dense, prefix read once" if shared else "DynamicCache and SDPA"
    limit = f"bytes at {bandwidth / 1e9:.0f} GB/s, {torch.get_num_threads()} threads"
    return TimedRow(name, mine, peer, peer / mine, 1e6 * moved / bandwidth, "us", best, limit, moved)


def _copies(size: int) -> int:
    return max(1, min(64, ROTATED // (6 * size)))


def _steps(dtype: torch.dtype, batch: int, tokens: int) -> Iterator[tuple[Work, Work]]:
    """Our step and the peer's, each time on other caches, of tokens - 1 tokens."""
    module, scale = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True), HEAD**-0.5
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, key, value = (torch.randn(batch, 1, count, HEAD).to(dtype).transpose(1, 2) for count in heads)
    caches = []
    for _ in range(_copies(batch * KV_HEADS * tokens * HEAD * dtype.itemsize)):
        keys, values = torch.randn(2, batch, KV_HEADS, tokens - 1, HEAD).to(dtype)
        layer = SparqLayer(SparqSettings(r=R, k=K), capacity=tokens)
        ours, theirs = SparqCache(layers=[layer]), DynamicCache()
        ours.update(keys, values, 0)
        layer.settle(None)
        layer.attended()
        theirs.update(keys, values, 0)
        caches.append((ours, layer, theirs, keys, values))

    def step(cache: Any, attend: Any) -> object:
        return attend(module, q, *cache.update(key, value, 0), None, dropout=0.0, scaling=scale)

    while True:
        for ours, layer, theirs, keys, values in caches:
            yield lambda ours=ours: step(ours, sparq_attention), lambda theirs=theirs: step(theirs, sdpa_attention_forward)  # type: ignore[misc]
            layer.crop(-1)
            peer: Any = theirs.layers[0]
            peer.keys, peer.values = keys, values


def _shared(dtype: torch.dtype, batch: int, tokens: int) -> Iterator[tuple[Work, Work]]:
    q, zero = torch.randn(batch, HEADS, HEAD).to(dtype), torch.zeros(batch, dtype=torch.int64)
    settings, visible = SparqSettings(r=R, k=K), torch.ones(batch, 1, OWN, dtype=torch.bool)
    mean = torch.randn(batch, KV_HEADS, HEAD)
    caches = []
    for _ in range(_copies(KV_HEADS * tokens * HEAD * dtype.itemsize)):
        parts = []
        for rows, length in ((1, tokens), (batch, OWN)):
            keys, values = torch.randn(2, rows, KV_HEADS, length, HEAD).to(dtype)
            parts.append(Segment(keys, keys.transpose(2, 3).contiguous(), values, zero, zero + length))
        caches.append(parts)
    while True:
        for prefix, own in caches:
            yield (
                lambda prefix=prefix, own=own: sparq_shared(q, prefix, own, mean, settings),  # type: ignore[misc]
                lambda prefix=prefix, own=own: dense_shared(q[:, :, None], prefix, own, visible, HEAD**-0.5),  # type: ignore[misc]
            )
