"""One decoding step of SparQ attention on the CPU, in float32 and bfloat16: sparq.py's method at the speed of the memory.

sparq_cpu.cpp is compiled for this machine's CPU at first use (about five seconds) and kept in <home>/cache/build. It shares
torch's OpenMP threads and obeys torch.set_num_threads; the number of threads changes no bit. Where it cannot be built, sparq.py
runs in PyTorch and says so.

Rows of at most max(k, dense_below - 1) valid tokens are attended to by sparq.dense_decode, to the bit. This module's own
`dense_decode` is the part of the kernel that attends to chosen tokens, given all of them. `sparq_shared` reads a prefix where it
lies, however many rows share it. sparq_step.py is a cache's whole step for one new token.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

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
ALL = 2**62
"""As `dense_up_to`: every row is attended to whole."""


def supports(q: Tensor) -> bool:
    """Whether `sparq_decode` takes queries of this dtype and device; it records no gradient."""
    return q.device.type == "cpu" and q.dtype in DTYPES and not (q.requires_grad and torch.is_grad_enabled())


def dense_up_to(settings: SparqSettings, dtype: torch.dtype) -> int:
    """The largest number of valid tokens that is attended to densely here."""
    return settings.dense_up_to if settings.dense_below is not None else max(settings.k, DENSE_BELOW[dtype] - 1)


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
    most = dense_up_to(settings, q.dtype)
    if not _readable(q, keys, keys_t, values):
        settings = replace(settings, dense_below=most + 1)
        return sparq_torch(q, [Segment(keys, keys_t, values, start, stop)], value_mean, settings, scale=scale)
    return load()(q, keys, keys_t, values, start, stop, value_mean, settings, most, scale)


def sparq_shared(
    q: Tensor, prefix: Segment, suffix: Segment, value_mean: Tensor, settings: SparqSettings, *, scale: float | None = None
) -> Tensor:
    """As sparq.sparq_shared, for what `supports` takes; `sparq_decode`'s notes hold. Rows that are short are dense_shared's."""
    most = dense_up_to(settings, q.dtype)
    settings = replace(settings, dense_below=most + 1)
    first, end = int(prefix.start[0]), int(prefix.stop[0])
    seen_whole = bool((prefix.start == first).all() and (prefix.stop == end).all()) and first < end
    readable = all(s.keys_t is not None and _readable(q, s.keys, s.keys_t, s.values) for s in (prefix, suffix))
    dense = (suffix.stop - suffix.start).clamp(min=0) + (end - first) <= most
    if not (seen_whole and readable) or bool(dense.all()):
        return sparq_torch(q, [prefix, suffix], value_mean, settings, scale=scale)
    own = (suffix.keys, suffix.keys_t, suffix.values, suffix.start, suffix.stop)
    output = load()(q, *own, value_mean, settings, most, scale, (prefix, first, end))
    if not bool(dense.any()):
        return output
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.where(dense[:, None, None], sparq.dense_segments(q, [prefix, suffix], factor), output)


def dense_decode(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, stop: Tensor, *, scale: float | None = None) -> Tensor:
    """As sparq.dense_decode, for what `supports` takes."""
    if not _readable(q, keys, values):
        keys, values = (layer.to(q.dtype).contiguous() for layer in (keys, values))
    return load()(q, keys, None, values, start, stop, None, None, ALL, scale)


def _readable(q: Tensor, *layers: Tensor) -> bool:
    return all(layer.dtype == q.dtype and (layer.stride(3) == 1 or layer.shape[3] == 1) for layer in layers)


_POINTERS = "q keys keys_t values mean out start stop prefix_keys prefix_keys_t prefix_values"
_NUMBERS = """length prefix rows kv_heads group d r k local reallocate rank_logits q_row q_head keys_row keys_head keys_slot
    keys_t_row keys_t_head keys_t_channel values_row values_head values_slot mean_row mean_head prefix_keys_head prefix_keys_slot
    prefix_keys_t_head prefix_keys_t_channel prefix_values_head prefix_values_slot threads dense_up_to"""


def fields(pointers: str, numbers: str) -> list[tuple[str, Any]]:
    """Of a ctypes.Structure: pointers, then int64."""
    return [(name, ctypes.c_void_p) for name in pointers.split()] + [(name, ctypes.c_int64) for name in numbers.split()]


class Job(ctypes.Structure):
    """sparq_cpu_unit.h's, for whom changes a few fields from call to call; _JOB packs all of them in a third of the time."""

    _fields_ = (*fields(_POINTERS, _NUMBERS), ("scale", ctypes.c_double))


_JOB = struct.Struct(f"{len(_POINTERS.split())}P {len(_NUMBERS.split())}q d")


def method(settings: SparqSettings, d: int) -> tuple[int, int, int, bool, bool]:
    """A Job's r, k, local, reallocate, rank_logits."""
    return min(settings.r, d), settings.k, settings.window, settings.reallocate, settings.group == "logits"


class Kernel:
    """The compiled sparq_cpu.cpp. Each calling thread has its own scratch memory, which grows to what its longest row needs."""

    def __init__(self, library: Path) -> None:
        code = ctypes.CDLL(str(library))
        self.decode, self.append, self.step = (
            {dtype: getattr(code, f"sparq_{name}_{str(dtype).removeprefix('torch.')}") for dtype in DTYPES}
            for name in ("decode", "append", "step")
        )

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
        scale: float | None,
        shared: tuple[Segment, int, int] | None = None,
    ) -> Tensor:
        """Decodes rows of more than dense_up_to >= k valid tokens sparsely, and the others densely: all of them without settings.

        shared: a prefix and which of its slots the rows see, one or more; rows to be dense are then left as they come.
        """
        batch, heads, d = q.shape
        kv_heads = keys.shape[1]
        if q.stride(2) != 1:
            q = q.contiguous()
        start, stop = start.contiguous(), stop.contiguous()
        if keys_t is None or mean is None or settings is None:
            keys_t, mean, how = keys, values, (0, 0, 0, False, False)
        else:
            how = method(settings, d)
            if mean.stride(2) != 1 or mean.dtype != torch.float32:
                mean = mean.float().contiguous()
        output = torch.empty((batch, heads, d), dtype=q.dtype)
        count, places, strides = 0, (0, 0, 0), (0, 0, 0, 0, 0, 0)
        if shared is not None:
            prefix, first, end = shared
            assert prefix.keys_t is not None
            k, t, v = prefix.keys[:, :, first:end], prefix.keys_t[..., first:end], prefix.values[:, :, first:end]
            count, places = end - first, (k.data_ptr(), t.data_ptr(), v.data_ptr())
            strides = (k.stride(1), k.stride(2), t.stride(1), t.stride(2), v.stride(1), v.stride(2))
        job = _JOB.pack(
            *[t.data_ptr() for t in (q, keys, keys_t, values, mean, output, start, stop)],
            *(*places, 0, count, batch, kv_heads, heads // kv_heads, d, *how),
            *(*q.stride()[:2], *keys.stride()[:3], *keys_t.stride()[:3], *values.stride()[:3], *mean.stride()[:2], *strides),
            *(torch.get_num_threads(), dense_up_to, d**-0.5 if scale is None else scale),
        )
        check(self.decode[q.dtype](job), keys)
        return output


def check(failed: int, keys: Tensor) -> None:
    """Raises RuntimeError for what sparq_cpu.cpp returns when it has no memory."""
    if failed:
        raise RuntimeError(f"no memory for attention over {keys.shape[2]} tokens")


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
