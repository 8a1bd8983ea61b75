"""Matrix products at an AMD CPU's full width.

torch's wheels multiply float32 matrices with Intel's MKL, which asks who made the CPU and takes AVX2 code for what is not Intel's
although the machine has AVX-512: 105 instead of 252 GFLOP/s on one core of an EPYC of family 26. MKL asks by calling a function
of its own, `mkl_serv_intel_cpu_true`. A library that is loaded first and has a function of that name answers in its place.

Only CPUs with AVX-512 that are not Intel's are concerned. MM1_PLAIN_MKL=1 leaves MKL as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from data_pipelines import native

SOURCE = Path(__file__).with_name("cpu.c")
_loaded: list[ctypes.CDLL] = []


def use_whole_width() -> bool:
    """To be called before torch is imported; says whether MKL takes its wide code from now on because of it."""
    if _loaded:
        return True
    if "torch" in sys.modules or os.environ.get("MM1_PLAIN_MKL") or not held_back():
        return False
    try:
        # global: what torch loads later looks there before it looks into itself
        _loaded.append(native.load(SOURCE, (), lambda library: ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)))
    except native.FAILURES as error:
        print(f"matrix products stay at half the CPU's width: {error}", file=sys.stderr)
        return False
    return True


def whole_width_in_use() -> bool:
    """Whether `use_whole_width` took effect in this process."""
    return bool(_loaded)


def held_back() -> bool:
    """Whether MKL would take narrow code although the CPU has AVX-512."""
    lines = native.cpu_lines()
    wide = any(line.startswith("flags") and "avx512f" in line.split() for line in lines)
    return wide and not any(line.startswith("vendor_id") and "GenuineIntel" in line for line in lines)
