"""C and C++ files of this suite, compiled for this machine's CPU at first use and kept in <home>/cache/build."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from data_pipelines import paths

COMPILERS = {".c": ("cc", "gcc", "g++"), ".cpp": ("c++", "g++", "clang++")}
FAILURES = (OSError, RuntimeError, AttributeError, subprocess.SubprocessError)
"""What building and loading a library may raise; a caller then does without."""

T = TypeVar("T")


def build(source: Path, folder: Path, flags: Sequence[str]) -> Path:
    """Compiles a source into folder, unless it is there already, and gives the library's path.

    Processes may race: each compiles into a file of its own and renames it. Raises OSError when folder cannot be written,
    RuntimeError when nothing here compiles it.
    """
    known = COMPILERS[source.suffix]
    compiler = next(filter(None, map(shutil.which, known)), None)
    if compiler is None:
        raise RuntimeError(f"no {source.suffix[1:].upper().replace('PP', '++')} compiler found ({', '.join(known)})")
    parts = (*_texts(source), _version(compiler), _cpu(), *flags)
    library = folder / f"{source.stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        handle, own = tempfile.mkstemp(dir=folder, suffix=".tmp")
        os.close(handle)
        try:
            command = [compiler, *flags, "-shared", "-fPIC", str(source), "-o", own, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                told = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                raise RuntimeError(f"{compiler} failed: {next((line for line in told if 'error' in line), told[0])}")
            os.replace(own, library)
        finally:
            Path(own).unlink(missing_ok=True)
    return library


def load(source: Path, flags: Sequence[str], open_library: Callable[[Path], T]) -> T:
    """The built source, opened: from <home>/cache/build, or where that cannot be written or holds no code, from a folder that is
    gone afterwards. Raises one of FAILURES."""
    try:
        return open_library(build(source, paths.home() / "cache" / "build", flags))
    except OSError:
        with tempfile.TemporaryDirectory() as folder:
            return open_library(build(source, Path(folder), flags))


def _texts(source: Path) -> Iterator[str]:
    """Of a source and of the headers beside it that it includes, through any depth."""
    text = source.read_text()
    yield text
    for name in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE):
        yield from _texts(source.parent / name)


@lru_cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout


def _cpu() -> str:
    """What -march=native depends on."""
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in cpu_lines() if line.startswith(names)})])


def cpu_lines() -> list[str]:
    """Of /proc/cpuinfo; none where there is no such file."""
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
