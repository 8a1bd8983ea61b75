"""MKL told of an AMD CPU's whole width: by name, before torch, and not where it is not concerned."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import native
from mm1 import cpu

AMD = ["vendor_id\t: AuthenticAMD", "flags\t\t: fpu avx2 avx512f"]
INTEL = ["vendor_id\t: GenuineIntel", "flags\t\t: fpu avx2 avx512f"]
NARROW = ["vendor_id\t: AuthenticAMD", "flags\t\t: fpu avx2"]


@pytest.mark.parametrize(("lines", "expected"), [(AMD, True), (INTEL, False), (NARROW, False), ([], False)])
def test_only_wide_cpus_of_other_makers_are_concerned(lines: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_lines", lambda: lines)
    assert cpu.held_back() is expected


def test_the_library_answers_in_mkls_place(tmp_path: Path) -> None:
    library = ctypes.CDLL(str(native.build(cpu.SOURCE, tmp_path, ())))
    assert library.mkl_serv_intel_cpu_true() == 1


def run(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=True)
    return done.stdout.strip()


def test_it_is_loaded_before_torch_and_torch_then_asks_it() -> None:
    given = "from data_pipelines import native; native.cpu_lines = lambda: ['vendor_id: AuthenticAMD', 'flags: avx512f']\n"
    ask = "import ctypes, torch; print(ctypes.CDLL(None).mkl_serv_intel_cpu_true())"
    assert run(f"{given}from mm1.cpu import use_whole_width; assert use_whole_width() and use_whole_width()\n{ask}") == "1"
    assert run(f"import torch\n{given}from mm1.cpu import use_whole_width; print(use_whole_width())") == "False"
    assert run(f"{given}from mm1.cpu import use_whole_width; print(use_whole_width())", MM1_PLAIN_MKL="1") == "False"


def test_products_are_the_same_numbers() -> None:
    code = (
        "from mm1.cpu import use_whole_width; use_whole_width()\n"
        "import torch; torch.manual_seed(0); a, b = torch.randn(65, 130), torch.randn(130, 33)\n"
        "print(float((a @ b - (a.double() @ b.double()).float()).abs().max()))"
    )
    assert float(run(code)) < 1e-4
    assert float(run(code, MM1_PLAIN_MKL="1")) < 1e-4
