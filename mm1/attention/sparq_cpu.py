"""One decoding step of SparQ attention on the CPU, in float32 and bfloat16: sparq.py's method at the speed of the memory.

sparq_cpu.cpp is compiled for this machine's CPU at first use (about three seconds) and kept in <home>/cache/build. It shares
torch's OpenMP threads and obeys torch.set_num_threads; the number of threads changes no bit. Where it cannot be built, sparq.py
runs in PyTorch and says so.

Rows of at most max(k, dense_below - 1) valid tokens are attended to by sparq.dense_decode, to the bit. This module's own
`dense_decode` is the part of the kernel that attends to chosen tokens, given all of them.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from pathlib import Path

import torch
from torch import Tensor

from data_pipelines import native
from mm1.attention import sparq
from mm1.attention.sparq import Segment, SparqSettings, sparq_torch

SOURCE = Path(__file__).with_name("sparq_cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
DENSE_BELOW = {torch.float32: 640, torch.bfloat16: 896}
"""Valid tokens from which on a step is faster than dense, measured: docs/sparq.md."""
DTYPES = tuple(DENSE_BELOW)
_JOB = struct.Struct("8P 9q 13q 3q d")
"""sparq_cpu.cpp's Job."""


def supports(q: Tensor) -> bool:
    """Whether `sparq_decode` takes queries of this dtype and device; it records no gradient."""
    return q.device.type == "cpu" and q.dtype in DTYPES and not (q.requires_grad and torch.is_grad_enabled())


def sparq_decode(
    q: Tensor,
    keys: Tensor,
    keys_t: Tensor,
    values: Tensor,
    start: Tensor,
    stop: Tensor,
    value_mean: Tensor,
    settings: SparqSettings,
    *,
    scale: float | None = None,
) -> Tensor:
    """As sparq.sparq_decode, for what `supports` takes. Raises RuntimeError when the kernel cannot be built or has no memory.

    Keys, values and keys_t may be views whose last dimension is dense; on any other layout PyTorch decodes.
    """
    dense_up_to = max(settings.k, (DENSE_BELOW[q.dtype] if settings.dense_below is None else settings.dense_below) - 1)
    extents = list(zip(start.tolist(), stop.tolist(), strict=True))
    dense = [row for row, (first, end) in enumerate(extents) if end - first <= dense_up_to]
    if len(dense) == len(extents):
        return sparq.dense_decode(q, keys, values, start, stop, scale=scale, extents=extents)
    layers = (keys, keys_t, values)
    if any(layer.stride(3) != 1 or layer.dtype != q.dtype for layer in layers):
        return sparq_torch(q, [Segment(keys, keys_t, values, start, stop)], value_mean, settings, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    output = load()(q, keys, keys_t, values, start, stop, value_mean, settings, dense_up_to, factor)
    for row in dense:
        one = slice(row, row + 1)
        rows = (tensor[one] for tensor in (q, keys, values, start, stop))
        output[one] = sparq.dense_decode(*rows, scale=scale, extents=extents[one])
    return output


def dense_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    stop: Tensor,
    *,
    scale: float | None = None,
    extents: list[tuple[int, int]] | None = None,
) -> Tensor:
    """As sparq.dense_decode, for what `supports` takes; torch is faster on fewer than about 64 tokens."""
    layers = (keys, values)
    if any(layer.stride(3) != 1 or layer.dtype != q.dtype for layer in layers):
        keys, values = (layer.to(q.dtype).contiguous() for layer in layers)
    return load()(q, keys, None, values, start, stop, None, None, 0, q.shape[-1] ** -0.5 if scale is None else scale)


class Kernel:
    """The compiled sparq_cpu.cpp. Each calling thread has its own scratch memory, which grows to what its longest row needs."""

    def __init__(self, library: Path) -> None:
        code = ctypes.CDLL(str(library))
        self._decode = {torch.float32: code.sparq_decode_float32, torch.bfloat16: code.sparq_decode_bfloat16}
        for function in self._decode.values():
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int

    def __call__(
        self,
        q: Tensor,
        keys: Tensor,
        keys_t: Tensor | None,
        values: Tensor,
        start: Tensor,
        stop: Tensor,
        mean: Tensor | None,
        settings: SparqSettings | None,
        dense_up_to: int,
        scale: float,
    ) -> Tensor:
        """Decodes the rows of more than dense_up_to >= k valid tokens; the others' output is left as it comes.

        Without keys_t, mean and settings all rows are attended to densely.
        """
        batch, heads, d = q.shape
        kv_heads = keys.shape[1]
        if q.stride(2) != 1:
            q = q.contiguous()
        start, stop = start.contiguous(), stop.contiguous()
        if keys_t is None or mean is None or settings is None:
            keys_t, mean, method = keys, values, (0, 0, 0, False, False)
        else:
            s = settings
            method = (min(s.r, d), s.k, s.window, s.reallocate, s.group == "logits")
            if mean.stride(2) != 1 or mean.dtype != torch.float32:
                mean = mean.float().contiguous()
        output = torch.empty((batch, heads, d), dtype=q.dtype)
        pointers = (t.data_ptr() for t in (q, keys, keys_t, values, mean, output, start, stop))
        strides = (*q.stride()[:2], *keys.stride()[:3], *keys_t.stride()[:3], *values.stride()[:3], *mean.stride()[:2])
        shape = (batch, kv_heads, heads // kv_heads, d)
        job = _JOB.pack(*pointers, *shape, *method, *strides, torch.get_num_threads(), dense_up_to, settings is None, scale)
        if self._decode[q.dtype](job):
            raise RuntimeError(f"no memory for attention over {keys.shape[2]} tokens")
        return output


_LOCK = threading.Lock()
_loaded: list[Kernel] = []


def load() -> Kernel:
    """The kernel, built if it is not there yet. Raises one of native.FAILURES where that is impossible."""
    if not _loaded:
        with _LOCK:
            if not _loaded:
                _loaded.append(native.load(SOURCE, FLAGS, Kernel))
    return _loaded[0]


def available() -> bool:
    """Whether the kernel is there or can be built here."""
    try:
        load()
    except native.FAILURES:
        return False
    return True


def build(folder: Path, *flags: str) -> Path:
    """native.build of sparq_cpu.cpp."""
    return native.build(SOURCE, folder, [*FLAGS, *flags])
