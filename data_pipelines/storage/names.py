"""Names of files: paths of this machine, and URLs."""

from __future__ import annotations

import os
import re
from pathlib import Path


def scheme_of(name: str) -> str:
    """The scheme of a URL in lower case, "" of a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", name)
    return found[1].lower() if found else ""


def is_remote(path: str | Path) -> bool:
    """Whether a name is a URL of anything but this machine's files. A Path never is: it folds the two slashes into one."""
    return isinstance(path, str) and scheme_of(path) not in ("", "file")


def is_web(path: str | Path) -> bool:
    """Whether a name is the URL of a plain web server."""
    return isinstance(path, str) and scheme_of(path) in ("http", "https")


def local_path(path: str | Path) -> Path:
    """The absolute path of a file on this machine, named by a path or by file://."""
    text = re.sub(r"^file://(localhost(?=/))?", "", str(path), flags=re.IGNORECASE)
    return Path(os.path.abspath(Path(text).expanduser()))


def shown(name: str) -> str:
    """A name as messages may show it: a URL without its password, and without its query, which may be a signature."""
    if not is_remote(name):
        return name
    return re.sub(r"\?.*", "?...", re.sub(r"(://)[^/@]*@", r"\1...@", name), flags=re.DOTALL)
