"""JSON records that the suite wrote, read back: whole and of the version that is known, or an error that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import UserError


def read_object(path: Path, version: int, remedy: str, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """The object in `path`, which `parse` makes of its text.

    Raises UserError, ending with `remedy`, where it is missing, half-written or of another `version`.
    """
    remedy = remedy[:1].upper() + remedy[1:]
    try:
        held = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing. {remedy}") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is half-written or damaged ({error}). {remedy}") from error
    if not isinstance(held, dict) or held.get("version") != version:
        found = held.get("version") if isinstance(held, dict) else held
        raise UserError(f"{path}: version is {found!r}, this suite reads {version}. {remedy}")
    return held
