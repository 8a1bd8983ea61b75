"""The cases of benchmarks.sparq on the CPU, and what all of them have: 32 query and 8 key-value heads, d 128, r 32, k 256."""

from __future__ import annotations

import time
from collections.abc import Callable

HEADS, KV_HEADS, HEAD, R, K = 32, 8, 128, 32, 256
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# name: dtype, batch, tokens
CASES = {
    f"{dtype}_b{batch}_s{tokens}": (dtype, batch, tokens)
    for dtype in DTYPES
    for batch, tokens in [*((1, 2**power) for power in (4, 6, *range(8, 17))), (4, 4096), (8, 16384)]
}
CASES |= {
    f"{dtype}_b{batch}_step{2**power}": (dtype, batch, 2**power)
    for dtype in DTYPES
    for batch in (1, 8)
    for power in range(0, 15, 2)
}
CASES |= {f"{dtype}_b{batch}_shared16384": (dtype, batch, 16384) for dtype in DTYPES for batch in (1, 8, 32)}
ROTATED = 1 << 30  # bytes of caches


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
