"""The recorded outputs of official metric code (tests/vectors, licences in its NOTICE)."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).parent / "vectors"


def vectors(name: str) -> Any:
    return json.loads(lzma.decompress((VECTORS / f"{name}.json.xz").read_bytes()))
