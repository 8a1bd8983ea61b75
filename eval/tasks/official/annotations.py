"""Reading annotation files of hundreds of megabytes: parsed once, in compact form, with errors that name entry and key.

VQAv2's training answers are 4.4 million objects of three keys; as Python dicts they are gigabytes. `json.load` takes a hook for
each object as it is read, and `keep_text` lets only the one string that matters live.
"""

from __future__ import annotations

import gc
import json
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

from configs.errors import UserError

Hook = Callable[[Any], Any]


def load(path: Path, hook: Hook | None = None, *, pairs: bool = False) -> Any:
    """The content of a JSON file. `pairs`: `hook` is given an object's (key, value) pairs, equal keys among them. Raises
    UserError if it cannot be read or is damaged, or if `hook` raises ValueError."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            text = str(content, "utf-8")  # type: ignore[call-overload]  # straight from the page cache: one copy, not two
        return json.loads(text, object_pairs_hook=hook) if pairs else json.loads(text, object_hook=hook)
    except (OSError, ValueError, RecursionError) as error:  # an empty file cannot be mapped; brackets may nest without an end
        raise UserError(f"{path}: no readable JSON ({error}). Bring the file again.") from error


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Reading makes millions of objects and no cycles; looking for some doubles its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def keep_text(key: str) -> Hook:
    """{key: text, ...} -> text, for the objects of an answer list; all others stay as they are. Answers repeat: each is kept
    once."""

    def hook(found: dict[str, Any]) -> Any:
        try:
            return sys.intern(found[key])
        except (KeyError, TypeError):  # another object, or no text under its key: refused later, by name
            return found

    return hook


def entries(content: Any, path: Path, key: str | None, shape: str) -> list[Any]:
    """The list under `key` of the file (None: the file is the list). Raises UserError for another shape."""
    found = content if key is None else content.get(key) if isinstance(content, dict) else None
    if isinstance(found, list):
        return found
    has = f"the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, dict) else f"a {type(content).__name__}"
    wanted = "a list" if key is None else f"a list under {key!r}"
    raise UserError(f"{path}: holds {has}; {shape} hold {wanted}. Is it the official file of this task?")


def columns(found: list[Any], path: Path, key: str, *wanted: str) -> list[Any]:
    """The values of the `wanted` keys of each entry: a list of tuples, or of values for one key. Raises UserError naming the
    first entry without one, or if `found` is no list."""
    if not isinstance(found, list):
        raise UserError(f"{path}: {key} is {str(found)[:200]}, not a list. Bring the official file again.")
    try:
        return list(map(itemgetter(*wanted), found))
    except (KeyError, TypeError, IndexError):
        for position, entry in enumerate(found):
            lacks = [name for name in wanted if not isinstance(entry, dict) or name not in entry]
            if lacks:
                raise UserError(
                    f"{path}: {key}[{position}] has no {', '.join(lacks)} (found {str(entry)[:200]}). Bring the official file "
                    "again, or give the file of a split with public annotations."
                ) from None
        raise


def check_ids(values: Iterable[Any], path: Path, key: str, name: str) -> None:
    """Raises UserError naming the first entry of `key` whose `name` is neither a number nor a string: nothing has such an id."""
    for position, value in enumerate(values):
        if not isinstance(value, int | float | str):
            raise UserError(
                f"{path}: {key}[{position}] has the {name} {value!r}, neither a number nor a string. Bring the official file "
                "again."
            )
