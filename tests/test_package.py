"""The built wheel holds everything the commands need; the disk is asked before it is filled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipelines.shards import require_space

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_composes_its_configuration_away_from_the_checkout(tmp_path: Path) -> None:
    source = tmp_path / "source"
    kept = ("mm1", "data_pipelines", "eval", "ablations", "configs", "pyproject.toml", "README.md", "LICENSE")
    for name in kept:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, _made(source) / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    in_checkout = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert in_checkout <= names
    assert not any(name.startswith("tests/") for name in names)
    # PYTHONPATH comes before an editable install, and the working directory is not the checkout
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "mm1.train", "+ablation=connector_avgpool", "--cfg", "job"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert "mm1.model.connector.AveragePooling" in result.stdout, result.stderr
    where = "import configs, mm1; from data_pipelines import paths; print(configs.CONFIG_DIR, paths.home())"
    del environment["MM1_HOME"]
    script = [sys.executable, "-c", where]
    printed = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    assert str(tmp_path / "installed") in printed
    assert printed.split()[1] == str(Path.home() / "mm1")  # no checkout around it


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_a_full_disk_is_named_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path / "not" / "yet" / "there", 1, "A test")
    with pytest.raises(UserError, match=r"A test needs .* GB under .*, but only .* GB are free.*MM1_HOME"):
        require_space(tmp_path / "not" / "yet" / "there", free * 2, "A test")
