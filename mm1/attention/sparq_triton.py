"""SparQ attention on a GPU: `sparq_decode` of sparq.py with the Triton kernels of sparq_kernels.py.

What a step costs, per key-value head of each batch row (S valid tokens, g query heads, head size d, b bytes an element):

    launches   2 where a chunk (sparq_plan.Plan) holds the capacity, 3 up to chunk * 16,384 / (k - local) tokens, 1 if dense
    memory     S r b  components  +  2 k d b  keys and values  +  g d (2 + blocks' share) b  q and output  +  4 d  mean value
    scratch    4 g S written and read: logits, float32; 16 k a chunk: candidates; up to 32 g k: logits gathered for alpha.
               In the L2 cache where it fits, else in memory

No result is waited for, no buffer has to be zeroed, lengths are read on the device: a call can be captured into a CUDA graph and
replayed with other lengths, as long as the capacity stays. Like any kernel it must have run once before the capture. `warm_up`
does that and chooses plans by the clock; without it the default plan is used. Nothing is ever tuned during a call.

Rows that would leave no token out (k >= S), and those below `dense_below`, attend to all their tokens in the last kernel, one
block a row; where the whole capacity is that small, the other kernels are not launched. It is dense attention, but not to the bit
PyTorch's.

Triton 3.6 to 3.9; on a CPU in Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported), for tests. How fast it is on a
GPU is not yet measured: `python -m benchmarks.sparq --device cuda --json` will.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mm1.attention.sparq import SparqSettings
from mm1.attention.sparq_kernels import finish_kernel, score_kernel, select_kernel
from mm1.attention.sparq_plan import (
    LARGEST_CHUNK,
    Plan,
    Shape,
    default_plan,
    groups_for,
    power_of_2,
    tournament,
    variations,
    varied,
    warps_for,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LARGEST_HEAD = 512
LOG2_E = 1.4426950408889634
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # q, keys, keys_t, values, start, stop, value_mean
_plans: dict[tuple[object, ...], Plan] = {}


def supports(q: Tensor) -> bool:
    """Whether the kernels take q's dtype and head size on its device."""
    return q.dtype in _TYPES and q.shape[-1] <= LARGEST_HEAD and (q.is_cuda or (INTERPRETED and q.device.type == "cpu"))


def load() -> None:
    """Nothing to build: Triton compiles a kernel when a shape first asks for it (`warm_up` does so beforehand)."""


def sparq_decode_triton(
    q: Tensor,
    keys: Tensor,
    keys_t: Tensor,
    values: Tensor,
    start: Tensor,
    stop: Tensor,
    value_mean: Tensor,
    settings: SparqSettings,
    scale: float | None = None,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """`sparq.sparq_decode` with the kernels: arguments, result and guarantees as there, for one dtype of `supports`.

    The caches may be views, and shared over the batch (`expand`), with a dense last dimension. Loads have their full width where
    the capacity is a multiple of 16. plan: default `warm_up`'s for such a shape, or `default_plan`. Raises ValueError for tensors
    that break these conditions, UserError for a k too large to select.
    """
    shape = _shape(q, keys, keys_t, values, start, stop, value_mean, settings)
    plan = plan or _plans.get(shape.shape_class()) or default_plan(shape, _processors(q.device))
    g, d, rows, picked = shape.group, shape.head_size, shape.rows, shape.picked
    unit = (d**-0.5 if scale is None else scale) * LOG2_E  # softmaxes are powers of two
    sizes = {"KV_HEADS": shape.kv_heads, "G": g}
    tile = {"G_PAD": power_of_2(g, 16), "D": d, "D_PAD": power_of_2(d, 16), "DOT": tl.float32 if INTERPRETED else _TYPES[q.dtype]}
    softmax, up_to = settings.group == "softmax", settings.dense_up_to
    q_strides = (q.stride(0), q.stride(1))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)

    logits = maxima = sums = ranked = indices = chosen = value_mean  # never read: no row can be sparse
    shares = length = ranked_length = 1
    rounds: list[tuple[int, int]] = []
    if shape.sparse:
        rounds = tournament(shape, plan)
        shares, length = plan.shares, -(-shape.capacity // 16) * 16
        logits = _empty(q, rows, g, length, dtype=torch.float32)
        maxima, sums = _empty(q, 2, rows, g, shares, dtype=torch.float32)
        chosen = _empty(q, rows, max(1, picked))
        r = min(settings.r, d)
        score_kernel[(rows, shares)](
            q, keys_t, start, stop, logits, maxima, sums, unit,
            keys_t.stride(0), keys_t.stride(1), keys_t.stride(2), *q_strides, shape.capacity, length, up_to,
            **sizes, **tile, R=r, R_PAD=power_of_2(r, 16), SHARES=shares, BLOCK=plan.score_block,
            num_warps=plan.score_warps, num_stages=plan.score_stages,
        )  # fmt: skip
        ranked, ranked_length, from_logits = logits, length, True
        for size, chunks in rounds:
            wanted = max(1, picked)
            kept, found = _empty(q, 2, rows, chunks * wanted)
            select_kernel[(rows, chunks)](
                ranked, maxima, sums, kept if from_logits else indices, start, stop, kept, found, ranked_length, wanted,
                settings.window, up_to, **sizes, SHARES=shares, N=size, GROUPS=groups_for(wanted, size), SOFTMAX=softmax,
                FROM_LOGITS=from_logits, LATEST=False, num_warps=warps_for(size, plan.select_warps),
            )  # fmt: skip
            ranked, indices, ranked_length, from_logits = kept, found, chunks * wanted, False
    last = power_of_2(ranked_length, 16)
    finish_kernel[(rows,)](
        q, keys, values, logits, maxima, sums, ranked, indices, chosen, start, stop, value_mean, out, unit,
        *keys.stride()[:3], *values.stride()[:3], *q_strides, length, ranked_length, settings.k, settings.window, up_to,
        **sizes, **tile, SHARES=shares, N=last, GROUPS=groups_for(picked, last), SOFTMAX=softmax, FROM_LOGITS=not rounds,
        REALLOCATE=settings.reallocate, SPARSE=shape.sparse, BLOCK=plan.finish_block,
        num_warps=warps_for(last, plan.finish_warps), num_stages=plan.finish_stages,
    )  # fmt: skip
    return out


sparq_decode = sparq_decode_triton  # the name under which sparq.py looks for it


def select(
    scores: Tensor, k: int, start: Tensor | None = None, stop: Tensor | None = None, *, window: int = 0, chunk: int | None = None
) -> Tensor:
    """The k best slots of each row, unsorted, ties to the earlier: int32 (rows, k), -1 behind where a row has fewer.

    scores float32 (rows, S); valid are the slots start <= s < stop (int64 (rows,); default: all), the latest `window` of them are
    always taken and count among the k. Launches: 1 up to 16,384 slots, else 2 (up to 134 million at k = 2). chunk: slots a block
    selects from. Raises ValueError for a k outside 1 to 8,192 or a window outside 0 to k.
    """
    rows, slots = scores.shape
    if scores.dtype != torch.float32 or scores.stride(1) != 1 or scores.stride(0) != slots:
        raise ValueError(f"scores: {scores.dtype} with strides {scores.stride()}; give contiguous float32.")
    if not 1 <= k <= LARGEST_CHUNK // 2 or not 0 <= window <= k:
        raise ValueError(f"k={k}, window={window}: give 1 <= k <= {LARGEST_CHUNK // 2} and 0 <= window <= k.")
    start = torch.zeros(rows, dtype=torch.int64, device=scores.device) if start is None else start
    stop = torch.full((rows,), slots, dtype=torch.int64, device=scores.device) if stop is None else stop
    wanted = max(1, k - window)
    size = max(power_of_2(2 * wanted, 16), chunk or min(LARGEST_CHUNK, power_of_2(slots, 16)))
    ranked, indices, length, from_logits = scores, scores, slots, True
    while True:
        last = length <= size
        chunks, picked = (1, k - window) if last else (-(-length // size), wanted)
        width = k if last else picked
        kept, found = _empty(scores, 2, rows, chunks * width)
        n = power_of_2(length, 16) if last else size
        select_kernel[(rows, chunks)](
            ranked, ranked, ranked, indices, start, stop, kept, found, length, picked, window, -1,
            KV_HEADS=1, G=1, SHARES=1, N=n, GROUPS=groups_for(picked, n), SOFTMAX=False, FROM_LOGITS=from_logits, LATEST=last,
            num_warps=warps_for(n, 4),
        )  # fmt: skip
        if last:
            return found
        ranked, indices, length, from_logits, size = kept, found, chunks * width, False, LARGEST_CHUNK


def warm_up(
    shapes: Iterable[Shape], device: torch.device | str = "cuda", measure: Callable[[Callable[[], object]], float] | None = None
) -> dict[Shape, Plan]:
    """Compiles the kernels for each shape and keeps the plan that is fastest with full caches, for all shapes of its class.

    One field of the plan after the other is varied (sparq_plan.variations) and the best value kept: some 25 plans a shape,
    mostly compilation. To be called before a CUDA graph is captured. measure: microseconds of a function (`cold_time`).
    """
    measure = measure or cold_time
    chosen = {}
    for shape in shapes:
        tensors = random_step(shape, torch.device(device))
        best = default_plan(shape, _processors(torch.device(device)))

        def timed(plan: Plan, tensors: Step = tensors, settings: SparqSettings = shape.settings) -> float:
            try:
                return measure(lambda: sparq_decode_triton(*tensors, settings, plan=plan))
            except OutOfResources:  # more shared memory or registers than a block has
                return float("inf")

        time = timed(best)
        for field, values in variations(best, shape):
            for value in values:
                plan = varied(best, field, value)
                if plan != best and (other := timed(plan)) < time:
                    best, time = plan, other
        _plans[shape.shape_class()] = chosen[shape] = best
    return chosen


def random_step(shape: Shape, device: torch.device) -> Step:
    """q, keys, keys_t, values, start, stop, value_mean of a step with full caches: standard normal numbers, seed 0."""
    generator = torch.Generator(device).manual_seed(0)
    cache = (shape.batch, shape.kv_heads, shape.capacity, shape.head_size)
    make = functools.partial(torch.randn, generator=generator, dtype=shape.dtype, device=device)
    q, keys, values = make((shape.batch, shape.heads, shape.head_size)), make(cache), make(cache)
    start = torch.zeros(shape.batch, dtype=torch.int64, device=device)
    stop = torch.full_like(start, shape.capacity)
    return q, keys, keys.transpose(2, 3).contiguous(), values, start, stop, values.mean(2, dtype=torch.float32)


def cold_time(work: Callable[[], object], repeats: int = 5, calls: int = 20) -> float:
    """Microseconds of one call in a CUDA graph that finds nothing of its data in the L2 cache: median of `repeats`.

    One graph holds `calls` times (flush, work), another only the flushes; the difference is counted. The flush reads four times
    the cache's size, so that it leaves no lines to be written back.
    """
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    dirt = torch.zeros(cache, dtype=torch.float32, device="cuda")  # 4 bytes each

    def graph(*steps: Callable[[], object]) -> torch.cuda.CUDAGraph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(calls):
                for step in steps:
                    step()
        return captured

    def once(captured: torch.cuda.CUDAGraph) -> float:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        captured.replay()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1000 / calls

    work()
    dirt.sum()
    both, alone = graph(dirt.sum, work), graph(dirt.sum)
    once(both), once(alone)
    times = sorted(once(both) - once(alone) for _ in range(repeats))
    return times[len(times) // 2]


def _shape(
    q: Tensor, keys: Tensor, keys_t: Tensor, values: Tensor, start: Tensor, stop: Tensor, mean: Tensor, settings: SparqSettings
) -> Shape:
    """Raises ValueError for tensors that the kernels would misread."""
    batch, heads, d = q.shape
    kv_heads, capacity = keys.shape[1:3]
    wanted = {
        "keys": (keys, (batch, kv_heads, capacity, d), q.dtype),
        "keys_t": (keys_t, (batch, kv_heads, d, capacity), q.dtype),
        "values": (values, (batch, kv_heads, capacity, d), q.dtype),
        "value_mean": (mean, (batch, kv_heads, d), torch.float32),
        "start": (start, (batch,), torch.int64),
        "stop": (stop, (batch,), torch.int64),
        "q": (q, (batch, heads, d), q.dtype),
    }
    for name, (tensor, size, dtype) in wanted.items():
        if tensor.shape != size or tensor.dtype != dtype or (tensor.numel() and tensor.stride(-1) != 1):
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}; "
                f"the kernels take {dtype} {size} with a dense last dimension."
            )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key-value heads evenly.")
    if not supports(q):
        raise ValueError(f"q: {q.dtype}, head size {d}, on {q.device}: the kernels cannot work on that (see `supports`).")
    if d * keys_t.stride(2) >= 2**31 or (heads // kv_heads) * (capacity + 16) >= 2**31:
        raise ValueError(f"a capacity of {capacity} tokens: places within a head no longer fit into 32 bits.")
    return Shape(batch, heads, kv_heads, d, capacity, q.dtype, settings)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _empty(like: Tensor, *size: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(size, dtype=dtype, device=like.device)
