"""SparQ attention on a GPU beside dense attention, torch.topk and the authors' kernels.

    python -m benchmarks.sparq_cuda --json      (`python -m benchmarks.sparq --device cuda --json` gives the same rows)

    b64_h32_kv32_s4096      a decoding step in bfloat16, d 128, r 32; batch, query heads, key-value heads, tokens
    select_...              the selection alone, float32 scores: rows, tokens, k
    official_b64_s4096      the authors' Triton kernels on the same float16 tensors, 32 heads each with its own keys: with
                            --official DIR, a checkout of the branch `benchmarks` of graphcore-research/llm-inference-research

`ours` and `peer` are microseconds a call, `ratio` is peer / ours, `bytes` what a call must read and write at least, `limit` the
microseconds these take at 3.0 TB/s, which an H100 reaches. Every call, ours and the peers', is timed in a CUDA graph that finds
the L2 cache cold (mm1.attention.sparq_triton.cold_time). The dense peer is the fastest of SDPA's backends, with enable_gqa and
with the group packed as query rows, flex_attention compiled, and FlashInfer where it is installed; standard error says what each
took and which could not run. Ours is tuned first (`warm_up`: a minute or two a case; --untuned leaves the default plan), and its
results are compared with PyTorch's before anything is timed.

Not yet measured on a GPU. The aims on an H100: 4.5, 6, 4 and 4 in the first four cases, 5 in the selection, and against the
authors' kernels 2 at batch 64 and 10 at batch 1.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.report import Row, print_rows
from configs.errors import UserError
from mm1.attention.segments import Segment
from mm1.attention.sparq import SparqSettings, sparq_torch
from mm1.attention.sparq_plan import Shape

BANDWIDTH = 3.0e12  # bytes a second
HEAD, R = 128, 32
Measure = Callable[[Callable[[], object]], float]
# name: batch, query heads, key-value heads, tokens, k
DECODE = {
    "b64_h32_kv32_s4096": (64, 32, 32, 4096, 128),
    "b64_h32_kv32_s16384": (64, 32, 32, 16384, 128),
    "b8_h32_kv8_s16384": (8, 32, 8, 16384, 256),
    "b1_h32_kv8_s131072": (1, 32, 8, 131072, 256),
}
# name: rows, tokens, k
SELECT = {
    "select_2048_s4096_k128": (2048, 4096, 128),
    "select_64_s16384_k256": (64, 16384, 256),
    "select_8_s131072_k256": (8, 131072, 256),
}
HEADS = 32  # of the official_* cases
# name: batch, tokens, k
OFFICIAL = {"official_b64_s4096": (64, 4096, 128), "official_b1_s4096": (1, 4096, 128), "official_b1_s8192": (1, 8192, 128)}


@dataclass
class TimedRow(Row):
    """ours and peer in microseconds (lower is better), ratio = peer / ours; bytes: what a call must move at least."""

    bytes: int


def rows(
    repeats: int,
    cases: Collection[str] | None = None,
    official: Path | None = None,
    *,
    tune: bool = True,
    device: str = "cuda",
    measure: Measure | None = None,
) -> Iterator[TimedRow]:
    """The cases of the module's docstring, or those named in `cases`, as they come. official: the checkout for official_*, which
    are left out without it. device, measure (microseconds of a function): for tests. Raises UserError without a GPU."""
    from mm1.attention import sparq_triton

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("benchmarks.sparq --device cuda: torch sees no GPU here.")
    measure = measure or functools.partial(sparq_triton.cold_time, repeats=repeats)
    place = torch.device(device)
    wanted = [name for name in (*DECODE, *SELECT, *OFFICIAL) if cases is None or name in cases]
    for name in wanted:
        if name in DECODE:
            yield decode_row(name, place, measure, tune)
        elif name in SELECT:
            yield select_row(name, place, measure)
        elif official is not None:
            yield official_row(name, official, place, measure, tune)
        elif cases is not None:
            raise UserError(f"{name}: give --official, a checkout of the branch `benchmarks` of their repository.")


def least_bytes(shape: Shape) -> int:
    """What a step moves at least: r components of every key, k keys and values, q twice (components, attention), output, mean."""
    s, d, size = shape.settings, shape.head_size, shape.dtype.itemsize
    r = min(s.r, d)
    a_row = (shape.capacity * r + 2 * s.k * d) * size + shape.group * 2 * d * size + 4 * d
    return shape.rows * a_row


def decode_row(name: str, device: torch.device, measure: Measure, tune: bool) -> TimedRow:
    batch, heads, kv_heads, tokens, k = DECODE[name]
    shape = Shape(batch, heads, kv_heads, HEAD, tokens, torch.bfloat16, SparqSettings(r=R, k=k))
    step = _step(shape, device)
    ours = _ours(shape, step, device, measure, tune)
    q, keys, _, values, *_ = step
    peer_name, peer = fastest(name, dense_peers(q, keys, values), measure)
    return _row(name, ours, peer, peer_name, least_bytes(shape))


def select_row(name: str, device: torch.device, measure: Measure) -> TimedRow:
    from mm1.attention.sparq_triton import select

    count, tokens, k = SELECT[name]
    scores = torch.randn(count, tokens, generator=torch.Generator(device).manual_seed(0), device=device)
    start, stop = (torch.full((count,), end, dtype=torch.int64, device=device) for end in (0, tokens))
    found = select(scores, k, start, stop).long()
    if not torch.equal(scores.gather(1, found).sort().values, scores.topk(k).values.sort().values):
        raise AssertionError(f"{name}: the selected scores are not torch.topk's; nothing to compare")
    chunks = [size for size in (2048, 4096, 8192, 16384) if size <= max(2048, tokens)]
    _, ours = fastest(
        f"{name} ours", {f"chunk {c}": functools.partial(select, scores, k, start, stop, chunk=c) for c in chunks}, measure
    )
    peers: dict[str, Callable[[], object]] = {"torch.topk": lambda: scores.topk(k, sorted=False)}
    peer_name, peer = fastest(name, peers, measure)
    return _row(name, ours, peer, peer_name, 4 * count * (tokens + k))


def official_row(name: str, checkout: Path, device: torch.device, measure: Measure, tune: bool) -> TimedRow:
    batch, tokens, k = OFFICIAL[name]
    theirs = official_attention(checkout)
    shape = Shape(batch, HEADS, HEADS, HEAD, tokens, torch.float16, SparqSettings(r=R, k=k))
    q, keys, keys_t, values, _, _, mean = step = _step(shape, device)
    ours = _ours(shape, step, device, measure, tune)
    query, average, by_component = q[:, :, None], mean[:, :, None].to(q.dtype), keys_t.transpose(2, 3)
    work = functools.partial(theirs, query, by_component, keys, values, average, R, k, "custom")
    peer_name, peer = fastest(name, {"the authors' Triton kernels": work}, measure)
    return _row(name, ours, peer, peer_name, least_bytes(shape))


def official_attention(checkout: Path) -> Callable[..., Tensor]:
    """Their function `sparq_attn`, imported from where it lies in the checkout. Raises UserError where it does not."""
    found = sorted(checkout.rglob("sparq_benchmark.py"))
    if not found:
        raise UserError(f"--official {checkout}: no sparq_benchmark.py in it; check out their branch `benchmarks`.")
    sys.path.insert(0, str(found[0].parent))
    try:
        function: Callable[..., Tensor] = importlib.import_module("sparq_benchmark").sparq_attn
        return function
    finally:
        sys.path.pop(0)


def dense_peers(q: Tensor, keys: Tensor, values: Tensor) -> dict[str, Callable[[], object]]:
    """Dense attention of q (B, Hq, d) to the whole of keys, values (B, Hkv, S, d): name -> a call."""
    from torch.nn.attention.flex_attention import flex_attention
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    query, packed = q[:, :, None], q.view(q.shape[0], keys.shape[1], -1, q.shape[-1])
    grouped = q.shape[1] != keys.shape[1]

    def by(backend: SDPBackend, x: Tensor, gqa: bool) -> Callable[[], object]:
        def call() -> object:
            with sdpa_kernel(backend):
                return sdpa(x, keys, values, enable_gqa=gqa)

        return call

    peers: dict[str, Callable[[], object]] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        name = f"SDPA {backend.name.removesuffix('_ATTENTION').lower()}"
        peers[name] = by(backend, query, grouped)
        if grouped:
            peers[f"{name}, packed"] = by(backend, packed, False)
    compiled = torch.compile(flex_attention, dynamic=False)
    peers["flex_attention"] = lambda: compiled(query, keys, values, enable_gqa=grouped)
    try:
        import flashinfer
    except ImportError:
        print("FlashInfer is not installed, no peer: pip install flashinfer-python", file=sys.stderr)
    else:
        for cores in (True, False):
            name = f"FlashInfer, {'tensor' if cores else 'CUDA'} cores"
            peers[name] = _flashinfer(flashinfer, q, keys, values, cores)
    return peers


def _flashinfer(flashinfer: Any, q: Tensor, keys: Tensor, values: Tensor, tensor_cores: bool) -> Callable[[], object]:
    """Their batched decoding over pages of 16 tokens, planned once, as a server would."""
    batch, kv_heads, tokens, d = keys.shape
    pages = tokens // 16
    state: dict[str, Any] = {}

    def paged(cache: Tensor) -> Tensor:
        return cache.view(batch, kv_heads, pages, 16, d).transpose(1, 2).reshape(-1, kv_heads, 16, d)

    def call() -> object:
        if not state:  # only when it is this peer's turn: the copies are as large as the caches
            ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * pages
            order = torch.arange(batch * pages, dtype=torch.int32, device=q.device)
            last = torch.full((batch,), 16, dtype=torch.int32, device=q.device)
            space = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                space, "HND", use_cuda_graph=True, use_tensor_cores=tensor_cores, paged_kv_indptr_buffer=ends,
                paged_kv_indices_buffer=order, paged_kv_last_page_len_buffer=last,
            )  # fmt: skip
            wrapper.plan(ends, order, last, q.shape[1], kv_heads, d, 16, q_data_type=q.dtype, kv_data_type=keys.dtype)
            state.update(run=wrapper.run, cache=(paged(keys), paged(values)))
        return state["run"](q, state["cache"])

    return call


def fastest(case: str, works: dict[str, Callable[[], object]], measure: Measure) -> tuple[str, float]:
    """(name, microseconds) of the fastest that runs; what each took, or why it could not, goes to standard error."""
    best = ("none could run", math.nan)
    for name in list(works):
        work = works.pop(name)
        try:
            time = measure(work)
        except Exception as error:  # a backend that does not take these shapes, or is not built for this GPU
            print(
                f"{case}: {name}: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}",
                file=sys.stderr,
            )
            continue
        print(f"{case}: {name}: {time:.1f} us", file=sys.stderr)
        if not time >= best[1]:
            best = (name, time)
    return best


def _step(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from mm1.attention.sparq_triton import random_step

    return random_step(shape, device)


def _ours(
    shape: Shape,
    step: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    device: torch.device,
    measure: Measure,
    tune: bool,
) -> float:
    """Microseconds of a step, after its first row was found equal to PyTorch's."""
    from mm1.attention import sparq_triton

    if tune:
        print(f"{shape}: {sparq_triton.warm_up([shape], device, measure)[shape]}", file=sys.stderr)
    out = sparq_triton.sparq_decode_triton(*step, shape.settings)[:1].float()
    q, keys, keys_t, values, start, stop, mean = (
        tensor[:1].float() if tensor.is_floating_point() else tensor[:1] for tensor in step
    )
    exact = sparq_torch(q, [Segment(keys, keys_t, values, start, stop)], mean, shape.settings)
    if (out - exact).abs().max() > 0.02 * exact.abs().max():
        raise AssertionError(f"{shape}: not PyTorch's result; nothing to compare")
    return measure(lambda: sparq_triton.sparq_decode_triton(*step, shape.settings))


def _row(name: str, ours: float, peer: float, peer_name: str, moved: int) -> TimedRow:
    return TimedRow(name, ours, peer, peer / ours, moved / BANDWIDTH * 1e6, "us", peer_name, "bytes at 3.0 TB/s", moved)


def main() -> None:
    parser = argparse.ArgumentParser(description="SparQ attention on a GPU")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--case", action="append", choices=[*DECODE, *SELECT, *OFFICIAL], help="only this case; may be given again"
    )
    parser.add_argument("--official", type=Path, help="checkout of the authors' branch `benchmarks`")
    parser.add_argument("--untuned", action="store_true", help="the default plan, without warm_up's search")
    given = parser.parse_args()
    try:
        print_rows(rows(given.repeats, given.case, given.official, tune=not given.untuned), given.json)
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
