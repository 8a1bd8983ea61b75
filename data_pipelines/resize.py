"""Bicubic, antialiased resize of RGB bytes: the bits of torch's uint8 kernel, about three times as fast.

    rows -> transposed blocks -> horizontal pass, rounded to bytes -> ring of row pairs -> vertical pass -> window of a square

torch unpacks RGB to RGBA, writes whole pictures between its passes and shuffles every pixel in the horizontal one; the copy into
the padded square comes on top. resize.c lets the lanes of that pass be rows (8 with AVX2, 16 with AVX-512), so that both passes
are plain multiply-adds of 16-bit pairs without a shuffle per tap, keeps only the rows in use, and writes straight into the
window. Rounding to bytes after the horizontal pass fixes the order of the passes; a side that stays gets the weight 1.

The C file is compiled for this machine's CPU at first use and kept in <home>/cache/build. Where that is impossible, or where its
bits differ from torch's, torch itself resizes and stderr says so once: nothing but the speed changes.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_pipelines import native

SOURCE = Path(__file__).with_name("resize.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off")
"""No contraction to fused multiply-adds: the weights are then the same on every machine."""
CHECKED = (((37, 41), (20, 23)), ((5, 3), (9, 14)), ((33, 18), (33, 11)))
"""Sizes (height, width) before and after of the pictures whose bits are compared with torch's when the kernel is loaded."""


def resize_into(pixels: np.ndarray, target: np.ndarray) -> None:
    """pixels uint8 (h, w, 3), C-contiguous -> resized into target, uint8 (H, W, 3), whose rows may lie apart.

    The bits are those of torch's interpolate(mode="bicubic", antialias=True). Only the bytes of target are written, which must
    not overlap those of pixels. Raises ValueError on other layouts.
    """
    for array in (pixels, target):
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise ValueError(f"expected uint8 (height, width, 3), at least one pixel, not {array.dtype} {array.shape}")
    if not pixels.flags.c_contiguous or target.strides[1:] != (3, 1) or not target.flags.writeable:
        raise ValueError("pixels must be C-contiguous, the rows of target too, and target writeable")
    if pixels.shape == target.shape:
        target[...] = pixels
    elif kernel := _kernel():
        kernel(pixels, target)
    else:
        _with_torch(pixels, target)


class Kernel:
    """The compiled resize.c. Threads may share it: each has its own scratch memory, which grows to what its pictures need."""

    def __init__(self, library: Path) -> None:
        code = ctypes.CDLL(str(library))
        size, whole, pointer = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
        self._table_bytes, self._make_table, self._scratch_bytes = code.table_bytes, code.make_table, code.scratch_bytes
        self._table_bytes.argtypes, self._table_bytes.restype = [whole, whole], size
        self._make_table.argtypes, self._make_table.restype = [whole, whole, pointer, pointer], None
        self._scratch_bytes.argtypes, self._scratch_bytes.restype = [whole] * 4, size
        self._resize = code.resize
        self._resize.argtypes = [pointer, whole, whole, pointer, whole, whole, ctypes.c_ssize_t, pointer, pointer, pointer]
        self._resize.restype = None
        self._table = lru_cache(maxsize=256)(self._weights)  # corpora have few sizes; a table takes some 10 kB
        self._own = threading.local()

    def __call__(self, pixels: np.ndarray, target: np.ndarray) -> None:
        (height, width), (to_height, to_width) = pixels.shape[:2], target.shape[:2]
        across, down = self._table(width, to_width), self._table(height, to_height)
        size = self._scratch_bytes(width, height, to_width, to_height)
        scratch = getattr(self._own, "scratch", None)
        if scratch is None or scratch.nbytes < size:
            scratch = self._own.scratch = np.empty(size, np.uint8)
        self._resize(
            pixels.ctypes.data, width, height, target.ctypes.data, to_width, to_height, target.strides[0],
            across.ctypes.data, down.ctypes.data, scratch.ctypes.data,
        )  # fmt: skip

    def _weights(self, size: int, to: int) -> np.ndarray:
        table = np.empty(self._table_bytes(size, to) // 4, np.int32)
        exact = np.empty(2 * len(table), np.float64)
        self._make_table(size, to, table.ctypes.data, exact.ctypes.data)
        return table


def build(folder: Path, *flags: str) -> Path:
    """native.build of resize.c."""
    return native.build(SOURCE, folder, [*FLAGS, *flags])


_LOCK = threading.Lock()
_loaded: list[Kernel | None] = []
"""Empty before the first use; None where torch resizes."""


def _kernel() -> Kernel | None:
    if not _loaded:
        with _LOCK:
            if not _loaded:
                _loaded.append(_load())
    return _loaded[0]


def _load() -> Kernel | None:
    try:
        kernel = native.load(SOURCE, FLAGS, Kernel)
        _check(kernel)
    except native.FAILURES as error:
        print(f"resize: pictures are resized by torch, at a third of the speed: {error}", file=sys.stderr)
        return None
    return kernel


def _check(kernel: Kernel) -> None:
    """Raises RuntimeError when a bit differs from torch's."""
    for size, to in CHECKED:
        count = np.arange(size[0] * size[1] * 3, dtype=np.uint32)
        pixels = (count * np.uint32(2654435761) >> np.uint32(24)).astype(np.uint8).reshape(*size, 3)
        mine, theirs = np.empty((2, *to, 3), np.uint8)
        kernel(pixels, mine)
        _with_torch(pixels, theirs)
        if not np.array_equal(mine, theirs):
            raise RuntimeError("the compiled resize.c and torch differ in their bits")


def _with_torch(pixels: np.ndarray, target: np.ndarray) -> None:
    import torch
    from torch.nn.functional import interpolate

    # channels last, as the decoders leave it, is the layout of torch's fast kernel
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    to = (target.shape[0], target.shape[1])
    target[...] = interpolate(picture, size=to, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
