"""The GPU's SparQ attention: equal to mm1/attention/sparq.py in Triton's interpreter on a CPU, and compiled for Hopper.

The interpreter must be chosen before Triton is imported, for a whole process. So this file starts itself again, a process for
each of the classes below, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.errors import UserError
from mm1.attention.segments import Segment
from mm1.attention.sparq import SparqSettings, sparq_torch

triton = pytest.importorskip("triton")
interpreter = pytest.importorskip("triton.runtime.interpreter")

from mm1.attention import sparq_plan, sparq_triton  # noqa: E402
from mm1.attention.sparq_plan import Plan, Shape, default_plan, tournament  # noqa: E402

KERNELS = ("score_kernel", "select_kernel", "finish_kernel")
INTERPRETED = sparq_triton.INTERPRETED
Launch = tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


if INTERPRETED and "squeeze" not in inspect.getsource(interpreter._patch_lang_tensor):
    # Triton 3.6's interpreter keeps scalars in arrays of one element, which NumPy from 2.4 on refuses to make an int of.
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
@pytest.mark.parametrize("part", ["TestDecode", "TestSelect", "TestHost"])
def test_in_the_interpreter(part: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", f"{Path(__file__)}::{part}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), "nothing ran"
    assert "skipped" not in done.stdout


def a_step(shape: Shape, extents: list[tuple[int, int]], seed: int = 0) -> tuple[sparq_triton.Step, sparq_triton.Step]:
    """A step with NaN and infinities outside the valid slots, and the same in float64 with zeros there."""
    q, keys, _, values, _, _, _ = sparq_triton.random_step(shape, torch.device("cpu"))
    q = q.roll(seed, -1)
    start, stop = (torch.tensor(ends) for ends in zip(*extents, strict=True))
    slots = torch.arange(shape.capacity)
    valid = ((slots >= start[:, None]) & (slots < stop[:, None]))[:, None, :, None]
    exact = [tensor.double().where(valid, 0.0) for tensor in (keys, values)]
    mean = exact[1].sum(2) / valid.sum(2).clamp(min=1)
    dirty = torch.where(slots % 2 == 0, torch.nan, torch.inf)[:, None].to(shape.dtype)
    keys, values = (torch.where(valid, tensor, dirty) for tensor in (keys, values))
    ours = (q, keys, keys.transpose(2, 3).contiguous(), values, start, stop, mean.float())
    return ours, (q.double(), exact[0], exact[0].transpose(2, 3).contiguous(), exact[1], start, stop, mean)


def reference(step: sparq_triton.Step, wanted: SparqSettings, scale: float | None = None) -> Tensor:
    q, keys, keys_t, values, start, stop, mean = step
    return sparq_torch(q, [Segment(keys, keys_t, values, start, stop)], mean, wanted, scale=scale)


def assert_same(ours: Tensor, exact: Tensor) -> None:
    """Within what rounding inputs of that dtype to it, and weights to it, can do."""
    assert torch.isfinite(ours).all()
    bound = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[ours.dtype]
    assert (ours.double() - exact).abs().max() <= bound * exact.abs().max().clamp(min=1)


class Recorder:
    """In place of a kernel: notes the launch, and hands it on where `kernel` can run."""

    def __init__(self, launches: list[Launch], name: str, kernel: Any, run: bool) -> None:
        self.launches, self.name, self.kernel, self.run = launches, name, kernel, run

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **named: Any) -> None:
            self.launches.append((self.name, grid, arguments, named))
            if self.run:
                self.kernel[grid](*arguments, **named)

        return launch


def recorded(monkeypatch: pytest.MonkeyPatch, run: bool = True) -> list[Launch]:
    launches: list[Launch] = []
    for name in KERNELS:
        monkeypatch.setattr(sparq_triton, name, Recorder(launches, name, getattr(sparq_triton, name), run))
    return launches


def fenced(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Scratch between fences; the result says whether they stand."""
    fences: list[Tensor] = []

    def empty(like: Tensor, *size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        room = torch.full((math.prod(size) + 128,), 77, dtype=dtype)
        fences.extend((room[:64], room[-64:]))
        return room[64:-64].view(size)

    def check() -> None:
        assert fences
        assert all((fence == 77).all() for fence in fences), "written outside of a buffer"

    monkeypatch.setattr(sparq_triton, "_empty", empty)
    return check


def a_shape(d: int, g: int, capacity: int, wanted: SparqSettings, dtype: torch.dtype = torch.float32, batch: int = 1) -> Shape:
    return Shape(batch, g, 1, d, capacity, dtype, wanted)


def a_plan(shape: Shape, shares: int, chunk: int, score_block: int = 32, finish_block: int = 16) -> Plan:
    cut = replace(default_plan(shape, 1), shares=shares, score_block=score_block, finish_block=finish_block)
    return replace(cut, chunk=sparq_plan.chunk_for(shape, chunk))


S = SparqSettings
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CASES = {
    # name: head size, query heads a group, capacity, extents, settings, dtype, shares, chunk
    "one chunk": (64, 4, 100, [(0, 100)], S(16, 20), SINGLE, 1, 128),
    "several chunks and shares": (64, 4, 100, [(0, 100)], S(16, 6, local=2), SINGLE, 4, 16),
    "left padding, two rows": (64, 2, 90, [(0, 90), (41, 77)], S(16, 16), SINGLE, 2, 32),
    "more shares than blocks": (64, 1, 70, [(33, 64)], S(16, 8), SINGLE, 8, 16),
    "head size 80, one query head": (80, 1, 75, [(3, 75)], S(7, 12), BRAIN, 2, 32),
    "head size 128, eight query heads": (128, 8, 60, [(0, 59)], S(32, 16), HALF, 1, 64),
    "logits": (64, 4, 80, [(5, 80)], S(8, 16, group="logits"), SINGLE, 2, 32),
    "logits, no reallocation": (64, 4, 80, [(0, 80)], S(9, 16, group="logits", reallocate=False), BRAIN, 1, 128),
    "no reallocation": (64, 4, 80, [(0, 80)], S(8, 16, reallocate=False), SINGLE, 1, 32),
    "no local window": (64, 2, 70, [(0, 70)], S(8, 12, local=0), SINGLE, 1, 128),
    "local window only": (64, 2, 70, [(2, 69)], S(8, 12, local=12), SINGLE, 1, 32),
    "all components": (64, 2, 70, [(0, 70)], S(500, 12), SINGLE, 1, 128),
    "one component": (80, 2, 70, [(0, 70)], S(1, 12), SINGLE, 1, 128),
    "one token": (64, 2, 70, [(0, 70)], S(8, 1), SINGLE, 1, 32),
    "fewer tokens than k": (64, 4, 70, [(0, 20), (50, 70), (0, 70)], S(16, 32), SINGLE, 2, 128),
    "exactly k, k + 1, none": (64, 2, 50, [(7, 39), (7, 40), (9, 9)], S(16, 32), SINGLE, 1, 64),
    "capacity below k": (64, 4, 24, [(0, 24), (23, 24)], S(16, 32), HALF, 1, 32),
    "dense below 60": (64, 4, 90, [(0, 59), (0, 60)], S(16, 16, dense_below=60), SINGLE, 1, 128),
}


class TestDecode:
    __test__ = INTERPRETED  # collected by test_in_the_interpreter's process only

    @pytest.mark.parametrize("name", CASES)
    def test_equals_pytorch(self, name: str) -> None:
        d, g, capacity, extents, wanted, dtype, shares, chunk = CASES[name]
        shape = a_shape(d, g, capacity, wanted, dtype, len(extents))
        ours, exact = a_step(shape, extents)
        plan = a_plan(shape, shares, chunk)
        assert_same(sparq_triton.sparq_decode_triton(*ours, wanted, plan=plan), reference(exact, wanted))

    def test_key_value_heads_and_default_plan(self) -> None:
        wanted = SparqSettings(16, 16)
        shape = Shape(2, 6, 3, 64, 70, BRAIN, wanted)
        ours, exact = a_step(shape, [(0, 70), (11, 70)])
        assert_same(sparq_triton.sparq_decode_triton(*ours, wanted), reference(exact, wanted))

    def test_scale(self) -> None:
        wanted = SparqSettings(16, 16)
        shape = a_shape(64, 2, 64, wanted)
        ours, exact = a_step(shape, [(0, 64)])
        assert_same(sparq_triton.sparq_decode_triton(*ours, wanted, 0.3), reference(exact, wanted, 0.3))

    def test_a_head_without_the_groups_components(self) -> None:
        """One query head is zero where the group's largest components are, another everywhere."""
        wanted = SparqSettings(8, 16)
        shape = a_shape(64, 3, 64, wanted)
        (q, *ours), (exact_q, *exact) = a_step(shape, [(0, 64)])
        for x in (q, exact_q):
            x[0, 0, :8], x[0, 1, :8], x[0, 2] = 6.0, 0.0, 0.0
        out = sparq_triton.sparq_decode_triton(q, *ours, wanted)
        assert_same(out, reference((exact_q, *exact), wanted))

    def test_equal_components_are_taken_once_each(self) -> None:
        """All weights of the group equal: r different components are read, the first ones."""
        wanted = SparqSettings(8, 16)
        shape = a_shape(64, 1, 64, wanted)
        (q, *ours), (exact_q, *exact) = a_step(shape, [(0, 64)])
        q, exact_q = q.sign(), exact_q.sign()
        q[..., :8] *= 1 + 1e-6  # PyTorch's choice among equals is not stated
        exact_q[..., :8] *= 1 + 1e-6
        assert_same(sparq_triton.sparq_decode_triton(q, *ours, wanted), reference((exact_q, *exact), wanted))
        all_equal = sparq_triton.sparq_decode_triton(q.sign(), *ours, wanted)
        assert_same(all_equal, reference((exact_q, *exact), wanted))

    def test_peaked_scores(self) -> None:
        """Scores whose softmax underflows: one head is ranked by its logits, which differ still."""
        wanted = SparqSettings(16, 16)
        shape = a_shape(64, 1, 96, wanted)
        (q, *ours), (exact_q, *exact) = a_step(shape, [(0, 96)])
        out = sparq_triton.sparq_decode_triton(q * 100, *ours, wanted, plan=a_plan(shape, 2, 32))
        assert_same(out, reference((exact_q * 100, *exact), wanted))

    def test_views_and_shared_caches(self) -> None:
        """Caches longer than the part in use, and one prefix for all rows."""
        wanted = SparqSettings(16, 16)
        shape = a_shape(64, 2, 64, wanted)
        (q, keys, keys_t, values, _, _, mean), exact = a_step(shape, [(4, 64)])
        longer = [
            torch.nn.functional.pad(t, (0, 0, 0, 16), value=torch.nan)[:, :, :64].expand(2, -1, -1, -1) for t in (keys, values)
        ]
        longer_t = torch.nn.functional.pad(keys_t, (0, 16), value=torch.nan)[..., :64].expand(2, -1, -1, -1)
        both = torch.cat([q, -q])
        start, stop = torch.tensor([4, 4]), torch.tensor([64, 64])
        out = sparq_triton.sparq_decode_triton(both, longer[0], longer_t, longer[1], start, stop, mean.repeat(2, 1, 1), wanted)
        for row, sign in ((0, 1), (1, -1)):
            assert_same(out[row : row + 1], reference((exact[0] * sign, *exact[1:]), wanted))

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(st.data())
    def test_any_cut_gives_the_same(self, data: st.DataObject) -> None:
        capacity = data.draw(st.integers(20, 70), "capacity")
        begin = data.draw(st.integers(0, capacity - 1), "begin")
        end = data.draw(st.integers(begin + 1, capacity), "end")
        k = data.draw(st.integers(1, 20), "k")
        group = data.draw(st.sampled_from(["softmax", "logits"]), "group")
        wanted = SparqSettings(data.draw(st.integers(1, 20), "r"), k, local=data.draw(st.integers(0, k), "local"), group=group)
        shape = a_shape(16, data.draw(st.sampled_from([1, 3]), "g"), capacity, wanted)
        ours, exact = a_step(shape, [(begin, end)], seed=data.draw(st.integers(0, 15), "seed"))
        plan = a_plan(
            shape, data.draw(st.sampled_from([1, 2, 4]), "shares"), data.draw(st.sampled_from([16, 32, 128]), "chunk"), 16
        )
        assert_same(sparq_triton.sparq_decode_triton(*ours, wanted, plan=plan), reference(exact, wanted))


def best(scores: list[float], k: int, window: int, begin: int, end: int) -> set[int]:
    """The definition: the latest `window` valid slots, then the largest, the earlier of equals."""
    valid = list(range(begin, end))
    latest = valid[max(0, len(valid) - window) :] if window else []
    others = sorted((s for s in valid if s not in latest), key=lambda s: (-scores[s], s))
    return set(others[: k - window]) | set(latest)


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-40, 3.4e38, -3.4e38, float("inf"), float("-inf")])


class TestSelect:
    __test__ = INTERPRETED  # collected by test_in_the_interpreter's process only

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.data(), st.lists(NUMBERS | st.floats(width=32, allow_nan=False), min_size=1, max_size=70))
    @example(None, [0.5] * 40)
    @example(None, [-0.0, 0.0] * 20)
    @example(None, [1e-45, 0.0, -1e-45] * 12)
    def test_the_definition(self, data: st.DataObject | None, scores: list[float]) -> None:
        def draw(low: int, high: int, otherwise: int) -> int:
            return data.draw(st.integers(low, high)) if data else otherwise

        k = draw(1, 40, 7)
        window = draw(0, k, 2)
        begin = draw(0, len(scores), 1)
        end = draw(begin, len(scores), len(scores) - 1)
        chunk = [None, 16, 32][draw(0, 2, 1)]
        limits = torch.tensor([begin]), torch.tensor([end])
        (found,) = sparq_triton.select(torch.tensor([scores]), k, *limits, window=window, chunk=chunk).tolist()
        taken = [slot for slot in found if slot >= 0]
        assert found == taken + [-1] * (k - len(taken)), "what is missing must come last"
        assert len(taken) == len(set(taken)) == min(k, min(window, end - begin) + max(0, min(k - window, end - begin - window)))
        assert set(taken) == best(scores, k, window, begin, end)

    @pytest.mark.parametrize(("slots", "k", "chunk"), [(1000, 128, None), (1000, 1, None), (3000, 64, 256), (257, 256, None)])
    def test_the_set_of_topk(self, slots: int, k: int, chunk: int | None) -> None:
        scores = torch.randn(2, slots, generator=torch.Generator().manual_seed(k))
        found = sparq_triton.select(scores, k, chunk=chunk)
        assert torch.equal(found.sort().values.long(), scores.topk(k).indices.sort().values)

    def test_scores_that_no_bound_narrows(self) -> None:
        """Every power of two: the search has to go through all the bits; and neighbours in the last one."""
        powers = torch.tensor([[sign * 2.0**n for n in range(-140, 120, 3) for sign in (1, -1)]])
        neighbours = torch.full((1, 64), 1.0).view(torch.int32).add(torch.arange(64, dtype=torch.int32)).view(torch.float32)
        for scores in (powers, neighbours.flip(1), neighbours[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]):
            for k in (1, 5, 33):
                assert set(sparq_triton.select(scores, k)[0].tolist()) == set(scores[0].topk(k).indices.tolist())

    def test_more_rounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Candidates too many for one block are selected from again."""
        monkeypatch.setattr(sparq_triton, "LARGEST_CHUNK", 64)
        launches = recorded(monkeypatch)
        scores = torch.randn(1, 600, generator=torch.Generator().manual_seed(0))
        assert set(sparq_triton.select(scores, 12, chunk=32)[0].tolist()) == set(scores[0].topk(12).indices.tolist())
        assert [grid for _, grid, _, _ in launches] == [(1, 19), (1, 4), (1, 1)]

    def test_nan_is_a_token_too(self) -> None:
        """Of either sign: k different slots all the same, for what would be read at places that nobody wrote?"""
        scores = torch.tensor([[torch.nan, 1.0, -torch.nan, 0.0] * 10])
        scores[:, 2::4] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # every bit set
        for k in (12, 35):
            found = sparq_triton.select(scores, k)[0].tolist()
            assert len(set(found)) == k
            assert set(found) <= set(range(40))

    def test_writes_stay_inside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Many ties at the k-th, one wanted place a tie."""
        check = fenced(monkeypatch)
        for window, chunk in ((0, None), (3, None), (0, 16), (8, 16)):
            sparq_triton.select(torch.zeros(2, 50), 8, window=window, chunk=chunk)
            check()

    @pytest.mark.parametrize(("k", "window"), [(0, 0), (9000, 0), (4, 5), (4, -1)])
    def test_refuses(self, k: int, window: int) -> None:
        with pytest.raises(ValueError, match="k="):
            sparq_triton.select(torch.zeros(1, 20), k, window=window)


class TestHost:
    __test__ = INTERPRETED  # collected by test_in_the_interpreter's process only

    def test_launches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As the module's docstring counts them."""
        launches = recorded(monkeypatch)
        for capacity, chunk, names in ((16, 16, "f"), (64, 64, "scf"[::2]), (64, 32, "slf")):
            shape = a_shape(16, 1, capacity, SparqSettings(4, 16, local=4))
            launches.clear()
            ours, _ = a_step(shape, [(0, capacity)])
            sparq_triton.sparq_decode_triton(*ours, shape.settings, plan=a_plan(shape, 1, chunk))
            assert "".join({"score": "s", "select": "l", "finish": "f"}[name.split("_")[0]] for name, *_ in launches) == names

    def test_a_decode_with_more_rounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sparq_plan, "LARGEST_CHUNK", 32)
        launches = recorded(monkeypatch)
        shape = a_shape(16, 2, 150, SparqSettings(4, 8, local=2))
        ours, exact = a_step(shape, [(3, 150)])
        out = sparq_triton.sparq_decode_triton(*ours, shape.settings, plan=a_plan(shape, 1, 16))
        assert_same(out, reference(exact, shape.settings))
        assert [grid for name, grid, _, _ in launches if name == "select_kernel"] == [(1, 10), (1, 2)]

    def test_scratch_needs_no_zeroing_and_steps_repeat_to_the_bit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shape = a_shape(16, 2, 70, SparqSettings(4, 8))
        ours, _ = a_step(shape, [(3, 69)])
        plan = a_plan(shape, 4, 16)
        clean = sparq_triton.sparq_decode_triton(*ours, shape.settings, plan=plan)

        def dirty(like: Tensor, *size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(size, torch.nan if dtype.is_floating_point else -1, dtype=dtype)

        monkeypatch.setattr(sparq_triton, "_empty", dirty)
        assert torch.equal(clean, sparq_triton.sparq_decode_triton(*ours, shape.settings, plan=plan))

    @pytest.mark.parametrize("name", ["one chunk", "several chunks and shares", "more shares than blocks", "local window only"])
    def test_writes_stay_inside(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        d, g, capacity, extents, wanted, dtype, shares, chunk = CASES[name]
        shape = a_shape(d, g, capacity, wanted, dtype, len(extents))
        (q, *ours), _ = a_step(shape, extents)
        check = fenced(monkeypatch)
        sparq_triton.sparq_decode_triton(torch.zeros_like(q), *ours, wanted, plan=a_plan(shape, shares, chunk))
        check()

    def test_warm_up_keeps_the_fastest_plan_and_decode_uses_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sparq_triton, "_plans", {})
        launches = recorded(monkeypatch, run=False)

        def clock(work: Any) -> float:  # fewest shares and 8 warps for the scores are fastest; a block of 16 does not fit
            launches.clear()
            work()
            _, (_, shares), _, options = launches[0]
            if options["BLOCK"] == 64:
                raise sparq_triton.OutOfResources(1, 0, "shared memory")
            return shares + abs(options["num_warps"] - 8)

        wanted = SparqSettings(4, 8)
        shape = a_shape(16, 2, 500, wanted)
        (plan,) = sparq_triton.warm_up([shape], "cpu", clock).values()
        assert (plan.shares, plan.score_warps) == (1, 8)
        assert plan.score_block != 64
        launches.clear()
        similar = a_shape(16, 2, 400, wanted)
        sparq_triton.sparq_decode_triton(*sparq_triton.random_step(similar, torch.device("cpu")), wanted)
        assert launches[0][1] == (1, 1)
        assert launches[0][3]["num_warps"] == 8

    @pytest.mark.parametrize("name", ["keys", "keys_t", "values", "value_mean", "start"])
    def test_refuses_tensors_it_would_misread(self, name: str) -> None:
        wanted = SparqSettings(4, 8)
        names = ("q", "keys", "keys_t", "values", "start", "stop", "value_mean")
        step = dict(zip(names, sparq_triton.random_step(a_shape(16, 2, 32, wanted), torch.device("cpu")), strict=True))
        step[name] = step[name].half() if name != "keys_t" else step["keys"].transpose(2, 3)
        with pytest.raises(ValueError, match=f"{name}: torch"):
            sparq_triton.sparq_decode_triton(*step.values(), wanted)

    def test_the_benchmark(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Every row of benchmarks/sparq_cuda.py on small shapes, with a clock that stands still."""
        from benchmarks import sparq_cuda

        tuned = []
        monkeypatch.setattr(sparq_triton, "warm_up", lambda shapes, *_: tuned.extend(shapes) or dict.fromkeys(shapes))
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        monkeypatch.setattr(sparq_cuda, "DECODE", {"b2": (2, 4, 2, 64, 8), "mha": (1, 2, 2, 48, 8)})
        monkeypatch.setattr(sparq_cuda, "SELECT", {"select": (3, 100, 7)})
        monkeypatch.setattr(sparq_cuda, "OFFICIAL", {"official": (1, 32, 4)})
        monkeypatch.setattr(sparq_cuda, "HEAD", 16)
        monkeypatch.setattr(sparq_cuda, "HEADS", 2)
        monkeypatch.setattr(sparq_cuda, "R", 4)
        (tmp_path / "inner").mkdir()
        theirs = (
            "def sparq_attn(Q, K1, K2, V, V_mean, k1, k2, gather_matmul):\n    return (Q @ K1.transpose(2, 3)) @ V + V_mean\n"
        )
        (tmp_path / "inner" / "sparq_benchmark.py").write_text(theirs)
        monkeypatch.delitem(sys.modules, "sparq_benchmark", raising=False)

        def clock(work: Any) -> float:
            work()
            return 2.0

        found = list(sparq_cuda.rows(1, official=tmp_path, device="cpu", measure=clock))
        assert [row.case for row in found] == ["b2", "mha", "select", "official"]
        assert [shape.capacity for shape in tuned] == [64, 48, 32]
        assert [row.bytes for row in found] == [
            4 * ((64 * 4 + 2 * 8 * 16) * 2 + 2 * 2 * 16 * 2 + 4 * 16),
            2 * ((48 * 4 + 2 * 8 * 16) * 2 + 1 * 2 * 16 * 2 + 4 * 16),
            4 * 3 * (100 + 7),
            2 * ((32 * 4 + 2 * 4 * 16) * 2 + 1 * 2 * 16 * 2 + 4 * 16),
        ]
        for row in found:
            assert row.unit == "us"
            assert row.ratio == row.peer / row.ours
            assert row.limit == pytest.approx(row.bytes / 3e6)
        errors = capsys.readouterr().err
        for name in ("SDPA flash: ", "SDPA flash, packed: ", "SDPA cudnn: RuntimeError", "flex_attention: ", "torch.topk: "):
            assert name in errors
        with pytest.raises(UserError, match="no sparq_benchmark"):
            list(sparq_cuda.rows(1, ["official"], tmp_path / "inner" / "none", device="cpu", measure=clock))
        with pytest.raises(UserError, match="--official"):
            list(sparq_cuda.rows(1, ["official"], device="cpu", measure=clock))

    def test_refuses_a_k_too_large_to_select(self) -> None:
        wanted = SparqSettings(4, 20000, local=1000)
        ours = sparq_triton.random_step(a_shape(16, 1, 20001, wanted), torch.device("cpu"))
        with pytest.raises(UserError, match=r"sparq\.k=20000"):
            sparq_triton.sparq_decode_triton(*ours, wanted)


# ------------------------------------------------------------------------------------------------- without the interpreter


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("capacity", [1, 17, 4096, 131072, 1 << 20])
@pytest.mark.parametrize("rows", [(1, 8), (64, 32)])
@pytest.mark.parametrize("k", [1, 128, 8000])
@pytest.mark.parametrize(("d", "r", "dtype"), [(128, 32, BRAIN), (256, 128, HALF), (512, 512, SINGLE)])
def test_default_plans_are_possible(
    rows: tuple[int, int], capacity: int, processors: int, k: int, d: int, r: int, dtype: torch.dtype
) -> None:
    """Powers of two, rounds that end in one block, tiles that fit into a block's shared memory (228 KiB on Hopper)."""
    shape = Shape(rows[0], 32, rows[1], d, capacity, dtype, SparqSettings(r, k))
    plan = default_plan(shape, processors)
    cuts = {name: number for name, number in asdict(plan).items() if not name.endswith("stages")}
    assert all(number & (number - 1) == 0 < number for number in cuts.values())
    assert r * plan.score_block * plan.score_stages * dtype.itemsize <= 160 << 10
    assert 2 * d * plan.finish_block * plan.finish_stages * dtype.itemsize <= 160 << 10
    rounds = tournament(shape, plan) if shape.sparse else []
    length = capacity
    for size, chunks in rounds:
        assert size <= sparq_plan.LARGEST_CHUNK
        assert chunks == -(-length // size)
        assert chunks * max(1, shape.picked) < length
        length = chunks * max(1, shape.picked)
    assert not shape.sparse or length <= sparq_plan.LARGEST_CHUNK


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize(("batch", "kv_heads", "capacity", "k"), [(64, 32, 4096, 128), (1, 8, 131072, 256)])
def test_compiled_for_hopper(
    batch: int, kv_heads: int, capacity: int, k: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a CPU can see of a GPU's speed: keys, values, scores go 16 bytes at a time, products to the tensor cores."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sparq_triton, "supports", lambda q: True)
    launches = recorded(monkeypatch, run=False)
    shape = Shape(batch, 32, kv_heads, 128, capacity, BRAIN, SparqSettings(32, k))
    with torch.device("meta"):
        cache = torch.empty(batch, kv_heads, capacity, 128, dtype=BRAIN)
        q, mean = torch.empty(batch, 32, 128, dtype=BRAIN), torch.empty(batch, kv_heads, 128)
        start = torch.empty(batch, dtype=torch.int64)
        keys_t = torch.empty(batch, kv_heads, 128, capacity, dtype=BRAIN)
        sparq_triton.sparq_decode_triton(
            q, cache, keys_t, cache, start, start, mean, shape.settings, plan=default_plan(shape, 132)
        )
    assert len(launches) == (2 if batch == 64 else 3)
    for name, _, arguments, named in launches:
        code = compiled(getattr(sparq_triton, name).kernel, arguments, named)
        if name != "select_kernel":
            assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", code)
            assert "mma.sync" in code
        if name == "score_kernel":
            assert "st.global.v4" in code
            assert "cp.async.ca" not in code  # narrower copies
        else:
            assert "ld.global.v4" in code


def compiled(kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    """PTX of a kernel for the launch's arguments, specialised as Triton does when it launches."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {BRAIN: "*bf16", SINGLE: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = named[name] if name in named else arguments[place]
        if name in named or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        else:
            tensor = isinstance(value, Tensor)
            signature[name] = types[value.dtype] if tensor else "fp32" if isinstance(value, float) else "i32"
            if tensor or (isinstance(value, int) and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
    options = {name: named[name] for name in ("num_warps", "num_stages") if name in named}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
