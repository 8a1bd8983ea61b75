"""The cache of SparQ attention: whatever is done to it, both layouts hold the same keys and the mean is the mean of V."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from mm1.attention.cache import Latest, SparqCache, SparqLayer
from mm1.attention.register import sparq_attention
from mm1.attention.sparq import SparqSettings

HEADS, D = 2, 4


class Mirror:
    """What the layer must hold, in lists: for each row (keys (Hkv, d), values (Hkv, d), valid) of each token."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[tuple[Tensor, Tensor, bool]]] = [[] for _ in range(rows)]

    def append(self, keys: Tensor, values: Tensor, valid: Tensor) -> None:
        for b, row in enumerate(self.rows):
            row += [(keys[b, :, i], values[b, :, i], bool(valid[b, i])) for i in range(keys.shape[2])]

    def mean(self, b: int) -> Tensor:
        return torch.stack([v.double() for _, v, valid in self.rows[b] if valid]).mean(0)


def append(layer: SparqLayer, mirror: Mirror | None, n: int, generator: torch.Generator, padded: bool = False) -> None:
    """As a forward pass does it: `update`, then what the mask says."""
    rows = len(mirror.rows) if mirror is not None else 1
    keys, values = (torch.randn(rows, HEADS, n, D, generator=generator) + 0.7 for _ in range(2))
    valid = torch.rand(rows, n, generator=generator) > 0.4 if padded else torch.ones(rows, n, dtype=torch.bool)
    dirty = keys.masked_fill(~valid[:, None, :, None], float("nan")), values.masked_fill(~valid[:, None, :, None], float("inf"))
    before = layer.valid[:, : layer.length].clone() if layer.is_initialized else valid[:, :0]
    layer.update(*dirty)
    layer.settle(torch.cat([before, valid], 1) if padded else None)
    layer.attended()
    if mirror is not None:
        mirror.append(keys * valid[:, None, :, None], values * valid[:, None, :, None], valid)


def check(layer: SparqLayer, mirror: Mirror) -> None:
    length = layer.length
    assert length == layer.get_seq_length() == layer.settled == len(mirror.rows[0])
    if layer.keys_t is None:
        assert length <= layer.settings.dense_up_to
    else:
        assert torch.equal(layer.keys_t[..., :length], layer.keys[:, :, :length].transpose(-1, -2))
    assert len(layer.keys) == len(mirror.rows)
    for b, row in enumerate(mirror.rows):
        assert torch.equal(layer.keys[b, :, :length], torch.stack([k for k, _, _ in row], 1))
        assert torch.equal(layer.values[b, :, :length], torch.stack([v for _, v, _ in row], 1))
        assert layer.valid[b, :length].tolist() == [valid for _, _, valid in row]
        if any(valid for _, _, valid in row):
            assert (layer.total[b] / layer.count[b] - mirror.mean(b)).abs().max() < 1e-13
            assert (layer.means(1)[b, :, 0] - mirror.mean(b)).abs().max() < 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_operations_keeps_layouts_values_and_mean(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer, mirror = SparqLayer(SparqSettings(k=32)), Mirror(3)
    append(layer, mirror, 9, generator, padded=True)
    assert layer.keys_t is None
    for _ in range(60):
        rows = len(mirror.rows)
        draw = int(torch.randint(7, (), generator=generator))
        if draw <= 1:
            append(layer, mirror, int(torch.randint(1, 40, (), generator=generator)), generator, padded=draw == 1)
        elif draw == 2:
            n = int(torch.randint(0, min(20, layer.length - 1), (), generator=generator)) if layer.length > 2 else 0
            layer.crop(-n)
            mirror.rows = [row[: len(row) - n] for row in mirror.rows]
        elif draw == 3:
            order = torch.randint(rows, (rows,), generator=generator)
            layer.reorder_cache(order)
            mirror.rows = [list(mirror.rows[i]) for i in order.tolist()]
        elif draw == 4 and rows > 1:
            kept = torch.randperm(rows, generator=generator)[: rows - 1].sort().values
            layer.batch_select_indices(kept)
            mirror.rows = [mirror.rows[i] for i in kept.tolist()]
        elif draw == 5 and rows < 5:
            layer.batch_repeat_interleave(2)
            mirror.rows = [list(row) for row in mirror.rows for _ in range(2)]
        elif draw == 6:
            layer.offload()
            layer.prefetch()
        check(layer, mirror)


def test_the_mean_is_exact_after_a_hundred_thousand_appends() -> None:
    """A float32 sum would be off by a hundred roundings of the mean."""
    generator = torch.Generator().manual_seed(0)
    values = 0.7 + torch.rand(1, 1, 100_000, 2, generator=generator)
    layer = SparqLayer(None)
    with torch.inference_mode():
        for value in values.split(1, 2):
            layer.update(value, value)
            layer.settle(None)
        exact = values.double().mean(2)
        assert (layer.total / layer.count - exact).abs().max() < 1e-12
        assert (layer.means(1)[:, :, 0] - exact).abs().max() <= torch.finfo(torch.float32).eps
        layer.crop(-99_000)
        assert (layer.total / layer.count - values[:, :, :1000].double().mean(2)).abs().max() < 1e-11


def test_each_of_several_new_tokens_has_the_mean_of_what_it_sees() -> None:
    generator = torch.Generator().manual_seed(0)
    layer, mirror = SparqLayer(SparqSettings()), Mirror(2)
    append(layer, mirror, 11, generator, padded=True)
    append(layer, mirror, 5, generator, padded=True)
    means = layer.means(5)
    for i in range(5):
        for b in range(2):
            seen = [v.double() for _, v, valid in mirror.rows[b][: 12 + i] if valid]
            assert (means[b, :, i] - torch.stack(seen).mean(0)).abs().max() < 1e-6


def test_room_doubles_and_is_counted() -> None:
    layer, mirror, generator = SparqLayer(SparqSettings()), Mirror(1), torch.Generator().manual_seed(0)
    rooms = []
    for _ in range(600):
        append(layer, mirror, 1, generator)
        rooms.append(layer.capacity)
    assert sorted(set(rooms)) == [192, 384, 768]
    assert SparqCache([layer]).nbytes == 3 * 768 * HEADS * D * 4
    planned = SparqLayer(None, capacity=1000)
    append(planned, Mirror(1), 3, generator)
    assert planned.capacity == 1024
    assert SparqCache([planned]).nbytes == 2 * 1024 * HEADS * D * 4


def test_reset_leaves_an_empty_cache_of_the_same_settings() -> None:
    layer, generator = SparqLayer(SparqSettings(r=3)), torch.Generator().manual_seed(0)
    append(layer, Mirror(2), 5, generator, padded=True)
    layer.reset()
    assert layer.get_seq_length() == 0
    mirror = Mirror(4)
    append(layer, mirror, 7, generator, padded=True)
    check(layer, mirror)
    assert layer.settings == SparqSettings(r=3)


@pytest.mark.parametrize("wrong", [1, -12])
def test_more_than_there_is_cannot_be_cropped(wrong: int) -> None:
    layer = SparqLayer(SparqSettings())
    append(layer, Mirror(1), 11, torch.Generator())
    with pytest.raises(ValueError, match="from -11 to 0"):
        layer.crop(wrong)


def filled(n: int = 9, rows: int = 1) -> tuple[SparqCache, SparqLayer, Mirror, torch.Generator]:
    layer, mirror, generator = SparqLayer(SparqSettings()), Mirror(rows), torch.Generator().manual_seed(3)
    append(layer, mirror, n, generator)
    return SparqCache([layer]), layer, mirror, generator


def test_branches_share_one_prefix_whatever_becomes_of_their_parent() -> None:
    cache, layer, mirror, generator = filled()
    kept = torch.stack([k for k, _, _ in mirror.rows[0]], 1).clone()
    branches = [cache.branch(3), cache.branch(2)]
    storage = layer.keys.untyped_storage().data_ptr()
    for branch in branches:
        one: Any = branch.layers[0]
        assert one.prefix.keys.untyped_storage().data_ptr() == storage
        assert branch.get_seq_length() == 9
        assert copy.deepcopy(branch).layers[0].prefix is one.prefix
    append(layer, mirror, 4, generator)
    layer.crop(-8)
    mirror.rows = [row[:5] for row in mirror.rows]
    append(layer, mirror, 6, generator)
    check(layer, mirror)
    cache.reset()
    for rows, branch in zip((3, 2), branches, strict=True):
        one = branch.layers[0]
        assert torch.equal(one.prefix.keys[0], kept)
        assert torch.equal(one.prefix.keys_t[0], kept.transpose(-1, -2))
        own = Mirror(rows)
        append(one, own, 3, generator)
        assert branch.get_seq_length() == 12
        total = one.prefix.total + torch.stack([torch.stack([v.double() for _, v, _ in row]).sum(0) for row in own.rows])
        assert (one.means(1)[:, :, 0] - total / 12).abs().max() < 1e-6
        branch.batch_select_indices(torch.tensor([1]))
        assert (one.means(1)[:, :, 0] - (total / 12)[1]).abs().max() < 1e-6
        branch.crop(-3)
        assert (one.means(1)[:, :, 0] - one.prefix.total / 9).abs().max() < 1e-6
        with pytest.raises(ValueError, match="from 0 to 0"):
            branch.crop(-1)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_slots_that_nobody_wrote_never_show(monkeypatch: pytest.MonkeyPatch, shared: bool, kernel: bool) -> None:
    """Some rows long enough to attend sparsely and some not: those are dense, over buffers with room to spare."""
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **kw: new_empty(self, *size, **kw).fill_(float("nan")))
    if not kernel:
        monkeypatch.setattr("mm1.attention.sparq.backend_for", lambda q, name="": None)
    generator = torch.Generator().manual_seed(3)
    cache = SparqCache([SparqLayer(SparqSettings(k=14, r=2, dense_below=1))])
    if shared:
        append(cache.layers[0], None, 9, generator)
        cache = cache.branch(2)
    mask = torch.ones(2, 1, 1, 9 if shared else 0, dtype=torch.bool)
    for n in (6, 1, 1):
        new = torch.ones(2, 1, 1, n, dtype=torch.bool)
        new[0, ..., : n - 1] = False  # one row sees one token of six
        mask = torch.cat([mask, new], -1)
        q, k, v = (torch.randn(2, heads, n, D, generator=generator) for heads in (2 * HEADS, HEADS, HEADS))
        key, value = cache.update(k, v, 0)
        shown = mask.expand(2, 1, n, -1).tril(mask.shape[-1] - n)
        output = sparq_attention(SimpleNamespace(num_key_value_groups=2), q, key, value, shown, scaling=0.5)[0]
        assert output[:, -1].isfinite().all()


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match="branch\\(0\\)"):
        filled()[0].branch(0)
    with pytest.raises(UserError, match=r"one row.* 2 rows"):
        filled(rows=2)[0].branch(2)
    with pytest.raises(UserError, match=r"one row.* no rows"):
        SparqCache([SparqLayer(None)]).branch(2)
    with pytest.raises(UserError, match=r"one row.* a branch"):
        filled()[0].branch(2).branch(2)
    _, layer, _, generator = filled()
    layer.update(*torch.randn(2, 1, HEADS, 2, D, generator=generator))
    layer.settle(torch.tensor([[True] * 9 + [False, True]]))
    with pytest.raises(UserError, match="padding inside"):
        layer.lend()


def test_a_batch_of_another_size_is_refused() -> None:
    _, layer, _, _ = filled(rows=2)
    with pytest.raises(UserError, match="2 rows got a batch of 3"):
        layer.update(*torch.randn(2, 3, HEADS, 1, D))
    with pytest.raises(UserError, match="2 rows got a batch of 3"):
        filled()[0].branch(2).layers[0].update(*torch.randn(2, 3, HEADS, 1, D))
    with pytest.raises(UserError, match="inference"):
        layer.update(*torch.randn(2, 2, HEADS, 1, D, requires_grad=True))


def test_offloading_waits_for_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for it between `update` and the attention."""
    _, layer, _, _ = filled()
    moved: list[Any] = []
    monkeypatch.setattr(layer, "_move", moved.append)
    layer.update(*torch.randn(2, 1, HEADS, 1, D))
    layer.offload()
    assert moved == []
    layer.settle(None)
    layer.attended()
    assert moved == ["cpu"]
    layer.attended()
    assert moved == ["cpu"]


@pytest.mark.parametrize("reordered", [False, True])
def test_what_inference_mode_stored_goes_on_outside_it(reordered: bool) -> None:
    layer, mirror, generator = SparqLayer(SparqSettings()), Mirror(1), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        append(layer, mirror, 3, generator)
        if reordered:
            layer.reorder_cache(torch.tensor([0]))
    append(layer, mirror, 3, generator)
    with torch.inference_mode():
        append(layer, mirror, 3, generator)
    check(layer, mirror)


def test_what_was_worked_out_from_one_mask_is_not_taken_for_another() -> None:
    """Masks of one shape and even of one content: a mask is known by being the same object."""
    latest, masks, made = Latest(), [torch.ones(2, 3), torch.ones(2, 3)], []
    for key in ((masks[0], 1), (masks[0], 1), (masks[1], 1), (masks[1], 2), (None, 2), (None, 2), (masks[0], 1)):
        latest.get(key, lambda: made.append(0))
    assert len(made) == 5
    assert copy.deepcopy(latest).get((None, 2), lambda: "new") == "new"
