"""What counts as a text in users' files.

JSON admits half of a surrogate pair ("\\ud83d", an emoji cut in two): a Python string that no tokeniser takes and no file holds.
"""

from __future__ import annotations

from typing import Any


def is_text(value: Any) -> bool:
    """Whether it is a string of whole characters."""
    return isinstance(value, str) and _whole(value)


def are_texts(values: Any) -> bool:
    """Whether it is a list of at least one text, and of nothing else."""
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) for v in values) and _whole("".join(values))


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
