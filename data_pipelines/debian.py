"""Debian packages: fetched through apt-get, unpacked by dpkg-deb, read without a step outside what was unpacked.

    fetch(("dict-gcide",), downloads)      ->  downloads/debian/dict-gcide/dict-gcide_0.48.5+nmu2_all.deb
    with unpacked(archive, scratch) as tree:   files and their content, nothing else of the machine
        tree.files(r"usr/share/dictd/.*")

Neither needs root, and no dependency is fetched. apt-get knows the user's mirrors and proxies and checks what arrives against its
signed lists, so this module knows neither address nor hash. Debian's versions move: what was downloaded once is used again, and
its version and SHA-256 stand in the manifest of every corpus made from it.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from configs.errors import UserError
from data_pipelines.shards import Package, sha256_of

TOOLS = ("apt-get", "dpkg-deb")
NO_CANDIDATE = re.compile(r"unable to locate package|has no candidate|has no installation candidate|can't find a source", re.I)
"""How apt-get says that its lists hold no such package; anything else is a failure."""
UPDATE = "If its lists are old or empty, bring them up to date first: apt-get update (as root)."
SECONDS = 1800
QUOTED_LINES = 6
LICENCES_NAMED = 6


def require_tools() -> None:
    """Raises UserError where apt-get or dpkg-deb is missing."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise UserError(
            f"corpus=full is made from Debian packages, and this machine has no {' and no '.join(missing)}. Prepare it on "
            "Debian, or in a container of it, and copy the corpus's folder; or use corpus=starter, which needs neither."
        )


# ------------------------------------------------------------------------------------------------------------- fetching


def fetch(names: Sequence[str], folder: Path) -> Path | None:
    """The package's archive: the one in `folder`, else downloaded; None when apt-get's lists have it under none of its `names`.

    Releases rename packages that carry a version; of several names the first one found counts, what is downloaded before what is
    not. Raises UserError when a download fails, and when the folder of a package holds several archives.
    """
    home = folder / "debian"
    for name in names:
        kept = sorted((home / name).glob("*.deb"))
        if len(kept) > 1:
            raise UserError(f"{home / name} holds {len(kept)} archives, and one is used. Delete the others.")
        if kept:
            return kept[0]
    for name in names:
        if (archive := _download(name, home)) is not None:
            return archive
    return None


def _download(name: str, home: Path) -> Path | None:
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=home) as partial:
        arrived = Path(partial) / "package"
        arrived.mkdir(mode=0o755)
        print(f"  apt-get download {name}", flush=True)
        done = _run(["apt-get", "download", "--quiet=2", name], arrived, f"Downloading {name}")
        if done.returncode:
            said = (done.stderr + done.stdout).strip()
            if NO_CANDIDATE.search(said):
                return None
            raise UserError(f"Could not download {name} through apt-get, which said:\n{_quoted(said)}\n{UPDATE}")
        archives = sorted(arrived.glob("*.deb"))
        if len(archives) != 1:
            raise UserError(f"apt-get download {name} left {len(archives)} archives where one was expected. {UPDATE}")
        shutil.rmtree(home / name, ignore_errors=True)  # without an archive in it, or it would have been used
        arrived.rename(home / name)
    return home / name / archives[0].name


def _run(command: list[str], folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}  # its messages are read, so in English
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{what} took more than {SECONDS} s and was given up.") from None


def _quoted(said: str) -> str:
    return "\n".join(f"    {line}" for line in said.splitlines()[-QUOTED_LINES:]) or "    (nothing)"


# ------------------------------------------------------------------------------------------------------------ unpacking


@contextmanager
def unpacked(archive: Path, scratch: Path) -> Iterator[Tree]:
    """The archive's files in a folder of their own under `scratch`, for as long as the context lasts. UserError when damaged."""
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{archive.stem}-", dir=scratch) as folder:
        done = _run(["dpkg-deb", "--extract", str(archive), folder], scratch, f"Unpacking {archive.name}")
        if done.returncode:
            raise UserError(
                f"{archive}: dpkg-deb cannot unpack it:\n{_quoted(done.stderr.strip())}\nDelete it, and it is downloaded afresh."
            )
        yield Tree(Path(folder))


class Tree:
    """What a package unpacked to. Names are relative to its root, with slashes.

    Only regular files are read. A link is followed if what it leads to is a regular file of the same tree, for packages keep one
    copy of a picture and link to it; `refused` counts those that lead elsewhere, which are as good as absent.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self.refused: set[str] = set()

    def files(self, pattern: str) -> list[str]:
        """Names of all readable files that match `pattern` as a whole, sorted."""
        wanted = re.compile(pattern)
        found = []
        for folder, _, names in os.walk(self.root, followlinks=False):
            inside = Path(folder).relative_to(self.root)
            found += [name for n in names if wanted.fullmatch(name := (inside / n).as_posix()) and self._path(name) is not None]
        return sorted(found)

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is no such file in the tree, whatever `name` says."""
        path = self._path(name)
        return None if path is None else path.read_bytes()

    def beside(self, page: str, reference: str) -> str | None:
        """The name of the file that `page` refers to, as a browser would resolve it; None for what lies outside the tree."""
        target = PurePosixPath(reference.lstrip("/")) if reference.startswith("/") else PurePosixPath(page).parent / reference
        name = os.path.normpath(target)
        return None if name.startswith("..") else name

    def _path(self, name: str) -> Path | None:
        if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
            return None
        path = self.root / name
        try:
            real = Path(os.path.realpath(path, strict=True))
            regular = stat.S_ISREG(os.lstat(real).st_mode)
        except OSError:  # absent, a loop, or a link to another package's file
            if path.is_symlink():
                self.refused.add(name)
            return None
        if not real.is_relative_to(self.root):
            self.refused.add(name)
            return None
        return real if regular else None


# -------------------------------------------------------------------------------------------------------------- records


def record(archive: Path, tree: Tree) -> Package:
    """What the manifest keeps of a package."""
    done = _run(["dpkg-deb", "--field", str(archive), "Package", "Version"], archive.parent, f"Reading {archive.name}")
    fields = dict(re.findall(r"^(\w+): (.*)$", done.stdout, re.M))
    if done.returncode or not {"Package", "Version"} <= set(fields):
        raise UserError(f"{archive}: no Debian package ({done.stderr.strip()}). Delete it, and it is downloaded afresh.")
    name = fields["Package"]
    return Package("debian", name, fields["Version"], licence(tree, name), sha256_of(archive))


def licence(tree: Tree, name: str) -> str:
    """The short names in the package's copyright file, in its order; where it is no form, or another package's: see there."""
    text = (tree.read(f"usr/share/doc/{name}/copyright") or b"").decode("utf-8", "replace")
    short = re.findall(r"^License:[ \t]*(\S[^\n]*)", text, re.M) if text.lstrip().startswith("Format:") else []
    several = list(dict.fromkeys(one.strip() for one in short))
    if not several:
        return "see copyright file"
    more = f", and {len(several) - LICENCES_NAMED} more in the copyright file" if len(several) > LICENCES_NAMED else ""
    return ", ".join(several[:LICENCES_NAMED]) + more
