"""Shared by all tests: one torch thread, a home of their own, small corpora written on the spot."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs, corpora and downloads of a test go to its own folder."""
    monkeypatch.setenv("MM1_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def official_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files in the layouts of the official datasets; not to be written to."""
    from tests.official import write_all

    return write_all(tmp_path_factory.mktemp("official") / "vl")


@pytest.fixture
def datasets(official_files: Path, tmp_path: Path) -> Path:
    """A copy of them to break."""
    return Path(shutil.copytree(official_files, tmp_path / "vl"))
