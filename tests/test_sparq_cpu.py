"""sparq_cpu.cpp computes what sparq.py defines, on every instruction set, layout and number of threads, and gives way to it."""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipelines import native
from mm1.attention import sparq, sparq_cpu
from mm1.attention.sparq import Segment, SparqSettings, dense_decode, sparq_torch

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS[".cpp"])), reason="no C++ compiler")
WAYS = [(), ("-DPORTABLE",)] + ([("-mno-avx512f",)] if platform.machine() == "x86_64" else [])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}
"""Of outputs of about 1: float32 sums in another order; one unit of bfloat16's last place between 2 and 4."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("build")


@pytest.fixture(autouse=True)
def compiled_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of this module's tests are compiled into one folder; a test that builds its own empties the list."""
    if any(map(shutil.which, native.COMPILERS[".cpp"])):
        folder = request.getfixturevalue("built")
        monkeypatch.setattr(sparq_cpu, "_loaded", [sparq_cpu.Kernel(sparq_cpu.build(folder))])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def step(
    rows: int, kv_heads: int, group: int, d: int, lengths: list[int], dtype: torch.dtype, seed: int, *, slots: int = 0
) -> dict[str, Any]:
    """A step over caches with NaN and infinities outside the valid slots. No two components of a query are of one size."""
    generator = torch.Generator().manual_seed(seed)
    stop = torch.randint(0, 9, (rows,), generator=generator) + torch.tensor(lengths)
    start = stop - torch.tensor(lengths)
    slots = max(slots, int(stop.max()) + 3)
    keys, values = torch.randn(2, rows, kv_heads, slots, d, generator=generator).to(dtype)
    for row in range(rows):
        for layer, junk in ((keys, float("nan")), (values, float("inf"))):
            layer[row, :, : start[row]] = junk
            layer[row, :, stop[row] :] = -junk
    sizes = torch.rand(rows * kv_heads, group * d, generator=generator).argsort(-1) + 1.0  # whole numbers: their sums are exact
    signs = torch.randint(0, 2, (rows, kv_heads * group, d), generator=generator) * 2 - 1
    q = (
        signs * sizes.view(rows, kv_heads * group, d) / 256 if group * d <= 256 else torch.randn(signs.shape, generator=generator)
    ).to(dtype)
    mean = torch.stack([values[row, :, start[row] : stop[row]].float().mean(1) for row in range(rows)])
    return {
        "q": q, "keys": keys, "keys_t": keys.transpose(2, 3).contiguous(), "values": values, "start": start, "stop": stop,
        "value_mean": mean,
    }  # fmt: skip


def by_torch(case: dict[str, Any], settings: SparqSettings, scale: float | None = None) -> Tensor:
    segment = Segment(*(case[name] for name in ("keys", "keys_t", "values", "start", "stop")))
    return sparq_torch(case["q"], [segment], case["value_mean"], replace(settings, dense_below=0), scale=scale)


def is_clear_cut(case: dict[str, Any], settings: SparqSettings) -> bool:
    """Whether no two tokens or components at the edge of the choice are so near that rounding may swap them (in float64)."""
    for row, (first, end) in enumerate(zip(case["start"].tolist(), case["stop"].tolist(), strict=True)):
        if end - first <= settings.k:
            continue
        q = case["q"][row].double().view(case["keys"].shape[1], -1, case["q"].shape[-1])
        sizes, order = q.abs().sum(1).sort(-1, descending=True)
        r = min(settings.r, q.shape[-1])
        if r < q.shape[-1] and ((sizes[:, r - 1] - sizes[:, r]) < 1e-6 * sizes[:, r]).any():
            return False
        chosen = torch.zeros_like(q).scatter(2, order[:, None, :r].expand(-1, q.shape[1], -1), 1) * q
        part = chosen.abs().sum(-1, keepdim=True) / q.abs().sum(-1, keepdim=True)
        logits = chosen @ case["keys_t"][row, :, :, first:end].double() / (q.shape[-1] * part.clamp(min=1e-30)).sqrt()
        rank = (logits.softmax(-1) if settings.group == "softmax" else logits).sum(1)[:, : end - first - settings.window]
        best = rank.sort(-1, descending=True).values
        edge = settings.k - settings.window
        if edge and ((best[:, edge - 1] - best[:, edge]) < 2e-5 * best.abs().amax(-1) * (settings.group == "logits")).any():
            return False
        if edge and ((best[:, edge - 1] - best[:, edge]) < 2e-5 * best[:, edge].abs()).any():
            return False
    return True


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], SparqSettings]:
    rows = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 60) | st.integers(61, 3000), min_size=rows, max_size=rows))
    d = draw(st.sampled_from([64, 80, 96, 128, 256, 20, 7]))
    k = draw(st.integers(1, 40) | st.integers(41, 400))
    settings = SparqSettings(
        r=draw(st.integers(2, 48) | st.just(d)), k=k, local=draw(st.none() | st.integers(0, k)), reallocate=draw(st.booleans()),
        group=draw(st.sampled_from(sparq.GROUPS)), dense_below=0,
    )  # fmt: skip
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    heads = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    return step(rows, *heads, d, lengths, dtype, draw(st.integers(0, 2**31))), settings


@needs_compiler
@pytest.mark.parametrize("flags", WAYS)
def test_equals_the_method_in_torch(flags: tuple[str, ...], built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparq_cpu, "_loaded", [sparq_cpu.Kernel(sparq_cpu.build(built, *flags))])

    @hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
    @given(cases())
    def equal(drawn: tuple[dict[str, Any], SparqSettings]) -> None:
        case, settings = drawn
        assume(is_clear_cut(case, settings))
        mine = sparq_cpu.sparq_decode(**case, settings=settings)
        expected = by_torch(case, settings)
        assert mine.dtype == expected.dtype
        assert mine.shape == expected.shape
        assert mine.isfinite().all()
        error = (mine.float() - expected.float()).abs() / expected.float().abs().clamp(min=1)
        assert error.max() <= TOLERANCE[mine.dtype]

    equal()


def decode(case: dict[str, Any], settings: SparqSettings, scale: float | None = None) -> Tensor:
    return sparq_cpu.sparq_decode(**case, settings=settings, scale=scale)


SPARSE = SparqSettings(r=12, k=40, dense_below=0)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@needs_compiler
@BOTH
@pytest.mark.parametrize(("rows", "kv_heads", "lengths"), [(1, 1, [70000]), (1, 3, [40000]), (3, 3, [900, 41, 20000])])
@pytest.mark.parametrize("group", sparq.GROUPS)
def test_the_number_of_threads_changes_no_bit(
    group: str, rows: int, kv_heads: int, lengths: list[int], dtype: torch.dtype, threads: None
) -> None:
    """Units are whole for one thread, partly or all split over blocks for several."""
    case = step(rows, kv_heads, 4, 64, lengths, dtype, 3)
    results = []
    for number in (1, 2, 3, 5, 2, 2):
        torch.set_num_threads(number)
        results.append(decode(case, replace(SPARSE, group=group)))
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert not torch.equal(results[0], dense_decode(*(case[name] for name in ("q", "keys", "values", "start", "stop"))))


@needs_compiler
@BOTH
def test_views_of_a_larger_cache_are_read_where_they_lie(dtype: torch.dtype) -> None:
    """Other strides, every row of a shared prefix in one memory, a base address off any boundary: the same bits."""
    case = step(2, 2, 3, 64, [700, 333], dtype, 5)
    expected = decode(case, SPARSE)
    views = dict(case)
    for name in ("keys", "values", "keys_t"):
        shape = case[name].shape
        larger = torch.full((shape[1] + 1, shape[0] + 1, shape[2] + 3, shape[3] + 5), float("nan"), dtype=dtype)
        views[name] = larger[1:, 1:, 2:-1, 3:-2].transpose(0, 1)
        views[name].copy_(case[name])
    views["q"] = torch.stack([case["q"], case["q"]], 2)[:, :, 1]
    views["value_mean"] = torch.stack([case["value_mean"], case["value_mean"]], 3)[..., 1]
    views["start"] = torch.stack([case["start"], case["start"]], 1)[:, 0]
    assert torch.equal(decode(views, SPARSE), expected)
    one = {name: tensor[:1] for name, tensor in case.items()}
    shared = {name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in one.items()}
    assert torch.equal(decode(shared, SPARSE), decode(one, SPARSE).expand(2, -1, -1))
    columns = {**case, "values": case["values"].transpose(2, 3).contiguous().transpose(2, 3)}
    torch.testing.assert_close(decode(columns, SPARSE), expected, rtol=0, atol=TOLERANCE[dtype])


@needs_compiler
@pytest.mark.parametrize("group", sparq.GROUPS)
def test_bfloat16_is_float32_arithmetic_rounded_once(group: str) -> None:
    """And with most tokens chosen, so that also those of negative logits rank in order."""
    case = step(2, 2, 4, 64, [2000, 61], torch.bfloat16, 4)
    settings = replace(SPARSE, group=group, local=0)
    wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in case.items()}
    assert torch.equal(decode(case, settings), decode(wide, settings).bfloat16())
    assert is_clear_cut(wide, settings)
    torch.testing.assert_close(decode(wide, settings), by_torch(wide, settings), rtol=1e-5, atol=1e-5)


@needs_compiler
@BOTH
def test_short_rows_are_dense_to_the_bit(dtype: torch.dtype) -> None:
    lengths = [39, 40, 41, 99, 100, 0]
    case = step(len(lengths), 2, 4, 64, lengths, dtype, 8)
    dense = dense_decode(*(case[name] for name in ("q", "keys", "values", "start", "stop")))

    def dense_rows(settings: SparqSettings) -> list[bool]:
        return [torch.equal(one, other) for one, other in zip(decode(case, settings), dense, strict=True)]

    assert dense_rows(SPARSE) == [True, True, False, False, False, True]
    assert dense_rows(replace(SPARSE, dense_below=100)) == [True, True, True, True, False, True]
    assert dense_rows(replace(SPARSE, dense_below=101)) == [True] * 6
    assert dense_rows(replace(SPARSE, dense_below=None)) == [True] * 6
    assert sparq_cpu.DENSE_BELOW[dtype] > 101
    assert dense[5].eq(0).all()


@needs_compiler
@BOTH
def test_ties_go_to_the_first_tokens(dtype: torch.dtype) -> None:
    """All keys equal: every rank is the same, in every block."""
    case = step(1, 1, 2, 64, [3000], dtype, 9)
    case["keys"][:] = 1
    case["keys_t"][:] = 1
    chosen = torch.cat([torch.arange(30), torch.arange(2990, 3000)]) + case["start"]
    output = decode(case, replace(SPARSE, local=10, reallocate=False))
    expected = case["values"][:, 0, chosen].float().mean(1).expand(1, 2, -1)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=TOLERANCE[dtype])


@needs_compiler
@pytest.mark.parametrize("group", sparq.GROUPS)
def test_extreme_scores(group: str) -> None:
    """Logits in the thousands, whose softmax is one token; a scale of one's own; heads without any or all of their components."""
    case = step(1, 2, 3, 64, [1500], torch.float32, 11)
    case["q"] = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(2))
    case["q"][0, 1, case["q"][0, 2].abs() > 0.5] = 0
    case["q"][0, 2] *= 20  # its components are the group's, and none of them is head 1's
    settings = replace(SPARSE, group=group, local=0)
    assert is_clear_cut(case, settings)
    for factor, scale, r in ((1.0, None, 12), (1.0, 0.1, 12), (100.0, None, 64)):  # at 100, only with r = d do ties not matter
        scaled, settings = {**case, "q": case["q"] * factor}, replace(settings, r=r)
        torch.testing.assert_close(decode(scaled, settings, scale), by_torch(scaled, settings, scale), rtol=2e-4, atol=2e-4)
    nothing = {**case, "q": case["q"] * 0}  # all ranks equal
    means = [values[:40].mean(0) for values in case["values"][0, :, case["start"][0] :]]
    mixed = 40 / 1500 * torch.stack(means) + 1460 / 1500 * case["value_mean"][0]
    torch.testing.assert_close(decode(nothing, settings)[0], mixed.repeat_interleave(3, 0), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_broken_numbers_inside_end_nothing() -> None:
    """NaN and infinities among the valid tokens give what they give, and no crash."""
    for seed, junk in enumerate((float("nan"), float("inf"), -float("inf"))):
        case = step(2, 2, 4, 64, [2000, 900], torch.float32, seed)
        for name in ("q", "keys_t", "keys"):
            broken = {**case, name: case[name].clone()}
            broken[name].view(-1)[::7] = junk
            for group in sparq.GROUPS:
                assert decode(broken, replace(SPARSE, group=group)).shape == case["q"].shape


@needs_compiler
def test_reads_and_writes_nothing_else(built: Path) -> None:
    """Keys and values end where readable memory ends: a load behind them would be a segmentation fault."""
    program = f"""
import ctypes, mmap, pathlib, torch
from mm1.attention import sparq_cpu
from mm1.attention.sparq import SparqSettings
sparq_cpu._loaded.append(sparq_cpu.Kernel(pathlib.Path({str(sparq_cpu.build(built))!r})))
protect = ctypes.CDLL(None).mprotect
protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept = []
def at_the_end(tensor):
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    room = -(-size // page) * page
    memory = torch.frombuffer(mmap.mmap(-1, room + page), dtype=torch.uint8)
    kept.append(memory)
    assert protect(memory.data_ptr() + room, page, 0) == 0
    return memory[room - size : room].view(tensor.dtype).view(tensor.shape).copy_(tensor)
for d, slots in ((64, 1037), (7, 45)):
    for dtype in (torch.float32, torch.bfloat16):
        keys, values = torch.randn(2, 1, 2, slots, d).to(dtype)
        start, stop = torch.tensor([0]), torch.tensor([slots])
        layers = (torch.randn(1, 6, d).to(dtype), keys, keys.transpose(2, 3).contiguous(), values)
        q, keys, keys_t, values = map(at_the_end, layers)
        mean = at_the_end(values.float().mean(2))
        settings = SparqSettings(r=d, k=40, dense_below=0)
        assert sparq_cpu.sparq_decode(q, keys, keys_t, values, start, stop, mean, settings).isfinite().all()
        assert sparq_cpu.dense_decode(q, keys, values, start, stop).isfinite().all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize(
    ("fault", "reason"), [("no compiler", "no C++ compiler found"), pytest.param("not C++", "failed: ", marks=needs_compiler)]
)
def test_torch_takes_over(
    fault: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sparq_cpu, "_loaded", [])
    monkeypatch.setenv("MM1_HOME", str(tmp_path / "home"))
    if fault == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        broken = tmp_path / "sparq_cpu.cpp"
        broken.write_text("int main( {")
        monkeypatch.setattr(sparq_cpu, "SOURCE", broken)
    sparq._ready.cache_clear()
    case = step(1, 2, 3, 64, [600], torch.float32, 1)
    try:
        assert not sparq_cpu.available()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert torch.equal(sparq.sparq_decode(**case, settings=SPARSE), by_torch(case, SPARSE))
    finally:
        sparq._ready.cache_clear()
    (message,) = caplog.messages
    assert reason in message


@needs_compiler
def test_it_is_what_decodes_on_a_cpu() -> None:
    assert sparq_cpu.available()
    for dtype in (torch.float32, torch.bfloat16):
        case = step(1, 2, 3, 64, [600], dtype, 1)
        assert torch.equal(sparq.sparq_decode(**case, settings=SPARSE), decode(case, SPARSE))
    assert not sparq_cpu.supports(case["q"].half())
    assert not sparq_cpu.supports(case["q"].requires_grad_())


@needs_compiler
@BOTH
@pytest.mark.parametrize("flags", WAYS)
def test_its_dense_attention(flags: tuple[str, ...], dtype: torch.dtype, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparq_cpu, "_loaded", [sparq_cpu.Kernel(sparq_cpu.build(built, *flags))])
    for group, d, lengths in ((1, 64, [1]), (4, 128, [300, 0, 17]), (7, 80, [1100]), (3, 20, [5, 64])):
        case = step(len(lengths), 2, group, d, lengths, dtype, d)
        del case["keys_t"], case["value_mean"]
        for scale in (None, 0.2):
            expected = dense_decode(
                *(case[name].double() if case[name].is_floating_point() else case[name] for name in case), scale=scale
            )
            mine = sparq_cpu.dense_decode(**case, scale=scale)
            assert mine.dtype == dtype
            torch.testing.assert_close(mine.double(), expected, rtol=TOLERANCE[dtype] / 2, atol=TOLERANCE[dtype] / 2)
            columns = case | {name: case[name].transpose(2, 3).contiguous().transpose(2, 3) for name in ("keys", "values")}
            assert torch.equal(sparq_cpu.dense_decode(**columns, scale=scale), mine)
