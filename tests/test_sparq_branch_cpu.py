"""sparq_cpu.cpp on a prefix that rows share, and its step of a cache: as the method in PyTorch, and the definition in float64."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipelines import native
from mm1.attention import sparq_cpu, sparq_step
from mm1.attention.cache import SparqCache, SparqLayer
from mm1.attention.register import sparq_attention
from mm1.attention.segments import Segment
from mm1.attention.sparq import SparqSettings, dense_segments, sparq_torch
from tests.sparq import definition, example

pytestmark = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS[".cpp"])), reason="no C++ compiler")
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2}
SETTINGS = SparqSettings(r=13, k=40, dense_below=0)


def branch(
    rows: int, heads: int, d: int, length: int, own: int, padding: int, dtype: torch.dtype
) -> tuple[Tensor, Segment, Segment, Tensor, list[Tensor]]:
    """q, prefix, suffix, means; and for each row which of the joined slots it sees. Two kv heads; NaN where nothing may look."""
    q, keys, values = (tensor.to(dtype) for tensor in example(rows, heads, 2, length + own + 2, d, seed=length + rows))
    keys[:, :, :length], values[:, :, :length] = keys[:1, :, :length], values[:1, :, :length]
    start = torch.arange(rows) % max(1, own // 2)
    stop = torch.where(torch.arange(rows) == 3, start, torch.tensor(own))  # the fourth has nothing of its own
    seen = [
        torch.cat([torch.arange(padding, length), length + torch.arange(int(a), int(b))])
        for a, b in zip(start, stop, strict=True)
    ]
    means = torch.stack([values[b][:, slots].double().mean(1) for b, slots in enumerate(seen)]).float()
    zero = torch.zeros(rows, dtype=torch.int64)
    k, v = keys[:1, :, :length].clone(), values[:1, :, :length].clone()
    k[:, :, :padding], v[:, :, :padding] = float("nan"), float("inf")
    prefix = Segment(k, k.transpose(2, 3).contiguous(), v, zero + padding, zero + length)
    k, v = keys[:, :, length:], values[:, :, length:]
    suffix = Segment(k, k.transpose(2, 3).contiguous(), v, start, stop)
    return q, prefix, suffix, means, [torch.cat([keys[b][:, s], values[b][:, s]]) for b, s in enumerate(seen)]


def in_float64(q: Tensor, keys: Tensor, values: Tensor, settings: SparqSettings) -> Tensor:
    """The definition, where that would take long: sparq_torch equals it to 1e-12 (test_sparq.py)."""
    q, keys, values = q.double(), keys.double(), values.double()
    start = torch.zeros(len(q), dtype=torch.int64)
    whole = Segment(keys, keys.transpose(2, 3).contiguous(), values, start, start + keys.shape[2])
    return sparq_torch(q, [whole], values.mean(2), settings)


SHAPES = [
    (1, 8, 64, 1500, 3, 0), (5, 8, 64, 1024, 16, 5), (4, 2, 80, 1025, 1, 0), (8, 14, 20, 100, 9, 7), (4, 8, 128, 60, 1300, 0),
    (2, 18, 64, 2100, 30, 0),
]  # fmt: skip


@pytest.mark.parametrize("group", ["softmax", "logits"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shared_prefix_is_the_definition_over_both(shape: tuple[int, ...], group: str) -> None:
    q, prefix, suffix, means, seen = branch(*shape, torch.float32)  # type: ignore[arg-type, misc, call-arg]
    for settings in (replace(SETTINGS, group=group), replace(SETTINGS, group=group, reallocate=False, local=40, r=shape[2])):
        mine = sparq_cpu.sparq_shared(q, prefix, suffix, means, settings)
        reference = definition if shape[3] <= 100 and shape[4] < 100 else in_float64
        expected = torch.cat([reference(q[b : b + 1], kv[None, :2], kv[None, 2:], settings) for b, kv in enumerate(seen)])
        assert (mine - expected).abs().max() < TOLERANCE[q.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_shared_prefix_is_the_method_in_torch(dtype: torch.dtype, threads: int) -> None:
    q, prefix, suffix, means, _ = branch(5, 8, 64, 1700, 12, 3, dtype)
    finite = replace(prefix, keys=prefix.keys.nan_to_num(0), values=prefix.values.nan_to_num(0, 0, 0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mine = sparq_cpu.sparq_shared(q, prefix, suffix, means, SETTINGS, scale=0.2)
    finally:
        torch.set_num_threads(before)
    assert mine.dtype == dtype
    expected = sparq_torch(q, [finite, suffix], means, SETTINGS, scale=0.2)
    assert (mine.float() - expected.float()).abs().max() < TOLERANCE[dtype]
    one = [replace(part, keys=part.keys[-1:], keys_t=part.keys_t[-1:], values=part.values[-1:]) for part in (prefix, suffix)]  # type: ignore[index]
    one = [replace(part, start=part.start[-1:], stop=part.stop[-1:]) for part in one]
    alone = sparq_cpu.sparq_shared(q[-1:], one[0], one[1], means[-1:], SETTINGS, scale=0.2)
    assert torch.equal(alone[0], mine[-1])  # a row of a branch is the row alone


def test_short_rows_of_a_branch_are_dense_to_the_bit() -> None:
    q, prefix, suffix, means, _ = branch(4, 8, 64, 100, 20, 0, torch.float32)
    dense = dense_segments(q, [prefix, suffix], 64**-0.5)

    def same(below: int | None) -> list[bool]:
        found = sparq_cpu.sparq_shared(q, prefix, suffix, means, replace(SETTINGS, dense_below=below))
        return [torch.equal(a, b) for a, b in zip(found, dense, strict=True)]

    assert same(0) == [False] * 4
    assert same(101) == [False, False, False, True]  # rows see 120, 119, 118 and 100 tokens
    assert same(120) == [False, True, True, True]
    assert same(None) == [True] * 4


def run(
    settings: SparqSettings | None, dtype: torch.dtype, padded: bool, monkeypatch: Any, direct: bool
) -> tuple[SparqLayer, list[Tensor]]:
    """A prompt, then tokens one at a time, with a copy, a new order of rows and room that doubles on the way."""
    monkeypatch.setattr(sparq_step.Step, "possible", staticmethod(lambda layer: False) if not direct else POSSIBLE)
    generator = torch.Generator().manual_seed(0)
    cache, mask = SparqCache(layers=[SparqLayer(settings)]), torch.ones(3, 1, 1, 0, dtype=torch.bool)
    outputs: list[Tensor] = []
    for n in [50, *[1] * 60]:
        layer: Any = cache.layers[0]
        new = torch.rand(3, 1, 1, n, generator=generator) > 0.5 if padded and layer.length < 50 else torch.ones(3, 1, 1, n) > 0
        if padded and n > 1:
            new = torch.arange(n) >= torch.tensor([0, 7, 49]).view(3, 1, 1, 1)
        elif padded and len(outputs) == 20:
            new = torch.tensor([True, True, False]).view(3, 1, 1, 1)
        q, k, v = (torch.randn(3, n, h, 32, generator=generator).to(dtype).transpose(1, 2) for h in (8, 2, 2))
        hidden = ~new[:, :, 0, :, None].expand(-1, 2, -1, 1)
        mask = torch.cat([mask, new], -1)
        shown = mask.expand(3, 1, n, -1).tril(mask.shape[-1] - n) if padded else None
        key, value = cache.update(k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, float("inf")), 0)
        if n > 1:  # the prompt's own attention is not what is compared
            layer.settle(None if shown is None else shown[:, 0, -1])
            layer.attended()
        else:
            outputs.append(sparq_attention(SimpleNamespace(), q, key, value, shown, scaling=0.2)[0])
        if len(outputs) == 10:
            cache = copy.deepcopy(cache)
        if len(outputs) == 21 and padded:  # what was padding is taken off again: a row's tokens have no gaps
            layer.crop(-1)
            mask = mask[..., :-1]
        if len(outputs) == 30:
            layer.reorder_cache(torch.tensor([1, 2, 2]))
            mask = mask[[1, 2, 2]]
    result: Any = cache.layers[0]
    return result, outputs


POSSIBLE = sparq_step.Step.possible


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("settings", [None, SparqSettings(r=9, k=24, dense_below=0), SparqSettings(r=9, k=24, dense_below=80)])
def test_a_step_is_what_its_tensor_operations_are(
    settings: SparqSettings | None, padded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, outputs = run(settings, dtype, padded, monkeypatch, True)
    theirs, expected = run(settings, dtype, padded, monkeypatch, False)
    assert mine.step is not None
    assert theirs.step is None
    assert mine.length == theirs.length == mine.settled
    for name in ("keys", "keys_t", "values", "valid"):
        a, b = getattr(mine, name), getattr(theirs, name)
        if a is not None:
            used = (..., slice(mine.length)) if name in ("keys_t", "valid") else (slice(None), slice(None), slice(mine.length))
            assert torch.equal(a[used], b[used])
    assert torch.equal(mine.count, theirs.count)
    assert (mine.total - theirs.total).abs().max() < 1e-12
    for a, b in zip(outputs, expected, strict=True):
        assert a.isfinite().all()
        assert (a.float() - b.float()).abs().max() <= TOLERANCE[dtype]
