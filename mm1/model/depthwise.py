"""The gradient of a depthwise convolution's weights on a CPU: depthwise.c, compiled at first use, where oneDNN is slow.

Where it cannot be compiled, torch's own gradient is taken and stderr says so once: nothing but the speed changes.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from data_pipelines import native

SOURCE = Path(__file__).with_name("depthwise.c")
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp")
MAX_KERNEL = 8
_JOB = struct.Struct("3P 10q")
"""depthwise.c's Job."""


def weight_gradient(x: torch.Tensor, gradient: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor | None:
    """float32 (N, C, H, W) and (N, C, h, w), the result's gradient -> (C, 1, kernel, kernel), kernel at most MAX_KERNEL.

    Both may be of any layout; channels last is not copied. None where there is no compiler.
    """
    run = _kernel()
    if run is None:
        return None
    x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x, gradient))
    (pictures, channels, height, width), (out_height, out_width) = x.shape, gradient.shape[2:]
    out = torch.empty(kernel, kernel, channels)
    sizes = (pictures, channels, height, width, out_height, out_width, kernel, stride, padding, torch.get_num_threads())
    run(_JOB.pack(x.data_ptr(), gradient.data_ptr(), out.data_ptr(), *sizes))
    return out.permute(2, 0, 1).unsqueeze(1)


@cache
def _kernel() -> Callable[[bytes], None] | None:
    def opened(library: Path) -> Callable[[bytes], None]:
        run = ctypes.CDLL(str(library)).depthwise_weight_gradient
        run.argtypes, run.restype = [ctypes.c_char_p], None
        return run

    try:
        return native.load(SOURCE, FLAGS, opened)
    except native.FAILURES as error:
        print(f"depthwise.c cannot be compiled ({error}); torch computes these gradients, more slowly.", file=sys.stderr)
        return None
