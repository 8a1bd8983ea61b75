"""Where the suite keeps what it makes: corpora, downloads, weights, runs, all under one home folder.

The home is MM1_HOME if that is set; else the checkout, when the suite runs from one (an editable install or a clone); else ~/mm1.
It never depends on the current directory, so that a run started from one folder is found again from another.
"""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    if chosen := os.environ.get("MM1_HOME"):
        return Path(chosen).expanduser().resolve()
    beside = Path(__file__).resolve().parent.parent
    return beside if (beside / "pyproject.toml").is_file() else Path.home() / "mm1"


def corpus(name_or_path: str) -> Path:
    """A corpus by name (<home>/data/NAME) or by path (anything with a separator in it)."""
    return Path(name_or_path).expanduser().resolve() if os.sep in name_or_path else home() / "data" / name_or_path


def downloads() -> Path:
    return home() / "downloads"


def weights() -> Path:
    return home() / "weights"


def runs() -> Path:
    return home() / "runs"
