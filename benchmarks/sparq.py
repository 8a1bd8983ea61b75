"""`python -m benchmarks.sparq --device cpu|cuda --json`: a decoding step of SparQ attention beside dense attention.

    cpu     fp32_b1_s16384: dtype, batch, tokens; 32 query and 8 key-value heads, d 128, r 32, k 256, on torch's threads
            fp32_b8_step16: one layer's step in transformers, from a token's q, k, v to its output (sparq_steps.py)
            fp32_b8_shared16384: rows that share a prefix of so many tokens and have 256 each (sparq_steps.py)
    cuda    the rows of `python -m benchmarks.sparq_cuda`, which has more options

`ours` and `peer` are microseconds a call, `ratio` is peer / ours, `bytes` what a call must read at least, and `limit` the
microseconds that takes at the rate of a streaming read, measured in the same run. The peer is the fastest of
scaled_dot_product_attention with enable_gqa (gqa), the same with a group's heads packed as query rows (packed), and two matrix
products so packed (matmul), all at the CPU's full width (mm1/cpu.py). Calls alternate between ours and the peers, each on other
caches than the call before (1 GB of them, or one), so that none finds its data in the CPU's caches; the fastest of each counts.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.report import arguments, print_rows
from benchmarks.sparq_cases import CASES, DTYPES, HEAD, HEADS, KV_HEADS, ROTATED, K, R, seconds
from configs.errors import UserError

if TYPE_CHECKING:
    import torch

    from benchmarks.sparq_cuda import TimedRow

LEAST_SECONDS, MOST_CALLS = 0.4, 400  # a repeat


def rows(repeats: int, cases: Collection[str] | None = None) -> Iterator[TimedRow]:
    """The cases of the module's docstring, or those named in `cases`, as they come."""
    bandwidth = read_bandwidth()
    for name in CASES:
        if cases is None or name in cases:
            if "_s" in name and not name.rsplit("_s", 1)[1].isdigit():
                from benchmarks import sparq_steps

                yield sparq_steps.row(name, repeats, bandwidth)
            else:
                yield row(name, repeats, bandwidth)


def read_bandwidth() -> float:
    """Bytes a second that torch's threads read of memory none of which is in a cache."""
    import torch

    memory = torch.ones(1 << 27)
    return 4 * len(memory) / min(seconds(memory.sum) for _ in range(8))


def row(name: str, repeats: int, bandwidth: float) -> TimedRow:
    import torch

    from benchmarks.sparq_cuda import TimedRow
    from mm1.attention.sparq import SparqSettings, sparq_decode
    from mm1.attention.sparq_cpu import DENSE_BELOW

    which, batch, tokens = CASES[name]
    dtype = getattr(torch, DTYPES[which])
    settings = SparqSettings(r=R, k=K)
    size = batch * KV_HEADS * tokens * HEAD * dtype.itemsize
    copies = max(1, min(256, ROTATED // (3 * size)))
    q = torch.randn(batch, HEADS, HEAD).to(dtype)
    start, stop = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), tokens)
    caches = []
    for _ in range(copies):
        keys, values = torch.randn(2, batch, KV_HEADS, tokens, HEAD).to(dtype)
        caches.append((keys, keys.transpose(2, 3).contiguous(), values, values.mean(2, dtype=torch.float32)))

    def ours(cache: tuple[torch.Tensor, ...]) -> object:
        keys, keys_t, values, mean = cache
        return sparq_decode(q, keys, keys_t, values, start, stop, mean, settings)

    works = {"ours": ours, **peers(q)}
    fastest = dict.fromkeys(works, float("inf"))
    turn = itertools.cycle(caches)
    for work in works.values():
        work(next(turn))
    for _ in range(repeats):
        end = time.perf_counter() + LEAST_SECONDS
        for call in range(MOST_CALLS):
            for one, work in works.items():
                cache = next(turn)
                fastest[one] = min(fastest[one], seconds(lambda work=work, cache=cache: work(cache)))  # type: ignore[misc]
            if call > 3 and time.perf_counter() > end:
                break
    mine = 1e6 * fastest.pop("ours")
    best = min(fastest, key=lambda one: fastest[one])
    peer = 1e6 * fastest[best]
    dense = tokens < max(DENSE_BELOW[dtype], K + 1)  # as sparq_decode decides
    moved = 2 * size if dense else batch * KV_HEADS * (tokens * R + 2 * K * HEAD) * dtype.itemsize
    limit = f"bytes at {bandwidth / 1e9:.0f} GB/s, {torch.get_num_threads()} threads"
    return TimedRow(name, mine, peer, peer / mine, 1e6 * moved / bandwidth, "us", best, limit, moved)


def peers(q: torch.Tensor) -> dict[str, Callable[[Any], object]]:
    """Dense attention in torch's own ways, each a function of (keys, keys_t, values, mean)."""
    from torch.nn.functional import scaled_dot_product_attention

    alone = q[:, :, None]
    packed = q.view(len(q), KV_HEADS, -1, HEAD)
    scaled = packed * HEAD**-0.5
    return {
        "gqa": lambda cache: scaled_dot_product_attention(alone, cache[0], cache[2], enable_gqa=True),
        "packed": lambda cache: scaled_dot_product_attention(packed, cache[0], cache[2]),
        "matmul": lambda cache: (scaled @ cache[0].transpose(-1, -2)).softmax(-1) @ cache[2],
    }


def main() -> None:
    chosen = arguments(__doc__ or "", CASES)
    if chosen.device == "cuda":
        from benchmarks import sparq_cuda

        try:
            print_rows(sparq_cuda.rows(chosen.repeats, chosen.case), chosen.json)
        except UserError as error:
            sys.exit(str(error))
        return
    from mm1.cpu import use_whole_width

    use_whole_width()
    print_rows(rows(chosen.repeats, chosen.case), chosen.json)


if __name__ == "__main__":
    main()
