"""SparQ attention against its definition in float64 (tests/sparq.py) and against what the method promises."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from mm1.attention import sparq
from mm1.attention.segments import Segment
from mm1.attention.sparq import SparqSettings, dense_decode, select, sparq_decode, sparq_torch
from tests.sparq import definition, dense_definition, example, group_step, mean_of


def whole(keys: Tensor, values: Tensor) -> Segment:
    start = torch.zeros(len(keys), dtype=torch.int64)
    return Segment(keys, keys.transpose(-1, -2).contiguous(), values, start, start + keys.shape[2])


def decode(q: Tensor, keys: Tensor, values: Tensor, settings: SparqSettings) -> Tensor:
    return sparq_torch(q, [whole(keys, values)], mean_of(values), settings)


def shape(batch: int = 1, heads: int = 4, kv_heads: int = 2, length: int = 50, d: int = 16, **settings: object) -> object:
    given = SparqSettings(**({"r": 6, "k": 12} | settings))  # type: ignore[arg-type]
    return pytest.param((batch, heads, kv_heads, length, d), given, id=f"b{batch}h{heads}/{kv_heads}s{length}d{d}-{settings}")


SHAPES = [
    shape(batch=3),
    shape(group="logits"),
    shape(reallocate=False),
    shape(local=0),
    shape(local=12),
    shape(heads=2),  # a group of one: plain multi-head attention
    shape(heads=8, kv_heads=1, batch=2),
    shape(length=1),
    shape(length=11),
    shape(length=12),
    shape(length=13),
    shape(length=131, r=7, k=33),
    shape(r=16),
    shape(r=1, k=1),
    shape(d=64, r=32),
    shape(d=80, r=13),
    shape(d=128, r=32, length=70),
    shape(d=256, r=64, length=40),
]


@pytest.mark.parametrize(("sizes", "settings"), SHAPES)
def test_it_is_the_papers_definition(sizes: tuple[int, ...], settings: SparqSettings) -> None:
    q, keys, values = example(*sizes)
    assert (decode(q, keys, values, settings) - definition(q, keys, values, settings)).abs().max() < 1e-12
    single = [tensor.float() for tensor in (q, keys, values)]
    assert (decode(*single, settings) - definition(q, keys, values, settings)).abs().max() < 2e-5


@pytest.mark.parametrize("group", ["softmax", "logits"])
def test_components_tokens_and_alpha_are_the_definitions(group: str) -> None:
    settings = SparqSettings(r=8, k=16, group=group)
    q, keys, values = example(2, 8, 2, 90, 32)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        chosen = select(q.to(dtype), [whole(keys.to(dtype), values.to(dtype))], settings, 32**-0.5)
        for b in range(2):
            for h in range(2):
                step = group_step(q[b].view(2, 4, 32)[h], keys[b, h], values[b, h], settings)
                tokens = set(chosen.tokens[b, h].tolist())
                assert set(chosen.components[b, h].tolist()) == step.components
                assert len(tokens) == 16
                threshold = min(step.rank[s] for s in step.tokens if s < 90 - 4)
                assert all(abs(step.rank[s] - threshold) < tolerance * abs(threshold) for s in tokens ^ step.tokens)
                assert chosen.alpha[b, h, :, 0].tolist() == pytest.approx(step.alpha, abs=10 * tolerance)
                assert all(0 <= alpha <= 1 + 1e-6 for alpha in chosen.alpha[b, h, :, 0].tolist())


def test_the_two_sums_over_a_group_choose_differently() -> None:
    """Or the option would be tested by nothing: they share half of the tokens or so at g = 4."""
    q, keys, values = example(4, 16, 4, 400, 64)
    chosen = [
        select(q, [whole(keys, values)], SparqSettings(r=16, k=40, local=0, group=group), 64**-0.5).tokens
        for group in ("softmax", "logits")
    ]
    shared = (chosen[0][..., None] == chosen[1][..., None, :]).any(-1).double().mean()
    assert 0.1 < shared < 0.9


@pytest.mark.parametrize("r", [1, 7, 16])
def test_with_room_for_every_token_it_is_dense_to_the_bit(r: int) -> None:
    q, keys, values = (tensor.float() for tensor in example(3, 8, 2, 37, 16))
    start, stop = torch.tensor([0, 5, 30]), torch.tensor([37, 37, 31])
    dense = dense_decode(q, keys, values, start, stop)
    for settings in (SparqSettings(r=r, k=37), SparqSettings(r=r, k=4, dense_below=38)):
        segment = Segment(keys, keys.transpose(-1, -2).contiguous(), values, start, stop)
        assert torch.equal(sparq_torch(q, [segment], mean_of(values, start, stop), settings), dense)
    # a threshold is each row's own: one row of 37 tokens, which k = 33 does not cover, beside two that are dense
    some = sparq_torch(q, [segment], mean_of(values, start, stop), SparqSettings(r=r, k=33))
    assert [torch.equal(a, b) for a, b in zip(some, dense, strict=True)] == [False, True, True]


def test_with_all_components_it_is_top_k_with_the_exact_mass_reallocated() -> None:
    q, keys, values = example(2, 8, 2, 60, 16)
    probabilities = (q.view(2, 2, 4, 16) @ keys.transpose(-1, -2) / 4).softmax(-1)
    kept = torch.zeros(2, 2, 1, 60, dtype=torch.bool)
    ranked = probabilities.sum(2, keepdim=True)
    ranked[..., -3:] = 10
    kept.scatter_(3, ranked.topk(12).indices, True)
    exact = probabilities * kept
    expected = exact @ values + (1 - exact.sum(-1, keepdim=True)) * values.mean(2, keepdim=True)
    assert (decode(q, keys, values, SparqSettings(r=16, k=12)) - expected.view(2, 8, 16)).abs().max() < 1e-12


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_lies_outside_a_rows_extent_never_shows(junk: float) -> None:
    """Each row equals its run alone, without padding or spare capacity."""
    q, keys, values = example(4, 4, 2, 80, 16)
    start, stop = torch.tensor([0, 13, 40, 70]), torch.tensor([80, 61, 79, 70])
    slots = torch.arange(80)
    outside = ((slots < start[:, None]) | (slots >= stop[:, None]))[:, None, :, None]
    dirty_keys, dirty_values = keys.masked_fill(outside, junk), values.masked_fill(outside, junk)
    mean = mean_of(values, start, stop).nan_to_num()
    for settings in (SparqSettings(r=5, k=20), SparqSettings(r=5, k=20, group="logits"), SparqSettings(r=5, k=45)):
        segment = Segment(dirty_keys, dirty_keys.transpose(-1, -2).contiguous(), dirty_values, start, stop)
        got = sparq_torch(q, [segment], mean, settings)
        assert (got[:3] - definition(q[:3], keys, values, settings, start, stop)).abs().max() < 1e-12
        assert (got[3] == 0).all()  # a row without a token
    dense = dense_decode(q, dirty_keys, dirty_values, start, stop)
    for b in range(3):
        own = slice(int(start[b]), int(stop[b]))
        expected = dense_definition(q[b : b + 1], keys[b : b + 1, :, own], values[b : b + 1, :, own])
        assert (dense[b] - expected[0]).abs().max() < 1e-12


@pytest.mark.parametrize("group", ["softmax", "logits"])
def test_order_of_tokens_does_not_matter_without_a_local_window(group: str) -> None:
    q, keys, values = example(2, 4, 2, 60, 16)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    settings = SparqSettings(r=6, k=12, local=0, group=group)
    moved = decode(q, keys[:, :, order], values[:, :, order], settings)
    assert (moved - decode(q, keys, values, settings)).abs().max() < 1e-12
    windowed = replace(settings, local=6)
    moved = decode(q, keys[:, :, order], values[:, :, order], windowed)
    assert (moved - decode(q, keys, values, windowed)).abs().max() > 1e-3


def test_without_reallocation_a_result_lies_among_the_chosen_values() -> None:
    q, keys, values = example(2, 4, 2, 60, 16)
    settings = SparqSettings(r=6, k=12, reallocate=False)
    tokens = select(q, [whole(keys, values)], settings, 0.25).tokens
    chosen = values.gather(2, tokens[..., None].expand(-1, -1, -1, 16))
    y = decode(q, keys, values, settings).view(2, 2, 2, 16)
    assert (y >= chosen.amin(2, keepdim=True) - 1e-12).all()
    assert (y <= chosen.amax(2, keepdim=True) + 1e-12).all()


def test_heads_without_weight_on_the_groups_components_stay_finite() -> None:
    q, keys, values = example(1, 4, 1, 40, 16)
    q[:, 0] = 0
    q[:, 1] = 0
    q[:, 1, 3] = 1e-3  # not among the components that the two loud heads choose
    q[:, 2:, 3] = 0
    y = decode(q, keys, values, SparqSettings(r=4, k=10))
    assert y.isfinite().all()
    assert (y[:, 2:] - definition(q[:, 2:], keys, values, SparqSettings(r=4, k=10))).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_dense_attention_in_it(dtype: torch.dtype) -> None:
    q, keys, values = example(2, 8, 2, 200, 64, dtype=dtype)
    settings = SparqSettings(r=16, k=50)
    start = torch.zeros(2, dtype=torch.int64)
    ours = decode(q, keys, values, settings).double() - definition(q, keys, values, settings)
    peers = dense_decode(q, keys, values, start, start + 200).double() - dense_definition(q, keys, values)
    assert decode(q, keys, values, settings).dtype == dtype
    # against the size of each result: the sparse one is larger
    ours /= definition(q, keys, values, settings).pow(2).mean().sqrt()
    peers /= dense_definition(q, keys, values).pow(2).mean().sqrt()
    assert ours.pow(2).mean() <= 1.05 * peers.pow(2).mean()


def test_tokens_are_ranked_where_half_precision_would_see_ties() -> None:
    """Scores of 2^-26 and 2^-27 beside one near 1: both are 0 in float16."""
    length, d = 2000, 16
    keys = torch.zeros(1, 1, length, d, dtype=torch.float16)
    keys[0, 0, :, 0] = -18 * 4 / 4
    keys[0, 0, 7, 0] = 4
    keys[0, 0, 100:110, 0] = -17 * 4 / 4
    q = torch.zeros(1, 1, d, dtype=torch.float16)
    q[..., 0] = 4
    chosen = select(q, [whole(keys, keys)], SparqSettings(r=1, k=11, local=0), d**-0.5).tokens
    assert sorted(chosen.flatten().tolist()) == [7, *range(100, 110)]


def test_scale_is_the_decoders_where_it_is_given() -> None:
    q, keys, values = example(1, 4, 2, 50, 16)
    settings, segment = SparqSettings(r=6, k=12), whole(keys, values)
    scaled = sparq_torch(q, [segment], mean_of(values), settings, scale=0.5)
    assert (scaled - definition(q * 2, keys, values, settings)).abs().max() < 1e-12


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("group", ["softmax", "logits"])
def test_two_segments_are_one_ranking_over_both(rows: int, group: str) -> None:
    """A prefix stored once; one row gathers its components, five share one product over all of them."""
    q, keys, values = example(rows, 8, 2, 90, 16)
    keys[:, :, :50], values[:, :, :50] = keys[:1, :, :50], values[:1, :, :50]
    start, stop = torch.arange(rows) * 2, torch.tensor([40, 31, 9, 30, 8])[:rows]  # the last have nothing of their own
    zero = torch.zeros(rows, dtype=torch.int64)
    prefix = Segment(keys[:1, :, :50], keys[:1, :, :50].transpose(-1, -2), values[:1, :, :50], zero + 3, zero + 50)
    suffix = Segment(keys[:, :, 50:], keys[:, :, 50:].transpose(-1, -2), values[:, :, 50:], start, stop)
    for settings in (SparqSettings(r=5, k=20, group=group), SparqSettings(r=5, k=60), SparqSettings(r=5, k=100)):
        means, expected = [], []
        for b in range(rows):
            own = torch.cat([torch.arange(3, 50), torch.arange(50 + int(start[b]), 50 + int(stop[b]))])
            one = (q[b : b + 1], keys[b : b + 1, :, own], values[b : b + 1, :, own])
            means.append(one[2].mean(2))
            expected.append(definition(*one, settings))
        got = sparq_torch(q, [prefix, suffix], torch.cat(means), settings)
        assert (got - torch.cat(expected)).abs().max() < 1e-12
        # before a row's first token, as padded questions have it, there is the prefix alone
        nothing = replace(suffix, start=zero, stop=zero)
        alone = definition(q, keys[:, :, 3:50], values[:, :, 3:50], settings)
        got = sparq_torch(q, [prefix, nothing], values[:, :, 3:50].mean(2), settings)
        assert (got - alone).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"r": 0}, "sparq.r=0"),
        ({"k": 0}, "sparq.k=0"),
        ({"k": 8, "local": 9}, "sparq.local=9"),
        ({"local": -1}, "sparq.local=-1"),
        ({"group": "mean"}, "sparq.group=mean: choose from softmax, logits"),
        ({"dense_below": -1}, "sparq.dense_below=-1"),
        ({"suffix": "both"}, "sparq.suffix=both"),
    ],
)
def test_settings_that_cannot_work_are_named(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        SparqSettings(**wrong)  # type: ignore[arg-type]


def test_the_local_window_is_a_quarter_of_k_unless_given() -> None:
    assert [SparqSettings(k=k, local=local).window for k, local in ((128, None), (6, None), (6, 6), (6, 0))] == [32, 1, 6, 0]


class Backend:
    """Stands for sparq_cpu or sparq_triton."""

    def __init__(self, broken: bool = False) -> None:
        self.broken, self.calls, self.loads = broken, 0, 0

    def load(self) -> None:
        self.loads += 1
        if self.broken:
            raise RuntimeError("no C++ compiler found")

    def supports(self, q: Tensor) -> bool:
        return q.dtype == torch.float32

    def sparq_decode(self, q: Tensor, *args: object, **kwargs: object) -> Tensor:
        self.calls += 1
        return torch.zeros_like(q)


@pytest.mark.parametrize("broken", [False, True])
def test_the_fast_path_is_used_where_it_works_and_missed_aloud(
    broken: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Backend(broken)
    monkeypatch.setattr(sparq, "_module", lambda device: backend)
    sparq._ready.cache_clear()
    try:
        for dtype in (torch.float32, torch.float64, torch.float32):
            q, keys, values = example(1, 4, 2, 50, 16, dtype=dtype)
            part, settings = whole(keys, values), SparqSettings(r=6, k=12)
            with caplog.at_level(logging.WARNING):
                y = sparq_decode(q, keys, part.keys_t, values, part.start, part.stop, mean_of(values), settings)
            by_backend = dtype == torch.float32 and not broken
            assert torch.equal(y, torch.zeros_like(q) if by_backend else decode(q, keys, values, settings))
    finally:
        sparq._ready.cache_clear()
    assert backend.calls == (0 if broken else 2)
    assert backend.loads == 1
    assert [record.getMessage() for record in caplog.records] == (
        ["SparQ attention on cpu runs in PyTorch, slower than it could: no C++ compiler found"] if broken else []
    )


def test_a_device_without_a_fast_path_uses_pytorch() -> None:
    assert sparq.backend_for(SimpleNamespace(device=torch.device("meta"), dtype=torch.float32)) is None  # type: ignore[arg-type]
