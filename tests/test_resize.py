"""resize.c has the bits of torch's uint8 kernel, on every path and size, and gives way to torch where it cannot be built."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import native, resize

HAS_COMPILER = any(map(shutil.which, native.COMPILERS[".c"]))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")
WAYS = [(), ("-DPORTABLE",)] + ([("-mno-avx512f",), ("-mno-avx2",)] if platform.machine() == "x86_64" else [])
SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**32 - 1))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("build")


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "_loaded", [])


def by_torch(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(picture, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def assert_same(into, pixels: np.ndarray, height: int, width: int) -> None:
    """Equal to torch inside a window, untouched around it."""
    square = np.full((height + 3, width + 5, 3), 77, np.uint8)
    window = square[1 : 1 + height, 2 : 2 + width]
    into(pixels, window)
    expected = np.full_like(square, 77)
    expected[1 : 1 + height, 2 : 2 + width] = by_torch(pixels, height, width)
    assert np.array_equal(square, expected)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@needs_compiler
@pytest.mark.parametrize("flags", WAYS)
def test_has_the_bits_of_torch(flags: tuple[str, ...], built: Path) -> None:
    kernel = resize.Kernel(resize.build(built, *flags))

    @settings(max_examples=100, deadline=None)
    @given(SIZES)
    def same(case: tuple[int, int, int, int, int]) -> None:
        height, width, to_height, to_width, seed = case
        assert_same(kernel, noise(height, width, seed), to_height, to_width)

    same()


@needs_compiler
@pytest.mark.parametrize("flags", WAYS)
def test_clamps_as_torch_does(flags: tuple[str, ...], built: Path) -> None:
    """A checkerboard of 0 and 255 overshoots on both sides in both passes; all 255 shows weights whose sum is not exactly 1."""
    kernel = resize.Kernel(resize.build(built, *flags))
    board = (np.indices((97, 64)).sum(0) % 2 * 255).astype(np.uint8)
    for grey in (board, board.repeat(5, 0).repeat(3, 1), np.full((97, 64), 255, np.uint8), np.zeros((97, 64), np.uint8)):
        for size in ((150, 133), (61, 50), (97, 31), (45, 64), (1, 1)):
            assert_same(kernel, np.repeat(grey[..., None], 3, 2), *size)


@needs_compiler
@pytest.mark.parametrize(
    ("size", "to"),
    [((480, 640), (252, 336)), ((3, 4000), (1, 336)), ((4000, 3), (336, 1)), ((1, 1), (336, 336)), ((7, 5000), (7, 1))],
)
def test_reads_and_writes_nothing_else(size: tuple[int, int], to: tuple[int, int], built: Path) -> None:
    """The picture ends where readable memory ends: a load behind it would be a segmentation fault."""
    program = f"""
import ctypes, mmap, pathlib, numpy as np
from data_pipelines import native, resize
kernel = resize.Kernel(pathlib.Path({str(resize.build(built))!r}))
size, page = {size[0] * size[1] * 3}, mmap.PAGESIZE
room = -(-size // page) * page
memory = np.frombuffer(mmap.mmap(-1, room + page), np.uint8)
protect = ctypes.CDLL(None).mprotect
protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
assert protect(memory.ctypes.data + room, page, 0) == 0
kernel(memory[room - size : room].reshape({size[0]}, {size[1]}, 3), np.empty({(*to, 3)}, np.uint8))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=resize.SOURCE.parent.parent)
    assert_same(resize.Kernel(resize.build(built)), noise(*size), *to)


@needs_compiler
def test_threads_do_not_share_memory(built: Path) -> None:
    kernel = resize.Kernel(resize.build(built))
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(assert_same, kernel, noise(90 + i, 300 - i, i), 70 + i, 150) for i in range(60)]:
            done.result()


def test_equal_sizes_and_wrong_layouts() -> None:
    pixels, target = noise(5, 6), np.empty((5, 6, 3), np.uint8)
    resize.resize_into(pixels, target)
    assert np.array_equal(pixels, target)
    for wrong in (pixels[:, ::2], pixels.astype(np.float32), pixels[0], pixels[:0], pixels[..., :2]):
        with pytest.raises(ValueError, match=r"pixels|expected"):
            resize.resize_into(wrong, np.empty((9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match="rows of target"):
        resize.resize_into(pixels, np.empty((9, 18, 3), np.uint8)[:, ::2])


@needs_compiler
def test_a_home_that_cannot_be_written(home: Path, unloaded: None, capfd: pytest.CaptureFixture[str]) -> None:
    home.mkdir(parents=True)
    (home / "cache").write_text("a file where a folder should be")
    assert_same(resize.resize_into, noise(50, 40), 20, 30)
    assert resize._loaded[0] is not None
    assert capfd.readouterr().err == ""


def changed(path: Path, old: str, new: str) -> Path:
    text = resize.SOURCE.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("no compiler", "no C compiler found"),
        pytest.param("not C", "failed: ", marks=needs_compiler),
        pytest.param("wrong bits", "differ in their bits", marks=needs_compiler),
    ],
)
def test_torch_takes_over(
    fault: str, reason: str, unloaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if fault == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif fault == "not C":
        monkeypatch.setattr(resize, "SOURCE", changed(tmp_path / "resize.c", "void resize(", "void resize{"))
    else:
        monkeypatch.setattr(resize, "SOURCE", changed(tmp_path / "resize.c", "1.5 * x - 2.5", "1.49 * x - 2.49"))
    for i in range(3):
        assert_same(resize.resize_into, noise(50 + i, 40), 20, 30)
    assert resize._loaded == [None]
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert reason in told


@needs_compiler
def test_processes_may_compile_at_once(tmp_path: Path) -> None:
    """With a compiler that leaves half a file for a while, the second process must not load what the first is still writing."""
    real = next(filter(None, map(shutil.which, native.COMPILERS[".c"])))
    slow = tmp_path / "cc"
    slow.write_text(
        f"""#!/bin/sh
if [ "$1" = --version ]; then exec {real} --version; fi
echo begun >> {tmp_path}/log
for word; do [ "$last" = -o ] && echo half > "$word"; last=$word; done
sleep 1
exec {real} "$@"
"""
    )
    slow.chmod(0o755)
    folder = tmp_path / "build"
    program = f"from data_pipelines import resize; import pathlib; resize.Kernel(resize.build(pathlib.Path({str(folder)!r})))"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", program]
    first = subprocess.Popen(command, env=environment, cwd=resize.SOURCE.parent.parent)
    while not (tmp_path / "log").exists() and first.poll() is None:
        time.sleep(0.01)
    second = subprocess.Popen(command, env=environment, cwd=resize.SOURCE.parent.parent)
    assert [first.wait(60), second.wait(60)] == [0, 0]
    assert (tmp_path / "log").read_text() == "begun\n" * 2
    assert [path.suffix for path in folder.iterdir()] == [".so"]


@needs_compiler
def test_a_changed_header_is_another_library(tmp_path: Path) -> None:
    source, header = tmp_path / "number.c", tmp_path / "inner.h"
    source.write_text('#include "outer.h"\nint number(void) { return NUMBER; }\n')
    (tmp_path / "outer.h").write_text('#include "inner.h"\n')
    found = []
    for value in (1, 2):
        header.write_text(f"#define NUMBER {value}\n")
        found.append(ctypes.CDLL(str(native.build(source, tmp_path / "built", ()))).number())
    assert found == [1, 2]
